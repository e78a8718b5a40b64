"""The search space: the parameters of a trial and their ranges."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna

from abliterate.objectives import DEFAULT
from abliterate.settings.schema import Interval, SearchSettings
from abliterate.types import Kernel, Objective, Range, Sense, TrialParams, number

optuna.logging.set_verbosity(optuna.logging.WARNING)
# Names of parameters; those with a point follow the name of a component.
_SCOPE, _INDEX = "scope", "direction_index"
_MAX_COEFF, _POSITION, _FRACTION, _DISTANCE = ".max_coeff", ".position", ".min_fraction", ".distance"


class Suggests(Protocol):
    """What suggests the value of a parameter: an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A value in [low, high], on a logarithmic scale if so."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""


Value = float | str


@dataclass(frozen=True)
class _Draws:
    """Suggests the values at given points of [0, 1) by name, a hundred times as fast as a random study, which keeps a record.

    Layer positions are drawn in proportion to the weights `prior` of the layers, if there are any. `values` are all suggested.
    """

    uniform: Callable[[str], float]
    prior: Sequence[float] = ()
    values: dict[str, Value] = field(default_factory=dict)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        u = self.uniform(name)
        if self.prior and (name == _INDEX or name.endswith(_POSITION)):
            value = layer_quantile(u, low, high, self.prior)
        elif log:  # clamped, as rounding may lead beyond the ends
            value = min(high, max(low, math.exp(_between(math.log(low), math.log(high), u))))
        else:
            value = _between(low, high, u)
        self.values[name] = value
        return value

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        value = min(high, int(self.suggest_float(name, low, high + 1, log=log)))
        self.values[name] = value
        return value

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        chosen = choices[int(self.uniform(name) * len(choices))]
        self.values[name] = chosen
        return chosen


@dataclass(frozen=True)
class _Fitted:
    """Keeps of `given` values those that are parameters of the space, clamped into their ranges, as `values`."""

    given: Mapping[str, Any]
    values: dict[str, Value] = field(default_factory=dict)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name in self.given:
            self.values[name] = min(high, max(low, float(number(self.given[name]))))
        return low

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if name in self.given:
            self.values[name] = min(high, max(low, round(number(self.given[name]))))
        return low

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        if self.given.get(name) in choices:
            self.values[name] = self.given[name]
        return choices[0]


