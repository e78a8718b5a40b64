"""The hypervolume of any number of objectives, and how it grows over a search. Pure; knows no Optuna."""

from __future__ import annotations

import math
from collections.abc import Sequence

from abliterate.front import hypervolume, pareto_front
from abliterate.objectives import DEFAULT, Vector, base_vector, no_worse, vector
from abliterate.types import Baseline, Objective, Trial


def progress(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> list[float]:
    """The hypervolume after each trial.

    But for the default objectives it is relative to this very search: each objective is scaled between the best and the worst
    of all complete trials and the baseline, and the worst is the reference.
    """
    if tuple(objectives) == DEFAULT:
        found = []
        front: tuple[Trial, ...] = ()
        for trial in trials:
            front = pareto_front((*front, trial), baseline)  # what isn't on a front never comes back to it
            found.append(hypervolume(front, baseline))
        return found
    base = base_vector(baseline, objectives)
    costs = [vector(trial, objectives) if trial.state == "complete" else None for trial in trials]
    axes = list(zip(base, *(cost for cost in costs if cost is not None), strict=True))
    ranges = [(min(axis), (max(axis) - min(axis)) or 1.0) for axis in axes]

    def scaled(cost: Vector) -> Vector:
        return tuple((value - least) / width for value, (least, width) in zip(cost, ranges, strict=True))

    points = [scaled(base)]
    reference = (1.0,) * len(objectives)
    found = [volume(points, reference)]
    for cost in costs:
        gain = 0.0
        if cost is not None and not any(no_worse(point, scaled(cost)) for point in points):
            gain = _alone(scaled(cost), points, reference)
            points = [point for point in points if not no_worse(scaled(cost), point)] + [scaled(cost)]
        found.append(found[-1] + gain)
    return found[1:]


def volume(points: Sequence[Vector], reference: Vector) -> float:
    """What the points dominate of the box below `reference`, exactly: each one's box less what later ones share of it.

    As in While, Bradstreet and Barone, "A fast way of calculating exact hypervolumes" (2012).
    """
    left = _undominated([point for point in points if all(map(float.__lt__, point, reference))])
    if len(reference) == 2:
        return _area(left, reference)
    return sum(_alone(point, left[place + 1 :], reference) for place, point in enumerate(left))


def _alone(point: Vector, others: Sequence[Vector], reference: Vector) -> float:
    """What the others don't dominate of the point's own box."""
    box = math.prod(end - value for value, end in zip(point, reference, strict=True))
    return box - volume([tuple(map(max, point, other)) for other in others], reference) if others else box


def _area(front: Sequence[Vector], reference: Vector) -> float:
    area, before = 0.0, reference[1]
    for x, y in front:
        area += (reference[0] - x) * (before - y)
        before = y
    return area


def _undominated(points: Sequence[Vector]) -> list[Vector]:
    """Sorted, so that what dominates comes first."""
    kept: list[Vector] = []
    for point in sorted(set(points)):
        if not any(no_worse(other, point) for other in kept):
            kept.append(point)
    return kept
