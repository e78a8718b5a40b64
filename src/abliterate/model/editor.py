"""The editor turns a trial's parameters into edits on the model: for each module a direction, a coeff and factors.

It prepares each module once for all directions; after that no trial of the exact representation reads a weight. Prepared
modules beyond the budget are offloaded to main memory, or on a CPU prepared again in each trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf

import torch
from torch import Tensor

from abliterate.directions import Blend, Directions, unit_rows
from abliterate.edits import (
    EditMethod,
    Factors,
    Prepared,
    SvdMemo,
    edit_method,
    exact_factors,
    is_learned,
    is_low_rank,
    needs_inputs,
    parameters_of,
    prepare,
    reading_method,
    svd_factors,
)
from abliterate.errors import InputError
from abliterate.model.architectures import Target
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.experts import is_fused
from abliterate.model.inputs import refuse_uncaptured
from abliterate.model.weights import dense_weight, device_and_dtype, in_features
from abliterate.settings.schema import EditSettings
from abliterate.types import Params, RefinedParams, TrialParams, weight_name

# (module, its directions, their coeffs); the directions are a layer position, or the hash of the file of refined directions.
# Mode, rank and directions are fixed for a run, so equal keys mean equal factors.
EditKey = tuple[str, float | str, tuple[float, ...]]
# The directions {module: v (d_model) float32} of refined parameters; several are (k, d_model), and their norms their weights.
RefinedDirections = Callable[[RefinedParams], Mapping[str, Tensor]]


def _no_directions(params: RefinedParams) -> Mapping[str, Tensor]:
    raise InputError(f"The directions of a refined trial ({params.file}) aren't here; use its run's own directory.")


class Editor:
    """Applies trials to the modules of `hooks`. `clear` gives the base model back.

    `budget_bytes` is the memory that prepared modules may take beside their weights; whatever remains of it is for others to
    use. First come, first served: every trial visits the modules in the same order, so an LRU cache smaller than the model
    would never hit. `weight_of` gives a target's W; by default it reads the model itself. `refined` gives the directions of
    refined parameters, whose modules are prepared in each trial, because their directions are their own.

    Raises:
        InputError: the model has fused experts, and the settings ask for the svd representation, or for a mode that needs the
            inputs of modules; or the directions lack the weights of a norm that a module reads through.
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
        refined: RefinedDirections = _no_directions,
    ) -> None:
        self._targets = tuple(targets)
        self._method: EditMethod = edit_method(settings.mode)
        self._reading = reading_method(self._method) if any(target.reads for target in self._targets) else self._method
        if settings.representation == "svd" and not is_low_rank(self._method):
            _refuse_fused_experts(self._targets)
        if needs_inputs(self._method):
            refuse_uncaptured(self._targets, settings.mode)
        _refuse_without_gains(self._targets, directions)
        self._by_name = {target.name: target for target in targets}
        self.directions = directions
        self._settings = settings
        self._own_methods: dict[str, EditMethod | None] = {}  # of modules, where edits are computed from their inputs
        self.hooks = hooks
        self.memo = memo
        self.budget_bytes = budget_bytes
        self._weight_of = weight_of
        self._refined = refined
        self._prepared: dict[str, Prepared] = {}
        self._tables: dict[tuple[torch.device, int | None, str], Tensor] = {}  # directions (n_layers, d_model) float64
        self.offloaded: set[str] = set()
        self.unprepared: set[str] = set()

    def prepare(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Prepare every module now, so that the first trials cost no more than later trials."""
        for index, target in enumerate(self._targets):
            if self.method_of(target) is not None:
                self._prepare(target)
            progress(index + 1, len(self._targets))

    def apply(self, params: Params) -> None:
        """Put exactly the trial's edits on the model."""
        keys, numbers = self.plan(params), self._numbers(params)
        self.hooks.apply({name: ((key, numbers), partial(self._factors, params, key)) for name, key in keys.items()})

    def apply_exactly(self, params: Params) -> None:
        """`apply` with the exact factors whatever the representation, because decomposing every module is expensive.

        It holds until the next `apply` or `clear`.
        """
        keys = self.plan(params)
        self.clear()
        self.hooks.apply({name: (key, partial(self._exact, params, key)) for name, key in keys.items()})

    def suspend(self) -> None:
        """The base model again, bit for bit; factors that the next trial shares with this one need not be written again."""
        self.hooks.suspend()

    def clear(self) -> None:
        """Give the base model back, and forget the factors."""
        self.hooks.clear()

    def factors(self, params: Params) -> dict[str, Factors]:
        """{module: factors} of a trial as they are applied; modules that are off are left out."""
        return {name: self._factors(params, key) for name, key in self.plan(params).items()}

    def plan(self, params: Params) -> dict[str, EditKey]:
        """{module: key} of the modules that a trial edits: λ ≠ 0 (after the grid) and a nonzero direction, if it uses any."""
        return dict(self._edits(params, self._targets))

    def _edits(self, params: Params, targets: Sequence[Target]) -> Iterator[tuple[str, EditKey]]:
        """(module, key) of those of the targets that a trial edits, in their order."""
        if isinstance(params, RefinedParams):  # neither grid applies to what gradients found
            named = {target.name: params.coeffs.get(target.name, 0.0) for target in targets if self.method_of(target)}
            yield from ((name, (name, params.sha256, (coeff,))) for name, coeff in named.items() if coeff != 0)
            return
        for target in targets:
            coeff = params.kernels[target.component].coeff(target.layer)
            index = float(target.layer)
            if params.scope == "global":
                index = min(_snap(params.direction_index, self._settings.direction_grid), self.directions.n_layers - 1.0)
            weights = [params.extra.get(weight_name(place), 1.0) for place in range(self.directions.count)]
            coeffs = tuple(_snap(coeff * weight, self._settings.coeff_grid) for weight in weights)
            if any(coeffs) and self._removed(index, coeffs, target) and self.method_of(target) is not None:
                yield target.name, (target.name, index, coeffs)

    def method_of(self, target: Target) -> EditMethod | None:
        """The edit method for a module, without a trial's numbers; None if the module's inputs allow no edit.

        Raises:
            InputError: the method needs the module's inputs, and the directions come without them or with another model's.
        """
        if not needs_inputs(self._method):
            return self._reading if target.reads else self._method
        if target.name not in self._own_methods:
            inputs = self.directions.inputs.get(target.name)
            if inputs is None or inputs.d_in != in_features(target.module):
                raise InputError(
                    f"The edit mode {self._method.name!r} needs the inputs of {target.name}, and these directions come without "
                    "them; take those of find_directions or of the run, give your own to search, or --set edit.mode=full."
                )
            self._own_methods[target.name] = self._method.of(inputs)
        return self._own_methods[target.name]

    def method(self, params: Params, key: EditKey) -> EditMethod:
        """The edit method for one edit in a trial's plan, with the trial's numbers."""
        method = self.method_of(self._by_name[key[0]])
        assert method is not None, "a plan has no module without a method"
        numbers = self._numbers(params)
        return method.at(dict(numbers)) if numbers else method

    @property
    def unedited(self) -> list[str]:
        """The modules whose inputs allow no edit."""
        return [target.name for target in self._targets if self.method_of(target) is None]

    def _numbers(self, params: Params) -> tuple[tuple[str, float], ...]:
        """The numbers that the edit method has asked the search for, by name, as a part of a key.

        Raises:
            InputError: the trial lacks one, or it lies outside of its range.
        """
        ranges = parameters_of(self._method)
        given = params.extra if isinstance(params, TrialParams) else {}
        for name, wanted in ranges.items():
            if name not in given or not wanted.low <= given[name] <= wanted.high:
                raise InputError(
                    f"The trial has no {name} from {wanted.low:g} to {wanted.high:g}, as the edit mode {self._method.name!r} "
                    "needs it; put the run's own files back, or make a new run."
                )
        return tuple((name, given[name]) for name in ranges)

    def vectors(self, params: Params, key: EditKey) -> tuple[Tensor, tuple[float, ...]]:
        """The directions V (k, d_model) float64 that one edit in a trial's plan removes, and the coeff of each.

        Raises:
            InputError: refined directions are missing, or are of a model of another size.
        """
        name, place, coeffs = key
        if isinstance(params, TrialParams):
            target = self._by_name[name]
            table = self.directions.table(target.stream_layer, target.norm).double()
            kept = self._removed(float(place), coeffs, target)
            return torch.stack([blend.of(table) for blend, _ in kept]), tuple(coeff for _, coeff in kept)
        v, d_model = self._refined(params)[name], self.directions.d_model
        if v.shape[-1] != d_model:
            raise InputError(
                f"The refined directions ({params.file}) have {v.shape[-1]} entries, and the model's hidden states {d_model}; "
                "put the run's own file back, or choose another trial."
            )
        if v.ndim == 1:
            return v[None].double(), coeffs
        unit, weights = unit_rows(v.double())
        return unit, tuple((coeffs[0] * weights).tolist())

    def _removed(self, x: float, coeffs: Sequence[float], target: Target) -> list[tuple[Blend, float]]:
        """The directions at position `x` for a module, each with its coeff, but for zero ones and coeffs of 0.

        A method that finds edits without directions is given zero ones, too.
        """
        pairs = zip(self.directions.blends(x, target.stream_layer, target.norm), coeffs, strict=True)
        uses_any = not is_learned(self._method)
        return [(blend, coeff) for blend, coeff in pairs if coeff != 0 and not (uses_any and blend.is_zero)]

    def first_layers(self, trials: Sequence[Params]) -> list[int]:
        """The lowest layer that each trial edits; trials that edit nothing are left out."""
        upwards = sorted(self._targets, key=lambda target: target.layer)
        first = [next(self._edits(params, upwards), None) for params in trials]
        return [self._by_name[found[0]].layer for found in first if found is not None]

    def _exact(self, params: Params, key: EditKey) -> Factors:
        found = exact_factors(self.method(params, key), *self._prepared_for(params, key))
        return found.transposed() if self.reads(key) else found

    def _factors(self, params: Params, key: EditKey) -> Factors:
        if self._settings.representation == "exact":
            return self._exact(params, key)
        prepared, rank = self._prepared_for(params, key), self._settings.rank
        found = svd_factors(self.method(params, key), *prepared, key[0], rank, self.memo, self._numbers(params))
        return found.transposed() if self.reads(key) else found

    def reads(self, key: EditKey) -> bool:
        """Whether an edit in a plan is of a module that reads the residual stream."""
        return self._by_name[key[0]].reads

    def _read(self, target: Target, device: torch.device) -> Tensor:
        """W of a module that writes, and Wᵀ of one that reads: a matrix with a row for each entry of the residual stream."""
        weight = self._weight_of(target).to(device)
        return weight.T if target.reads else weight

    def _prepared_for(self, params: Params, key: EditKey) -> tuple[Prepared, Sequence[Blend], Sequence[float]]:
        """The module's products with its directions or with all layers', the blends that give its own, and their coeffs."""
        name, place, coeffs = key
        target = self._by_name[name]
        if isinstance(params, RefinedParams):
            device = _device_of(target)
            own, coeffs = self.vectors(params, key)
            alone = [Blend((index,), (1.0,)) for index in range(len(own))]
            own = own.to(device)
            return prepare(self.method(params, key), lambda: self._read(target, device), own), alone, coeffs
        prepared = self._prepare(target)
        kept = self._removed(float(place), coeffs, target)
        blends: Sequence[Blend] = [blend for blend, _ in kept]
        if name in self.offloaded:
            prepared, blends = prepared.fetched(blends)
        return prepared, blends, [coeff for _, coeff in kept]

    def _prepare(self, target: Target) -> Prepared:
        prepared = self._prepared.get(target.name)
        if prepared is None:
            device = _device_of(target)
            method = self.method_of(target)
            assert method is not None, "a plan has no module without a method"
            prepared = prepare(method, lambda: self._read(target, device), self._table(device, target))
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

    def _table(self, device: torch.device, target: Target) -> Tensor:
        """All layers' directions (n_layers · count, d_model) float64 as the module needs them (`Directions.table`).

        All modules on a device that need the same share one tensor.
        """
        key = (device, None if self.directions.harmless is None else target.stream_layer, target.norm)
        if key not in self._tables:
            self._tables[key] = self.directions.table(target.stream_layer, target.norm).to(device).double()
        return self._tables[key]


def _refuse_fused_experts(targets: Sequence[Target]) -> None:
    """Raise InputError for fused experts: one decomposition per expert, layer and trial would take hours."""
    name = next((target.name for target in targets if is_fused(target.module)), "")
    if name:
        raise InputError(
            f"The svd representation can't express edits of the fused experts in {name}; use --set edit.representation=exact, "
            "or leave them out of the modules to edit with --set load.components."
        )


def _refuse_without_gains(targets: Sequence[Target], directions: Directions) -> None:
    """Raise InputError if the directions come without the weights of a norm that a module reads through."""
    name = next((target.norm for target in targets if target.norm and target.norm not in directions.gains), "")
    if name:
        raise InputError(
            f"These directions come without the weights of {name}, through which modules read the residual stream; take the "
            "directions that find_directions gives, or those of the run itself."
        )


def _device_of(target: Target) -> torch.device:
    """The device on which a module is prepared: mps has no float64, and meta no weights, so they are read from elsewhere."""
    device, _ = device_and_dtype(target.module)
    return torch.device("cpu") if device.type in ("mps", "meta") else device


def _has_own_memory(device: torch.device) -> bool:
    return device.type != "cpu"


def _snap(value: float, grid: float) -> float:
    return round(value / grid) * grid if grid > 0 else value