@dataclass(frozen=True)
class Space:
    """The search space of one model: its `n_layers` and components, the settings' ranges, and the objectives.

    `extra` has the ranges of the numbers that the direction and the edit method ask for, by name. `prior` are weights of the
    layers, in proportion to which random positions are drawn; empty: all are alike. `coeffs` is the
    edit method's own range of the largest coeff, if it has one: it counts where the settings have their default.
    """

    settings: SearchSettings
    n_layers: int
    components: tuple[str, ...]
    objectives: tuple[Objective, ...] = DEFAULT
    extra: Mapping[str, Range] = field(default_factory=dict)
    prior: tuple[float, ...] = ()
    coeffs: Interval | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters, in the order in which they are suggested."""
        return tuple(self.at(lambda name: 0.0))

    @property
    def goals(self) -> list[Sense]:
        """The objectives' goals as Optuna names them."""
        return [objective.goal for objective in self.objectives]

    def suggest(self, trial: Suggests) -> TrialParams:
        """Ask for every parameter, used or not, because multivariate TPE needs a fixed space."""
        last, ranges = float(self.n_layers - 1), self.settings
        scope = trial.suggest_categorical(_SCOPE, ["global", "per layer"])
        low, high = ranges.direction_index
        index = trial.suggest_float(_INDEX, low * last, high * last)
        kernels = {component: self._kernel(trial, component, last) for component in self.components}
        extra = {name: _suggest(trial, name, wanted) for name, wanted in self.extra.items()}
        return TrialParams(scope, index, kernels, extra)  # type: ignore[arg-type]

    def samples(self, count: int, seed: int) -> list[TrialParams]:
        """Random points of the space, distributed as the startup trials are."""
        source = random.Random(seed)
        draws = _Draws(lambda name: source.random(), self.prior)
        return [self.suggest(draws) for _ in range(count)]

    def at(self, uniform: Callable[[str], float]) -> dict[str, Value]:
        """The values of all parameters by name at a point, whose coordinate of each name `uniform` gives, in [0, 1)."""
        draws = _Draws(uniform, self.prior)
        self.suggest(draws)
        return draws.values

    def fitted(self, values: Mapping[str, Any]) -> dict[str, Value]:
        """Those of the values that are parameters of this space, clamped into their ranges.

        TypeError or ValueError if they are no numbers.
        """
        fitted = _Fitted(values)
        self.suggest(fitted)
        return fitted.values

    def upper_half(self) -> TrialParams:
        """An edit that certainly has an effect and leaves the lower layers alone."""
        last, (low, high) = self.n_layers - 1, self.coeffs or (1.0, 1.0)
        coeff = math.sqrt(low * high) if low > 0 else max(high / 2, 0.5)
        kernel = Kernel(max_coeff=coeff, position=0.75 * last, min_coeff=coeff / 2, distance=max(1.0, 0.3 * last))
        extra = {name: wanted.middle for name, wanted in self.extra.items()}
        return TrialParams("per layer", 0.6 * last, dict.fromkeys(self.components, kernel), extra)

    def _kernel(self, trial: Suggests, component: str, last: float) -> Kernel:
        ranges = self.settings
        whole = component.rpartition(".")[0]  # of a component for one kind of module, as `mlp.down_proj.experts`
        usual, given = SearchSettings().max_coeff, ranges.max_coeff
        if self.coeffs is not None:  # the mode's own range stands for those that nobody gave, which are another mode's
            given = {name: low_high for name, low_high in given.items() if usual.get(name) != low_high}
            given = {"default": self.coeffs} | given
        coeff_range = given.get(component) or given.get(whole) or given["default"]
        # Values below 0 are clamped, which gives "off" a real probability.
        max_coeff = max(0.0, trial.suggest_float(f"{component}{_MAX_COEFF}", *coeff_range))
        low, high = ranges.position
        position = trial.suggest_float(f"{component}{_POSITION}", low * last, high * last)
        fraction = trial.suggest_float(f"{component}{_FRACTION}", *ranges.min_fraction)
        distance = trial.suggest_float(f"{component}{_DISTANCE}", 1.0, max(1.0, ranges.distance * last))
        return Kernel(max_coeff, position, fraction * max_coeff, distance, ranges.kernel)


def _suggest(trial: Suggests, name: str, wanted: Range) -> float:
    if wanted.whole:
        return trial.suggest_int(name, int(wanted.low), int(wanted.high), log=wanted.log)
    return trial.suggest_float(name, wanted.low, wanted.high, log=wanted.log)


def values_of(params: TrialParams, scale: float = 1.0) -> dict[str, Value]:
    """The values that were suggested for parameters, by name: the inverse of `Space.suggest`.

    Positions and distances are multiplied by `scale`, for a model of another depth. A kernel that is off doesn't tell the value
    of its edge, which is left out.
    """
    values: dict[str, Value] = {_SCOPE: params.scope, _INDEX: params.direction_index * scale, **params.extra}
    for component, kernel in params.kernels.items():
        values[f"{component}{_MAX_COEFF}"] = kernel.max_coeff
        values[f"{component}{_POSITION}"] = kernel.position * scale
        values[f"{component}{_DISTANCE}"] = kernel.distance * scale
        if kernel.max_coeff:
            values[f"{component}{_FRACTION}"] = kernel.min_coeff / kernel.max_coeff
    return values


def is_coeff(name: str) -> bool:
    """Whether the value of this name is the largest coeff of a component."""
    return name.endswith(_MAX_COEFF)


def layer_quantile(u: float, low: float, high: float, weights: Sequence[float]) -> float:
    """The position in [low, high] below which a share `u` of the weight lies, where layer l weighs `weights[l]` on l ± ½.

    Weights below 0 count as 0. If none of the range weighs anything, all of it weighs the same.
    """
    last = len(weights) - 1
    edges = [low, *(layer + 0.5 for layer in range(last) if low < layer + 0.5 < high), high]
    pieces = list(itertools.pairwise(edges))
    masses = [max(0.0, weights[min(last, round((a + b) / 2))]) * (b - a) for a, b in pieces]
    if not any(masses):
        return _between(low, high, u)
    left = u * math.fsum(masses)
    for (a, b), mass in zip(pieces, masses, strict=True):
        if mass and left <= mass:
            return _between(a, b, left / mass)
        left -= mass
    return max(b for (_, b), mass in zip(pieces, masses, strict=True) if mass)  # where rounding has left a little


def _between(low: float, high: float, share: float) -> float:
    return low + share * (high - low)
