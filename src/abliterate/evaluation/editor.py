"""From a trial's parameters to edits on the model: which module, which direction, which coeff, which factors.

Prepares each module once for all directions; after that no trial of the exact representation reads a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from abliterate.directions import Blend, Directions
from abliterate.edits import EditMethod, Factors, Prepared, SvdMemo, edit_method, svd_factors
from abliterate.model.adapters import AdapterSet
from abliterate.model.architectures import Target
from abliterate.model.weights import dense_weight
from abliterate.settings import EditSettings
from abliterate.types import TrialParams

# (module, direction index, coeff): with mode, rank and directions fixed for a run, equal keys mean equal factors.
EditKey = tuple[str, float, float]


class Editor:
    """Applies trials to `adapters`' modules. `clear` gives the base model back."""

    def __init__(
        self,
        targets: Sequence[Target],
        directions: Directions,
        settings: EditSettings,
        adapters: AdapterSet,
        memo: SvdMemo,
    ) -> None:
        self._targets = tuple(targets)
        self._directions = directions
        self._settings = settings
        self._method: EditMethod = edit_method(settings.mode)
        self.adapters = adapters
        self.memo = memo
        self._prepared: dict[str, Prepared] = {}

    def prepare(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Prepare every module now, so that the first trials cost what later ones do."""
        for index, target in enumerate(self._targets):
            self._prepare(target)
            progress(index + 1, len(self._targets))

    def apply(self, params: TrialParams) -> None:
        """Put exactly the trial's edits on the model."""
        keys = self.plan(params)
        makers = {target.name: self._maker(target, keys[target.name]) for target in self._targets if target.name in keys}
        self.adapters.apply({name: (keys[name], make) for name, make in makers.items()})

    def clear(self) -> None:
        """The base model again."""
        self.adapters.clear()

    def factors(self, params: TrialParams) -> dict[str, Factors]:
        """{module: factors} of a trial, as they are applied; modules that are off are left out."""
        keys = self.plan(params)
        return {target.name: self._factors(target, keys[target.name]) for target in self._targets if target.name in keys}

    def plan(self, params: TrialParams) -> dict[str, EditKey]:
        """{module: key} of the modules a trial edits: λ ≠ 0 (after the grid) and a direction that isn't zero."""
        keys: dict[str, EditKey] = {}
        for target in self._targets:
            coeff = _snap(params.kernels[target.component].coeff(target.layer), self._settings.coeff_grid)
            index = float(target.layer)
            if params.scope == "global":
                index = min(_snap(params.direction_index, self._settings.direction_grid), self._directions.n_layers - 1.0)
            if coeff != 0 and not self._directions.blend(index).is_zero:
                keys[target.name] = (target.name, index, coeff)
        return keys

    def first_layers(self, trials: Sequence[TrialParams]) -> list[int]:
        """The lowest layer that each trial edits; those that edit nothing are left out."""
        layer_of = {target.name: target.layer for target in self._targets}
        plans = [self.plan(params) for params in trials]
        return [min(layer_of[name] for name in plan) for plan in plans if plan]

    def _maker(self, target: Target, key: EditKey) -> Callable[[], Factors]:
        return lambda: self._factors(target, key)

    def _factors(self, target: Target, key: EditKey) -> Factors:
        name, index, coeff = key
        blend: Blend = self._directions.blend(index)
        prepared = self._prepare(target)
        if self._settings.representation == "exact":
            return self._method.factors(prepared, blend, coeff)
        return svd_factors(self._method, prepared, blend, coeff, name, self._settings.rank, self.memo)

    def _prepare(self, target: Target) -> Prepared:
        found = self._prepared.get(target.name)
        if found is None:
            device = dense_weight(target.module).device
            if device.type == "mps":  # has no float64
                device = torch.device("cpu")
            directions = self._directions.by_layer().to(device)
            found = self._method.prepare(lambda: dense_weight(target.module).to(device), directions)
            self._prepared[target.name] = found
        return found


def _snap(value: float, grid: float) -> float:
    return round(value / grid) * grid if grid > 0 else value
