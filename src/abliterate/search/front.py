"""The Pareto front of trials, its knee and its hypervolume.

Any number of objectives; by default two, both minimized: mean KL and unanswered prompts (docs/design.md §4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from abliterate.objectives import (
    DEFAULT,
    REFUSALS,
    Vector,
    base_vector,
    counted,
    in_words,
    least_vector,
    no_worse,
    vector,
)
from abliterate.types import Baseline, Objective, Trial


def progress(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> list[float]:
    """The hypervolume after each trial.

    Except for KL and one count of prompts it is relative to this search: each objective is scaled between the best and the
    worst value of all complete trials and the baseline, and the worst value is the reference.
    """
    if counted(objectives):
        volumes = []
        front: tuple[Trial, ...] = ()
        for trial in trials:
            front = pareto_front((*front, trial), baseline, objectives)  # a trial that left the front never returns to it
            volumes.append(hypervolume(front, baseline, objectives))
        return volumes
    base = base_vector(baseline, objectives)
    costs = [vector(trial, objectives) if trial.state == "complete" else None for trial in trials]
    axes = list(zip(base, *(cost for cost in costs if cost is not None), strict=True))
    ranges = [(min(axis), (max(axis) - min(axis)) or 1.0) for axis in axes]

    def scaled(cost: Vector) -> Vector:
        return tuple((value - least) / width for value, (least, width) in zip(cost, ranges, strict=True))

    points = [scaled(base)]
    reference = (1.0,) * len(objectives)
    volumes = [volume(points, reference)]
    for cost in costs:
        gain = 0.0
        if cost is not None and not any(no_worse(point, scaled(cost)) for point in points):
            gain = _alone(scaled(cost), points, reference)
            points = [point for point in points if not no_worse(scaled(cost), point)] + [scaled(cost)]
        volumes.append(volumes[-1] + gain)
    return volumes[1:]


def volume(points: Sequence[Vector], reference: Vector) -> float:
    """The exact volume below `reference` that the points dominate: each point's box without the part that later points share.

    The method is that of While, Bradstreet and Barone, "A fast way of calculating exact hypervolumes" (2012).
    """
    front = _undominated([point for point in points if all(map(float.__lt__, point, reference))])
    if len(reference) == 2:
        return _area(front, reference)
    return sum(_alone(point, front[index + 1 :], reference) for index, point in enumerate(front))


def _alone(point: Vector, others: Sequence[Vector], reference: Vector) -> float:
    """The volume of the point's box that no other point dominates."""
    box = math.prod(end - value for value, end in zip(point, reference, strict=True))
    return box - volume([tuple(map(max, point, other)) for other in others], reference) if others else box


def _area(front: Sequence[Vector], reference: Vector) -> float:
    area, before = 0.0, reference[1]
    for x, y in front:
        area += (reference[0] - x) * (before - y)
        before = y
    return area


def _undominated(points: Sequence[Vector]) -> list[Vector]:
    """The undominated points, sorted: a dominating point precedes the points it dominates."""
    kept: list[Vector] = []
    for point in sorted(set(points)):
        if not any(no_worse(other, point) for other in kept):
            kept.append(point)
    return kept


def pareto_front(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> tuple[Trial, ...]:
    """The complete trials that neither the baseline (KL 0) nor another complete trial weakly dominates, by rising cost.

    Costs are compared in the objectives' order, so by KL first if it is an objective. Of exactly equal trials the lowest number
    stays.
    """
    complete = [(vector(trial, objectives), trial) for trial in trials if trial.state == "complete"]
    front: list[Trial] = []
    # Sorted by cost, any dominating trial precedes the ones it dominates, so comparing with the front found so far is enough.
    costs = [least_vector(baseline, objectives)]
    for cost, trial in sorted(complete, key=lambda pair: (pair[0], pair[1].number)):
        if not any(no_worse(other, cost) for other in costs):
            front.append(trial)
            costs.append(cost)
    return tuple(front)


def no_front(baseline: Baseline, objectives: Sequence[Objective]) -> str:
    """The sentence for a search whose front is empty."""
    count = counted(objectives)
    if count:
        does = "refuses fewer" if count == REFUSALS else "leaves fewer prompts unanswered"
        return (
            f"No trial {does} than the model itself ({baseline.value(count):.0f} of {baseline.prompts}); try more trials "
            "with -n, prompts closer to the behaviour with --harmful, or check the answers for refusal markers."
        )
    base = ", ".join(f"{objective.name} {baseline.value(objective.name):.4g}" for objective in objectives)
    return (
        f"No trial is better than the model itself in any of the objectives {in_words(objectives)} (it has {base}); try more "
        "trials with -n, or other objectives."
    )


def hypervolume(front: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> float:
    """The area in [0, 1] between (KL 1, share 1) and the front with the baseline as a point.

    The objectives are KL and one count of prompts.
    """
    count = counted(objectives)
    points = [(0.0, baseline.value(count) / baseline.prompts)]
    points += [(trial.kl, trial.value(count) / baseline.prompts) for trial in front]
    area, share_before = 0.0, 1.0
    for kl, share in sorted(points):
        if kl < 1 and share < share_before:
            area += (1 - kl) * (share_before - share)
            share_before = share
    return area


def knee(front: Sequence[Trial], objectives: Sequence[Objective] = DEFAULT) -> Trial:
    """The point farthest below the plane through the front's ends (for two objectives the chord), axes scaled to [0, 1]."""
    costs = [vector(trial, objectives) for trial in front]
    axes = list(zip(*costs, strict=True))
    ranges = [(min(axis), (max(axis) - min(axis)) or 1.0) for axis in axes]

    def below(cost: Vector) -> float:
        distance = 1.0
        for value, (least, width) in zip(cost, ranges, strict=True):
            distance -= (value - least) / width
        return distance

    return max(zip(costs, front, strict=True), key=lambda pair: (below(pair[0]), -pair[1].number))[1]
