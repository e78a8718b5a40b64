"""What the outputs of a layer's modules do to the layer's output: measured, by passes of that layer alone.

Knows nothing of models, families and components.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.residuals import first_tensor

# Of the size of the change that is made: below it nothing arrives, and a scaled copy may be off by as much.
NOTHING, TOLERANCE = 1e-4, 1e-2


@dataclass(frozen=True)
class Call:
    """One call of a layer: what entered and the other arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """What entered, (1, T, d_model)."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def on(self, layer: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """The layer's output (1, T, d_model), for another `hidden` if given."""
        args, kwargs = self.args, dict(self.kwargs)
        if hidden is not None:
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        return first_tensor(layer(*args, **kwargs))


class Probe:
    """One layer and one call of it: the outputs of all its modules that multiply, played back but for what is changed."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        self.layer, self.call = layer, call
        self.modules = {path: module for path, module in layer.named_modules() if path}
        self.multipliers = {
            path: module
            for path, module in self.modules.items()
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        }
        self.norms = [
            path
            for path, module in self.modules.items()
            if path not in self.multipliers and list(module.parameters()) and not list(module.children())
        ]
        self.outputs: dict[str, list[Any]] = {path: [] for path in self.modules}
        self._inputs: dict[str, list[Tensor]] = {path: [] for path in self.norms}
        with self._hooked(self.modules, self._record):
            self.base = call.on(layer)
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(self.base.shape[-1], generator=generator).to(self.base)
        self.delta = v / v.norm() * self.base.norm(dim=-1).mean()  # δ·v, as large as the stream: no rounding hides it

    def writes(self, path: str, d_model: int) -> bool:
        """Whether a module was called, and gave states of the stream's width."""
        return bool(self.outputs[path]) and first_tensor(self.outputs[path][0]).shape[-1] == d_model

    def change(self, path: str) -> float | None:
        """c where Δ = c·δ·v, 0 where it is no positive multiple of δ·v, None where nothing arrives."""
        return self._share(self._play(self._all_but(path), {path: self.delta}) - self.base)

    def change_by_norm(self, path: str) -> tuple[float | None, str]:
        """`change` of a norm that the module's output goes into, and the norm; 0 where there is none."""
        entered: dict[str, Tensor] = {}

        def see(norm: str) -> Callable[..., Any]:
            return lambda module, args, output: entered.update({norm: args[0].detach().clone()})

        with self._hooked({norm: self.modules[norm] for norm in self.norms if self._inputs[norm]}, see):
            self._play(self._all_but(path), {path: self.delta})
        for norm, after in entered.items():
            before = self._inputs[norm][-1]
            if before.shape == after.shape and before.shape[-1] == len(self.delta) and self._share(after - before):
                scale = self.change(norm) or self.change_by_norm(norm)[0]  # Gemma 4's experts: one norm after another
                if scale:
                    return scale, norm
        return 0.0, ""

    def _all_but(self, path: str) -> set[str]:
        """What multiplies, other than a module and what it is in."""
        return {other for other in self.multipliers if other != path and not path.startswith(f"{other}.")}

    def _share(self, difference: Tensor) -> float | None:
        """c where a change (…, d_model) is c·δ·v, 0 where it isn't, None where it is nothing."""
        difference = difference.flatten(0, -2)
        size = difference.norm(dim=-1)
        reached = size > NOTHING * self.delta.norm()
        if not reached.any():
            return None
        difference, size = difference[reached], size[reached]
        scale = difference @ self.delta / self.delta.square().sum()
        off = (difference - scale[:, None] * self.delta).norm(dim=-1)
        return float(scale.mean()) if (off <= TOLERANCE * size).all() and (scale > 0).all() else 0.0

    def mixes(self, path: str, writers: Mapping[str, object]) -> bool:
        """Whether a change of the layer's input at the first position changes what is written at later ones."""
        hidden = self.call.hidden.clone()
        hidden[:, 0] = hidden[:, 0].roll(1, dims=-1) + hidden[:, 0].std()
        seen: list[Tensor] = []

        def see(path: str) -> Callable[..., Any]:
            return lambda module, args, output: seen.append(first_tensor(output).clone())

        others = {other for other in writers if other != path}
        with self._hooked({path: self.modules[path]}, see):
            self._play(others, {}, hidden)
        before, after = first_tensor(self.outputs[path][0]), seen[0]
        if before.shape != after.shape:
            return False  # experts are given the positions that are routed to them
        before, after = before.flatten(0, -2)[1:], after.flatten(0, -2)[1:]
        return bool((after - before).norm() > NOTHING * before.norm())

    def _play(self, fixed: set[str], changed: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """The layer's output with the outputs of `fixed` as recorded, and those of `changed` as recorded plus a change."""

        def hook(path: str) -> Callable[..., Any]:
            recorded = iter(self.outputs[path])

            def replace(module: nn.Module, args: Any, output: Any) -> Any:
                played = next(recorded, output)
                if first_tensor(played).shape == first_tensor(output).shape:  # else experts to which others were routed
                    output = copied(played)
                if path not in changed:
                    return output
                first = first_tensor(output) + changed[path]
                return (first, *output[1:]) if isinstance(output, tuple) else first

            return replace

        with self._hooked({path: self.modules[path] for path in (*fixed, *changed)}, hook):
            return self.call.on(self.layer, hidden)

    def _record(self, path: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[path].append(copied(output))  # blocks may add the stream in place
            if path in self._inputs and args:
                self._inputs[path].append(args[0].clone())

        return note

    @contextlib.contextmanager
    def _hooked(self, modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        handles = [module.register_forward_hook(make(path)) for path, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def in_float32(layer: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """The layer and the call in float32; as they are where the storage is quantized."""
    parameters = list(layer.parameters())
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return layer, call
    if any(not parameter.is_floating_point() or parameter.element_size() < 2 for parameter in parameters):
        raise InputError(
            "A quantized model of an unknown family can't be looked through; load it without load.quantization once, or a "
            "checkpoint that is quantized itself with --set load.dequantize=true."
        )
    return copy.deepcopy(layer).float(), Call(_cast(call.args), _cast(dict(call.kwargs)))


def _cast(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def copied(value: Any) -> Any:
    return _mapped(value, Tensor.clone)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts around changed tensors; anything else is kept as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return {key: _mapped(item, change) for key, item in value.items()} if type(value) is dict else value
