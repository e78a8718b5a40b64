"""Fused experts hold all expert matrices of a layer in one parameter; this module reads them and edits them during the pass.

Each routed expert of a token writes r (W_e h + bias_e), and edited r (s_e∘(W_e h) + b_e (a_e·h) + bias_e), or with columns
scaled by t_e, r (W_e (t_e∘h) + b_e (a_e·h) + bias_e). Our function in
transformers' registry of experts functions computes this for the (token, expert) pairs of a pass, O(d_ff + d_model) each, so
no edited matrix is ever in memory (PEFT's parameter targeting makes all of them in every pass). Unedited modules run
transformers' own function.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from abliterate.model.formats import is_plain
from abliterate.model.offload import held, home_of
from abliterate.model.sharding import columns_of

# The name of our function in transformers' registry, and the attribute of an edited module that holds its edit.
_FUNCTION, _EDIT = "abliterate", "_abliterate_edit"
# The attributes that our function needs; transformers' decorator for experts classes sets them.
_DECORATED = ("config", "has_bias", "is_transposed", "_apply_gate")


class LowRankEdit(Protocol):
    """W' = diag(row_scale) W diag(column_scale) + b a, as `edits.Factors`; shapes of fused experts begin with the experts."""

    @property
    def row_scale(self) -> Tensor | None: ...
    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def column_scale(self) -> Tensor | None: ...


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the fused experts of a layer and belongs to a class whose forward pass we know."""
    down = module._parameters.get("down_proj")
    known = type(module).__name__ in _REPLACED or all(hasattr(module, name) for name in _DECORATED)
    return known and down is not None and down.ndim == 3 and is_plain(down)


def replaces_forward(module: nn.Module) -> bool:
    """Whether an edit of these fused experts replaces their forward pass, since transformers' registry has no place for it."""
    return type(module).__name__ in _REPLACED


def is_transposed(module: Any) -> bool:
    """Whether these fused experts are stored as (E, d_ff, d_model)."""
    return bool(getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts"))


def fused_weight(module: nn.Module) -> Tensor:
    """W (E, d_model, d_ff) of fused experts, a view in either layout."""
    down = held(module, "down_proj")
    return down.detach().transpose(1, 2) if is_transposed(module) else down.detach()


def down_outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Every expert's output for its own row of `x` (E, d_ff): (E, d_model), with biases and the edit if it is on."""
    experts = torch.arange(len(x), device=x.device)
    return _down(module, x.contiguous(), experts, (experts + 1).int())


class ExpertsEdit:
    """The edit of one layer's fused experts, in the dtype of their input. `off` restores the module.

    Raises:
        ValueError: another adapter edits the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module
        if _EDIT in vars(module):  # otherwise `off` would restore that edit
            raise ValueError("these experts are being edited by another adapter")
        self._config: Any = getattr(module, "config", None)
        # If accelerate has hooks around a module, they call `_old_forward` instead of `forward`.
        self._forward = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self._old_forward = vars(module).get(self._forward)
        self.key: Hashable | None = None
        self._edit: _Edit | None = None

    @property
    def is_on(self) -> bool:
        """Whether the module computes with the edit now."""
        return _EDIT in vars(self._module)

    def write(self, key: Hashable, factors: LowRankEdit) -> None:
        """Make the edit of these factors, and switch it on."""
        weight = self._module.down_proj
        place = {"device": home_of(self._module, weight), "dtype": weight.dtype}
        # s − 1, not s: bfloat16 has no numbers between 0.996 and 1, and most rows' scales lie there.
        scale, entering = (
            None if each is None else (each - 1).to(**place) for each in (factors.row_scale, factors.column_scale)
        )
        a, b = factors.a.to(**place), factors.b.to(**place)
        columns = columns_of(weight, 1 if is_transposed(self._module) else 2)
        if columns is not None:  # transformers sums what all ranks' experts return, so nothing is summed here
            a, b, scale = columns.of(a), columns.shared(b), None if scale is None else columns.shared(scale)
            entering = None if entering is None else columns.of(entering)
        self._edit = _Edit(a, b, scale, entering, self._config)
        self.key = key
        self.resume()

    def resume(self) -> None:
        """Switch the written edit on. Only this module's view of the config says so: layers share one config."""
        setattr(self._module, _EDIT, self._edit)
        replaced = _REPLACED.get(type(self._module).__name__)
        if replaced is not None:
            setattr(self._module, self._forward, partial(replaced, self._module))
        else:
            # Not through the config's property, which would also change its sub-configs.
            edited_config: Any = copy.copy(self._config)
            edited_config._experts_implementation_internal = _FUNCTION
            self._module.config = edited_config

    def off(self) -> None:
        """Suspend the edit and forget its factors."""
        self.suspend()
        self.key, self._edit = None, None

    def suspend(self) -> None:
        """The base's own function again; `resume` switches the edit on once more."""
        if type(self._module).__name__ not in _REPLACED:
            self._module.config = self._config
        elif self._old_forward is None:
            vars(self._module).pop(self._forward, None)
        else:
            setattr(self._module, self._forward, self._old_forward)
        vars(self._module).pop(_EDIT, None)


@dataclass
class _Edit:
    """`a` (E, r, d_ff), `b` (E, d_model, r), `scale` (E, d_model) = s − 1, `column_scale` (E, d_ff) = t − 1.

    `config`: the config that the layers share.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None
    column_scale: Tensor | None
    config: Any

    def entering(self, x: Tensor, experts: Tensor) -> Tensor:
        """What W_e multiplies instead of x (S, d_ff): t∘x; `experts` (S)."""
        self._recast(x.dtype)
        return x if self.column_scale is None else torch.addcmul(x, x, self.column_scale[experts])

    def entering_all(self, x: Tensor) -> Tensor:
        """The same of `x` (E, n, d_ff)."""
        self._recast(x.dtype)
        return x if self.column_scale is None else torch.addcmul(x, x, self.column_scale[:, None])

    def __call__(self, written: Tensor, x: Tensor, experts: Tensor) -> Tensor:
        """W'_e x (S, d_model) of each (token, expert) pair, from `written` = W_e (t∘x); `x` (S, d_ff), `experts` (S)."""
        self._recast(x.dtype)
        low = torch.bmm(self.a[experts], x[:, :, None])  # (S, r, 1)
        edited = written if self.scale is None else torch.addcmul(written, written, self.scale[experts])
        if self.b.shape[2] > 1:
            return torch.baddbmm(edited[:, :, None], self.b[experts], low)[:, :, 0]
        return torch.addcmul(edited, low[:, 0], self.b[experts][:, :, 0])  # elementwise, as in `edit_hooks.py`

    def of_all(self, written: Tensor, x: Tensor) -> Tensor:
        """W'_e x (E, n, d_model) if every expert has n rows: `written` (E, n, d_model), `x` (E, n, d_ff)."""
        self._recast(x.dtype)
        low = torch.bmm(x, self.a.transpose(1, 2))  # (E, n, r)
        edited = written if self.scale is None else torch.addcmul(written, written, self.scale[:, None])
        if self.b.shape[2] > 1:
            return torch.baddbmm(edited, low, self.b.transpose(1, 2))
        return torch.addcmul(edited, low, self.b[:, None, :, 0])

    def _recast(self, dtype: torch.dtype) -> None:
        if self.a.dtype != dtype:
            self.a, self.b = self.a.to(dtype), self.b.to(dtype)
            self.scale = None if self.scale is None else self.scale.to(dtype)
            self.column_scale = None if self.column_scale is None else self.column_scale.to(dtype)


def _experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' `grouped_mm_experts_forward`, with the edit between W and its bias; returns (tokens, d_model)."""
    tokens, top_k = hidden_states.shape[0], top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1))  # (S), S = tokens × top_k
    offsets = torch.searchsorted(experts, torch.arange(1, len(self.down_proj) + 1, device=experts.device)).int()
    gated = getattr(self, "has_gate", True)
    name = "gate_up_proj" if gated else "up_proj"
    x = _linear(self, name, hidden_states[order // top_k], experts, offsets)
    if getattr(self, "has_bias", False):
        x = x + getattr(self, f"{name}_bias")[experts]
    x = _gate(self, x) if gated else self.act_fn(x)
    out = _down(self, x, experts, offsets)
    if getattr(self, "has_post_expert_norm", False):
        out = self.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1)[order, None]
    restored = torch.empty_like(weighted)
    restored[order] = weighted
    return restored.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _gate(module: Any, x: Tensor) -> Tensor:
    """The gated activation (S, d_ff) of `x` (S, 2 d_ff), by the module's own method if it has one."""
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(x)  # type: ignore[no-any-return]
    gate, up = x.chunk(2, dim=-1)
    return module.act_fn(gate) * up  # type: ignore[no-any-return]


def _unrouted_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """`Llama4TextExperts.forward` with the edit; `hidden_states` (E × tokens, d_model) and the result are sorted by expert.

    Every expert sees every token; an expert that the token isn't routed to has weight 0.
    """
    x = hidden_states.view(len(self.down_proj), -1, hidden_states.shape[-1])
    gate, up = torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)
    x, edit = up * self.act_fn(gate), vars(self)[_EDIT]
    return edit.of_all(torch.bmm(edit.entering_all(x), self.down_proj), x).view(hidden_states.shape)


