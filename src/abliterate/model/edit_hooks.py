"""Forward hooks apply the current trial's edits to the model: row or column scales plus a low-rank update per module.

An unedited module has no hook and costs nothing. Base weights are never written, so clearing all edits restores the base model
bit for bit. PEFT is the exchange format (`export/adapter.py`) and not the path in trials: its LoRA layers cost 10–27 % of a
decode step on a small model (docs/design.md §5.8).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from abliterate.model.architectures import Target
from abliterate.model.experts import ExpertsEdit, LowRankEdit, is_fused
from abliterate.model.offload import held
from abliterate.model.sharding import Columns, columns_of, whole
from abliterate.model.weights import device_and_dtype

# {module: (key, function that makes the factors)}. Equal keys mean equal factors, so an unchanged module isn't written again.
RequestedEdits = Mapping[str, tuple[Hashable, Callable[[], LowRankEdit]]]


class EditHooks:
    """The hooks of all target modules. `apply` switches edits on, `clear` is its inverse."""

    def __init__(self, targets: Iterable[Target], *, incremental: bool = True) -> None:
        targets = tuple(targets)
        self._edits: dict[str, _ModuleEdit | ExpertsEdit] = {
            target.name: ExpertsEdit(target.module) if is_fused(target.module) else _ModuleEdit(target.module)
            for target in targets
        }
        self._layers = {target.name: target.layer for target in targets}
        self._incremental = incremental
        self.version = 0
        self.hits = 0
        self.misses = 0

    @property
    def active(self) -> frozenset[str]:
        """Names of the modules that are edited now."""
        return frozenset(name for name, edit in self._edits.items() if edit.is_on)

    @property
    def first_layer(self) -> int | None:
        """The lowest layer with an edited module; None if no module is edited."""
        return min((self._layers[name] for name in self.active), default=None)

    def apply(self, wanted: RequestedEdits) -> None:
        """Make exactly the edits in `wanted`.

        Incremental: only modules whose key has changed are written, and modules that aren't in `wanted` are switched off.
        """
        self.version += 1
        if not self._incremental:
            self.clear()
        for name, edit in self._edits.items():
            if name not in wanted:
                edit.off()
                continue
            key, make_factors = wanted[name]
            if edit.key == key:
                self.hits += 1
                edit.resume()
                continue
            self.misses += 1
            edit.off()  # if `make_factors` fails, the module is unedited, not half edited
            edit.write(key, make_factors())

    def suspend(self) -> None:
        """The base model, bit for bit; the factors stay, so that the next `apply` writes only what differs from this one."""
        self.version += 1
        for edit in self._edits.values():
            edit.suspend()

    def clear(self) -> None:
        """Switch every edit off and forget its factors: the base model."""
        self.version += 1
        for edit in self._edits.values():
            edit.off()


class _ModuleEdit:
    """One module's edit, in the dtype of the module's input."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._low: Tensor | None = None  # Ax of the pass at work, if x was scaled
        self._columns: Columns | None = columns_of(getattr(module, "weight", None))
        self.off()

    def write(self, key: Hashable, factors: LowRankEdit) -> None:
        bias = held(self._module, "bias") if getattr(self._module, "bias", None) is not None else None
        # A quantized weight doesn't show the compute dtype; the factors then stay float32 until the first input.
        device, dtype = device_and_dtype(self._module)
        options: Any = {"device": device, "dtype": dtype or torch.float32}
        self._a, self._b = factors.a.to(**options), factors.b.to(**options)
        # Also s − 1, as below: 1/s − 1 is small for most columns, too.
        self._entering = None if factors.column_scale is None else (factors.column_scale - 1).to(**options)
        self._part = self._entering_part = None
        if self._columns is not None:
            self._part = self._columns.of(self._a)
            self._entering_part = None if self._entering is None else self._columns.of(self._entering)
        # s − 1, not s: bfloat16 has no numbers between 0.996 and 1, and most rows' scales lie there.
        self._outer = None if factors.row_scale is None else (factors.row_scale - 1).to(**options)
        # y = s∘(Wx) + BAx + bias, computed from the module's own output Wx + bias: biases are never edited. A column scale is
        # one of x, before the module multiplies it.
        self._shift = None
        if bias is not None and factors.row_scale is not None:
            bias = whole(bias)
            self._shift = (bias.detach().float() * (1 - factors.row_scale.to(bias.device))).to(**options)
        self.key = key
        self.resume()

    @property
    def is_on(self) -> bool:
        """Whether the module computes with the edit now."""
        return bool(self._handles)

    def resume(self) -> None:
        if not self._handles:
            self._handles = [self._module.register_forward_hook(self._edit)]
            if self._entering is not None:
                self._handles.append(self._module.register_forward_pre_hook(self._scale))

    def suspend(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def off(self) -> None:
        self.suspend()
        self.key = None
        self._a = self._part = self._b = self._outer = self._shift = None  # type: ignore[assignment]
        self._entering = self._entering_part = self._low = None

    def _scale(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The scaled x; BAx is of x as it was, so Ax is kept for `_edit`."""
        x = args[0]
        self._low = self._low_of(x)
        scale: Tensor = self._entering if self._is_whole(x) else self._entering_part  # type: ignore[assignment]
        return (torch.addcmul(x, x, scale), *args[1:])

    def _is_whole(self, x: Tensor) -> bool:
        """Whether x has all input features; otherwise it is this rank's part, and outputs are summed over ranks."""
        return self._columns is None or x.shape[-1] == self._columns.total

    def _low_of(self, x: Tensor) -> Tensor:
        if self._a.dtype != x.dtype:
            self._recast(x.dtype)
        if self._columns is None or self._is_whole(x):
            return nn.functional.linear(x, self._a)
        return self._columns.summed(nn.functional.linear(x, self._part))  # type: ignore[arg-type]

    def _edit(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        low = self._low_of(args[0]) if self._low is None else self._low
        self._low = None
        edited = output if self._outer is None else torch.addcmul(output, output, self._outer)
        if self._shift is not None:
            edited = edited + self._shift
        if self._b.shape[1] > 1:
            return edited + nn.functional.linear(low, self._b)
        # Elementwise: a matrix product with an inner size of 1 takes up to thirty times as long (bfloat16 on a CPU).
        return torch.addcmul(edited, low, self._b[:, 0])

    def _recast(self, dtype: torch.dtype) -> None:
        self._a, self._b = self._a.to(dtype), self._b.to(dtype)
        for name in ("_part", "_outer", "_shift", "_entering", "_entering_part"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(dtype))
