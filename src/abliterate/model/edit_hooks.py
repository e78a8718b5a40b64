"""The edits of the current trial, on the model: a row scale plus low rank per module, by forward hooks.

A module whose edit is off has no hook and costs nothing; base weights are never written, so taking all edits off
gives the base model back bit for bit. PEFT is the exchange format (`export/adapter.py`), not the trial path: its
LoRA layers cost 10–27 % of a decode step on a small model (DESIGN §5.8).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from abliterate.model.architectures import Target
from abliterate.model.experts import ExpertsAdapter, is_fused
from abliterate.model.offload import held
from abliterate.model.weights import place_of


class LowRankEdit(Protocol):
    """W' = diag(row_scale) W + b a; shapes as in `edits.Factors`, those of a stack for fused experts."""

    @property
    def row_scale(self) -> Tensor | None: ...
    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...


# What makes an edit: equal keys mean equal factors, so an unchanged module need not be written again.
RequestedEdits = Mapping[str, tuple[Hashable, Callable[[], LowRankEdit]]]


class EditHooks:
    """The adapters of all target modules. `apply` is announced by its name and undone by `clear`."""

    def __init__(self, targets: Iterable[Target], *, incremental: bool = True) -> None:
        targets = tuple(targets)
        self._adapters: dict[str, _Adapter | ExpertsAdapter] = {
            target.name: ExpertsAdapter(target.module) if is_fused(target.module) else _Adapter(target.module)
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
        return frozenset(name for name, adapter in self._adapters.items() if adapter.is_on)

    @property
    def first_layer(self) -> int | None:
        """The lowest layer with an edited module; None where there is none."""
        return min((self._layers[name] for name in self.active), default=None)

    def apply(self, wanted: RequestedEdits) -> None:
        """Make exactly the `wanted` edits, {module: (key, factors maker)}.

        Incrementally: only modules whose key changed are written, those no longer wanted are switched off.
        """
        self.version += 1
        if not self._incremental:
            self.clear()
        for name, adapter in self._adapters.items():
            if name not in wanted:
                adapter.off()
                continue
            key, make = wanted[name]
            if adapter.key == key:
                self.hits += 1
                adapter.resume()
                continue
            self.misses += 1
            adapter.off()  # a failing `make` leaves the module unedited, not half edited
            adapter.write(key, make())

    def suspend(self) -> None:
        """The base model, bit for bit; the factors stay, so that the next `apply` writes only what differs from this one."""
        self.version += 1
        for adapter in self._adapters.values():
            adapter.suspend()

    def clear(self) -> None:
        """Switch every edit off and forget its factors: the base model."""
        self.version += 1
        for adapter in self._adapters.values():
            adapter.off()


class _Adapter:
    """One module's edit, in the dtype of what flows through it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handle: RemovableHandle | None = None
        self.off()

    def write(self, key: Hashable, factors: LowRankEdit) -> None:
        bias = held(self._module, "bias") if getattr(self._module, "bias", None) is not None else None
        # Quantized storage says nothing of the compute dtype; factors then stay float32 until the first input.
        device, dtype = place_of(self._module)
        place: Any = {"device": device, "dtype": dtype or torch.float32}
        self._a, self._b = factors.a.to(**place), factors.b.to(**place)
        # s − 1, not s: half precision has no numbers between 0.996 and 1, and most rows' scales are there.
        self._scale = None if factors.row_scale is None else (factors.row_scale - 1).to(**place)
        # y = s∘(Wx) + BAx + bias, written over the module's own output Wx + bias: biases are never edited.
        self._shift = None
        if bias is not None and factors.row_scale is not None:
            self._shift = (bias.detach().float() * (1 - factors.row_scale.to(bias.device))).to(**place)
        self.key = key
        self.resume()

    @property
    def is_on(self) -> bool:
        """Whether the module computes with the edit now."""
        return self._handle is not None

    def resume(self) -> None:
        if self._handle is None:
            self._handle = self._module.register_forward_hook(self._edit)

    def suspend(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def off(self) -> None:
        self.suspend()
        self.key = None
        self._a = self._b = self._scale = self._shift = None  # type: ignore[assignment]

    def _edit(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0]
        if self._a.dtype != x.dtype:
            self._recast(x.dtype)
        low = nn.functional.linear(nn.functional.linear(x, self._a), self._b, self._shift)
        edited = output + low
        return edited if self._scale is None else edited.addcmul_(output, self._scale)

    def _recast(self, dtype: torch.dtype) -> None:
        self._a, self._b = self._a.to(dtype), self._b.to(dtype)
        self._scale = None if self._scale is None else self._scale.to(dtype)
        self._shift = None if self._shift is None else self._shift.to(dtype)