def _idle_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`LongcatFlashExperts.forward` with the edit; experts numbered beyond the last matrix return their input."""
    active = top_k_index < len(self.down_proj)
    output = _experts_forward(self, hidden_states, top_k_index.where(active, 0), top_k_weights * active)
    return output + (hidden_states * (top_k_weights * ~active).sum(dim=-1, keepdim=True)).to(output.dtype)


def _down(module: Any, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    edit: _Edit | None = vars(module).get(_EDIT)
    out = _linear(module, "down_proj", x if edit is None else edit.entering(x, experts), experts, offsets)
    if edit is not None:
        out = edit(out, x.to(out.dtype), experts)
    return out + module.down_proj_bias[experts] if getattr(module, "has_bias", False) else out


def _linear(module: Any, name: str, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
    """W_e x of pairs sorted by expert, without biases, by the same kernel as the base model as far as we know it."""
    weight = getattr(module, name)[: len(module.down_proj)]  # LongCat also stores rows for its idle experts
    weight = weight if is_transposed(module) else weight.transpose(1, 2)  # (E, in, out)
    edit: _Edit | None = vars(module).get(_EDIT)
    # While it decodes on an accelerator, `generate` switches the shared config to this: few pairs, no sorting.
    if edit is not None and getattr(edit.config, "_experts_implementation", "") == "batched_mm":
        return torch.bmm(x[:, None], weight[experts])[:, 0]
    return moe._grouped_mm(x, weight, offs=offsets)  # one product for each expert with tokens


moe.ALL_EXPERTS_FUNCTIONS.register(_FUNCTION, _experts_forward)
# Classes outside the registry, and the function that replaces their `forward` while an edit is on.
_REPLACED: dict[str, Callable[..., Tensor]] = {
    "Llama4TextExperts": _unrouted_forward,
    "Step3p7Experts": _experts_forward,
    "LongcatFlashExperts": _idle_forward,
}
