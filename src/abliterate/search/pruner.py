"""The pruner decides when a trial can no longer reach the front, so that its remaining prompts are skipped.

The rule and its proof are in docs/design.md §5.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from abliterate.objectives import DEFAULT, Vector, least_vector, vector
from abliterate.types import Baseline, Objective, Trial


@dataclass(frozen=True)
class DominancePruner:
    """Prunes a trial that a finished point weakly dominates.

    `points` are the costs (by default mean KL and unanswered prompts) of the baseline and of all complete trials.
    """

    points: tuple[Vector, ...]
    objectives: tuple[Objective, ...] = DEFAULT

    @staticmethod
    def of(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> DominancePruner:
        """The pruner after `trials`. Only complete trials count: each pruned trial is dominated by one of them."""
        complete = [vector(trial, objectives) for trial in trials if trial.state == "complete"]
        return DominancePruner((least_vector(baseline, objectives), *complete), tuple(objectives))

    @staticmethod
    def never(objectives: Sequence[Objective] = DEFAULT) -> DominancePruner:
        """A pruner that prunes nothing."""
        return DominancePruner((), tuple(objectives))

    def limit(self, known: Mapping[str, float], count: str) -> int | None:
        """r*: the least count among points that are no worse in every known objective; a trial that reaches it is dominated.

        `known` maps scorers to the trial's values; `count` names the scorer whose count is minimized and still open. None means
        that nothing can be proved: no point is as good, `count` isn't a minimized objective, or another objective is open too.

        The limit depends only on the trial's values and the finished points, so which trials are pruned depends on neither
        the order of the prompts nor the batch size.
        """
        names = [objective.name for objective in self.objectives]
        if Objective(count, "minimize") not in self.objectives or set(names) - {*known, count}:
            return None
        index = names.index(count)
        costs = [
            math.inf if objective.name == count else objective.cost(known[objective.name]) for objective in self.objectives
        ]
        counts = [point[index] for point in self.points if all(mine <= cost for mine, cost in zip(point, costs, strict=True))]
        return int(min(counts)) if counts else None
