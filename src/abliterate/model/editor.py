"""The editor turns a trial's parameters into edits on the model: for each module a direction, a coeff and factors.

It prepares each module once for all directions; after that no trial of the exact representation reads a weight. Prepared
modules beyond the budget are offloaded to main memory, or on a CPU prepared again in each trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import torch
from torch import Tensor

from abliterate.directions import Blend, Directions
from abliterate.edits import EditMethod, Factors, Prepared, SvdMemo, edit_method, prepare, scales_rows, svd_factors
from abliterate.errors import InputError
from abliterate.model.architectures import Target
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.experts import is_fused
from abliterate.model.weights import dense_weight, device_and_dtype
from abliterate.settings.schema import EditSettings
from abliterate.types import TrialParams

# (module, direction index, coeff). Mode, rank and directions are fixed for a run, so equal keys mean equal factors.
EditKey = tuple[str, float, float]


class Editor:
    """Applies trials to the modules of `hooks`. `clear` gives the base model back.

    `budget_bytes` is the memory that prepared modules may take beside their weights; whatever remains of it is for others to
    use. First come, first served: every trial visits the modules in the same order, so an LRU cache smaller than the model
    would never hit. `weight_of` gives a target's W; by default it reads the model itself.

    Raises:
        InputError: the model has fused experts, and the settings ask for the svd representation.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        directions: Directions,
        settings: EditSettings,
        hooks: EditHooks,
        memo: SvdMemo,
        budget_bytes: float = inf,
        weight_of: Callable[[Target], Tensor] = lambda target: dense_weight(target.module),
    ) -> None:
        self._targets = tuple(targets)
        if settings.representation == "svd" and scales_rows(edit_method(settings.mode)):
            _refuse_fused_experts(self._targets)
        self._by_name = {target.name: target for target in targets}
        self.directions = directions
        self._settings = settings
        self._method: EditMethod = edit_method(settings.mode)
        self.hooks = hooks
        self.memo = memo
        self.budget_bytes = budget_bytes
        self._weight_of = weight_of
        self._prepared: dict[str, Prepared] = {}
        self._tables: dict[torch.device, Tensor] = {}  # directions (n_layers, d_model) float64
        self.offloaded: set[str] = set()
        self.unprepared: set[str] = set()

    def prepare(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Prepare every module now, so that the first trials cost no more than later trials."""
        for index, target in enumerate(self._targets):
            self._prepare(target)
            progress(index + 1, len(self._targets))

    def apply(self, params: TrialParams) -> None:
        """Put exactly the trial's edits on the model."""
        keys = self.plan(params)
        self.hooks.apply({name: (key, partial(self._factors, key)) for name, key in keys.items()})

    def apply_exactly(self, params: TrialParams) -> None:
        """`apply` with the exact factors whatever the representation, because decomposing every module is expensive.

        It holds until the next `clear`, since an edit's key doesn't contain its representation.
        """
        keys = self.plan(params)
        self.clear()
        self.hooks.apply({name: (key, partial(self._exact, key)) for name, key in keys.items()})

    def suspend(self) -> None:
        """The base model again, bit for bit; factors that the next trial shares with this one need not be written again."""
        self.hooks.suspend()

    def clear(self) -> None:
        """Give the base model back, and forget the factors."""
        self.hooks.clear()

    def factors(self, params: TrialParams) -> dict[str, Factors]:
        """{module: factors} of a trial as they are applied; modules that are off are left out."""
        return {name: self._factors(key) for name, key in self.plan(params).items()}

    def plan(self, params: TrialParams) -> dict[str, EditKey]:
        """{module: key} of the modules that a trial edits: λ ≠ 0 (after the grid) and a nonzero direction."""
        keys: dict[str, EditKey] = {}
        for target in self._targets:
            coeff = _snap(params.kernels[target.component].coeff(target.layer), self._settings.coeff_grid)
            index = float(target.layer)
            if params.scope == "global":
                index = min(_snap(params.direction_index, self._settings.direction_grid), self.directions.n_layers - 1.0)
            if coeff != 0 and not self.directions.blend(index).is_zero:
                keys[target.name] = (target.name, index, coeff)
        return keys

    def first_layers(self, trials: Sequence[TrialParams]) -> list[int]:
        """The lowest layer that each trial edits; trials that edit nothing are left out."""
        plans = [self.plan(params) for params in trials]
        return [min(self._by_name[name].layer for name in plan) for plan in plans if plan]

    def _exact(self, key: EditKey) -> Factors:
        name, index, coeff = key
        return self._method.factors(*self._prepared_for(name, self.directions.blend(index)), coeff)

    def _factors(self, key: EditKey) -> Factors:
        if self._settings.representation == "exact":
            return self._exact(key)
        name, index, coeff = key
        prepared, blend = self._prepared_for(name, self.directions.blend(index))
        return svd_factors(self._method, prepared, blend, coeff, name, self._settings.rank, self.memo)

    def _prepared_for(self, name: str, blend: Blend) -> tuple[Prepared, Blend]:
        prepared = self._prepare(self._by_name[name])
        return prepared.fetched(blend) if name in self.offloaded else (prepared, blend)

    def _prepare(self, target: Target) -> Prepared:
        prepared = self._prepared.get(target.name)
        if prepared is None:
            device, _ = device_and_dtype(target.module)
            if device.type in ("mps", "meta"):  # mps has no float64; meta has no weights, so they are read from elsewhere
                device = torch.device("cpu")
            prepared = prepare(self._method, lambda: self._weight_of(target).to(device), self._table(device))
            self._keep(target.name, prepared, device)
            prepared = self._prepared.get(target.name, prepared)
        return prepared

    def _keep(self, name: str, prepared: Prepared, device: torch.device) -> None:
        if prepared.nbytes <= self.budget_bytes:
            self.budget_bytes -= prepared.nbytes
            self._prepared[name] = prepared
        elif _has_own_memory(device):
            self.offloaded.add(name)
            self._prepared[name] = prepared.parked()
        else:
            self.unprepared.add(name)

    def _table(self, device: torch.device) -> Tensor:
        """All layers' directions (n_layers, d_model) float64; all modules on a device share one tensor."""
        if device not in self._tables:
            self._tables[device] = self.directions.by_layer().to(device).double()
        return self._tables[device]


def _refuse_fused_experts(targets: Sequence[Target]) -> None:
    """Raise InputError for fused experts: one decomposition per expert, layer and trial would take hours."""
    name = next((target.name for target in targets if is_fused(target.module)), "")
    if name:
        raise InputError(
            f"The svd representation can't express edits of the fused experts in {name}; use --set edit.representation=exact, "
            "or leave them out of the modules to edit with --set load.components."
        )


def _has_own_memory(device: torch.device) -> bool:
    return device.type != "cpu"


def _snap(value: float, grid: float) -> float:
    return round(value / grid) * grid if grid > 0 else value
