"""The search space: the parameters of a trial and their ranges."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import optuna

from abliterate.objectives import DEFAULT
from abliterate.settings.schema import SearchSettings
from abliterate.types import Kernel, Objective, Range, Sense, TrialParams

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Suggests(Protocol):
    """What suggests the value of a parameter: an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A value in [low, high], on a logarithmic scale if so."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number in [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        """One of the choices."""


@dataclass(frozen=True)
class _Draws:
    """Suggests uniformly distributed values, a hundred times as fast as trials of a random study, which keep a record."""

    random: random.Random

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return math.exp(self.random.uniform(math.log(low), math.log(high))) if log else self.random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return min(high, int(self.suggest_float(name, low, high + 1, log=log)))

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        return self.random.choice(choices)


@dataclass(frozen=True)
class Space:
    """The search space of one model: its `n_layers` and components, the settings' ranges, and the objectives.

    `extra` has the ranges of the numbers that the direction and the edit method ask for, by name.
    """

    settings: SearchSettings
    n_layers: int
    components: tuple[str, ...]
    objectives: tuple[Objective, ...] = DEFAULT
    extra: Mapping[str, Range] = field(default_factory=dict)

    @property
    def goals(self) -> list[Sense]:
        """The objectives' goals as Optuna names them."""
        return [objective.goal for objective in self.objectives]

    def suggest(self, trial: Suggests) -> TrialParams:
        """Ask for every parameter, used or not, because multivariate TPE needs a fixed space."""
        last, ranges = float(self.n_layers - 1), self.settings
        scope = trial.suggest_categorical("scope", ["global", "per layer"])
        low, high = ranges.direction_index
        index = trial.suggest_float("direction_index", low * last, high * last)
        kernels = {component: self._kernel(trial, component, last) for component in self.components}
        extra = {name: _suggest(trial, name, wanted) for name, wanted in self.extra.items()}
        return TrialParams(scope, index, kernels, extra)  # type: ignore[arg-type]

    def samples(self, count: int, seed: int) -> list[TrialParams]:
        """Random points of the space, distributed as the startup trials are."""
        draws = _Draws(random.Random(seed))
        return [self.suggest(draws) for _ in range(count)]

    def upper_half(self) -> TrialParams:
        """An edit that certainly has an effect and leaves the lower layers alone."""
        last = self.n_layers - 1
        kernel = Kernel(max_coeff=1.0, position=0.75 * last, min_coeff=0.5, distance=max(1.0, 0.3 * last))
        extra = {name: wanted.high for name, wanted in self.extra.items()}
        return TrialParams("per layer", 0.6 * last, dict.fromkeys(self.components, kernel), extra)

    def _kernel(self, trial: Suggests, component: str, last: float) -> Kernel:
        ranges = self.settings
        coeff_range = ranges.max_coeff.get(component, ranges.max_coeff["default"])
        # Values below 0 are clamped, which gives "off" a real probability.
        max_coeff = max(0.0, trial.suggest_float(f"{component}.max_coeff", *coeff_range))
        low, high = ranges.position
        position = trial.suggest_float(f"{component}.position", low * last, high * last)
        fraction = trial.suggest_float(f"{component}.min_fraction", *ranges.min_fraction)
        distance = trial.suggest_float(f"{component}.distance", 1.0, max(1.0, ranges.distance * last))
        return Kernel(max_coeff, position, fraction * max_coeff, distance, ranges.kernel)


def _suggest(trial: Suggests, name: str, wanted: Range) -> float:
    if wanted.whole:
        return trial.suggest_int(name, int(wanted.low), int(wanted.high), log=wanted.log)
    return trial.suggest_float(name, wanted.low, wanted.high, log=wanted.log)
