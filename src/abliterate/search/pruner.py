"""When a trial can't reach the front any more (DESIGN §5.3). Pure: knows no model and no prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from abliterate.objectives import DEFAULT, Vector, least_vector, vector
from abliterate.types import Baseline, Objective, Trial


@dataclass(frozen=True)
class DominancePruner:
    """`points`: the costs (by default mean KL, refusals) of everything that is finished, the baseline among it."""

    points: tuple[Vector, ...]
    objectives: tuple[Objective, ...] = DEFAULT

    @staticmethod
    def of(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> DominancePruner:
        """From complete trials. A stopped one adds nothing: a complete one that is no worse in anything proved it hopeless."""
        complete = [vector(trial, objectives) for trial in trials if trial.state == "complete"]
        return DominancePruner((least_vector(baseline, objectives), *complete), tuple(objectives))

    @staticmethod
    def never(objectives: Sequence[Objective] = DEFAULT) -> DominancePruner:
        """One that stops nothing."""
        return DominancePruner((), tuple(objectives))

    def limit(self, known: Mapping[str, float], count: str) -> int | None:
        """r*: the least count of points that are no worse in all that is `known`; a trial that reaches it is weakly dominated.

        `known`: values by scorer; `count`: the scorer whose count is minimized and still open. None: nothing can be said, since
        no point is as good, or the count is no such objective, or another objective is open, too.

        Depends on the trial's values and the finished points alone, so which trials are stopped depends on neither
        the order of the prompts nor the batch size.
        """
        names = [one.name for one in self.objectives]
        if Objective(count, "minimize") not in self.objectives or set(names) - {*known, count}:
            return None
        place = names.index(count)
        costs = [math.inf if one.name == count else one.cost(known[one.name]) for one in self.objectives]
        as_good = [point[place] for point in self.points if all(mine <= cost for mine, cost in zip(point, costs, strict=True))]
        return int(min(as_good)) if as_good else None
