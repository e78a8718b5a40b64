"""From a trial's parameters to edits on the model: which module, which direction, which coeff, which factors.

Prepares each module once for all directions; after that no trial of the exact representation reads a weight. Modules for
which there is no room are parked in main memory, or on a CPU prepared again in each trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf

import torch
from torch import Tensor

from abliterate.directions import Blend, Directions
from abliterate.edits import EditMethod, Factors, Prepared, SvdMemo, edit_method, prepare, svd_factors
from abliterate.errors import InputError
from abliterate.model.architectures import Target
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.experts import is_fused
from abliterate.model.weights import dense_weight, place_of
from abliterate.settings.schema import EditSettings
from abliterate.types import TrialParams

# (module, direction index, coeff): with mode, rank and directions fixed for a run, equal keys mean equal factors.
EditKey = tuple[str, float, float]


class Editor:
    """Applies trials to `adapters`' modules. `clear` gives the base model back.

    `room`: bytes that prepared modules may take where their weights are; what is left of it is for others to use. Those
    that come first have it: trials use all modules in the same order, so keeping the last used ones would find none.
    `weight_of`: where a target's W comes from, the model itself unless it has none.

    Raises:
        InputError: fused experts, whose edits the settings want decomposed.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        directions: Directions,
        settings: EditSettings,
        adapters: EditHooks,
        memo: SvdMemo,
        room: float = inf,
        weight_of: Callable[[Target], Tensor] = lambda target: dense_weight(target.module),
    ) -> None:
        self._targets = tuple(targets)
        if settings.representation == "svd" and settings.mode == "full":
            _refuse_stacks(self._targets)
        self._by_name = {target.name: target for target in targets}
        self.directions = directions
        self._settings = settings
        self._method: EditMethod = edit_method(settings.mode)
        self.adapters = adapters
        self.memo = memo
        self.room = room
        self._weight_of = weight_of
        self._prepared: dict[str, Prepared] = {}
        self._tables: dict[torch.device, Tensor] = {}  # directions (n_layers, d_model) float64
        self.parked: set[str] = set()
        self.unprepared: set[str] = set()

    def prepare(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Prepare every module now, so that the first trials cost what later ones do."""
        for index, target in enumerate(self._targets):
            self._prepare(target)
            progress(index + 1, len(self._targets))

    def apply(self, params: TrialParams) -> None:
        """Put exactly the trial's edits on the model."""
        keys = self.plan(params)
        self.adapters.apply({name: (key, partial(self._factors, key)) for name, key in keys.items()})

    def apply_exactly(self, params: TrialParams) -> None:
        """`apply` by the exact factors whatever the representation: a decomposition of every module is dear.

        Only until the next `clear`: an edit's key doesn't tell its representation.
        """
        keys = self.plan(params)
        self.clear()
        self.adapters.apply({name: (key, partial(self._exact, key)) for name, key in keys.items()})

    def suspend(self) -> None:
        """The base model again, bit for bit; factors that the next trial shares with this one need not be written again."""
        self.adapters.suspend()

    def clear(self) -> None:
        """The base model again; nothing of the edits is kept."""
        self.adapters.clear()

    def factors(self, params: TrialParams) -> dict[str, Factors]:
        """{module: factors} of a trial, as they are applied; modules that are off are left out."""
        return {name: self._factors(key) for name, key in self.plan(params).items()}

    def plan(self, params: TrialParams) -> dict[str, EditKey]:
        """{module: key} of the modules a trial edits: λ ≠ 0 (after the grid) and a direction that isn't zero."""
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
        """The lowest layer that each trial edits; those that edit nothing are left out."""
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
        found = self._prepare(self._by_name[name])
        return found.fetched(blend) if name in self.parked else (found, blend)

    def _prepare(self, target: Target) -> Prepared:
        found = self._prepared.get(target.name)
        if found is None:
            device, _ = place_of(target.module)
            if device.type in ("mps", "meta"):  # one has no float64, the other no weights: they are read from elsewhere
                device = torch.device("cpu")
            found = prepare(self._method, lambda: self._weight_of(target).to(device), self._table(device))
            self._keep(target.name, found, device)
            found = self._prepared.get(target.name, found)
        return found

    def _keep(self, name: str, prepared: Prepared, device: torch.device) -> None:
        if prepared.nbytes <= self.room:
            self.room -= prepared.nbytes
            self._prepared[name] = prepared
        elif _has_own_memory(device):
            self.parked.add(name)
            self._prepared[name] = prepared.parked()
        else:
            self.unprepared.add(name)

    def _table(self, device: torch.device) -> Tensor:
        """All layers' directions (n_layers, d_model) float64, one tensor for all modules on a device."""
        if device not in self._tables:
            self._tables[device] = self.directions.by_layer().to(device).double()
        return self._tables[device]


def _refuse_stacks(targets: Sequence[Target]) -> None:
    """One decomposition for each expert of each layer and trial would take hours."""
    name = next((target.name for target in targets if is_fused(target.module)), "")
    if name:
        raise InputError(
            f"The svd representation can't express edits of the fused experts in {name}; use --set edit.representation=exact, "
            "or name the modules to edit without them by --set load.components."
        )


def _has_own_memory(device: torch.device) -> bool:
    return device.type != "cpu"


def _snap(value: float, grid: float) -> float:
    return round(value / grid) * grid if grid > 0 else value
