"""The Pareto front of trials, its knee and its hypervolume.

Any number of objectives; by default two, both minimized: mean KL and refusals (docs/design.md §4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from abliterate.objectives import (
    DEFAULT,
    Vector,
    base_vector,
    in_words,
    least_vector,
    no_worse,
    vector,
)
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


def pareto_front(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective] = DEFAULT) -> tuple[Trial, ...]:
    """Complete trials not weakly dominated by the baseline (KL 0) or another complete trial, by rising cost.

    In the objectives' order: by KL first, where it is one. Of exactly equal trials the lowest number stays.
    """
    found = [(vector(trial, objectives), trial) for trial in trials if trial.state == "complete"]
    front: list[Trial] = []
    # What dominates a trial comes before it, and on the front is something that dominates as much.
    costs = [least_vector(baseline, objectives)]
    for cost, trial in sorted(found, key=lambda pair: (pair[0], pair[1].number)):
        if not any(no_worse(other, cost) for other in costs):
            front.append(trial)
            costs.append(cost)
    return tuple(front)


def no_front(baseline: Baseline, objectives: Sequence[Objective]) -> str:
    """The sentence for a search that found nothing."""
    if tuple(objectives) == DEFAULT:
        return (
            f"No trial refuses fewer than the model itself ({baseline.refusals} of {baseline.prompts}); try more trials "
            "with -n, prompts closer to the behaviour with --harmful, or check the answers for refusal markers."
        )
    base = ", ".join(f"{one.name} {baseline.value(one.name):.4g}" for one in objectives)
    return (
        f"No trial is better than the model itself in any of the objectives {in_words(objectives)} (it has {base}); try more "
        "trials with -n, or other objectives."
    )


def hypervolume(front: Sequence[Trial], baseline: Baseline) -> float:
    """Of the default objectives: area between the front, the baseline a point of it, and (KL 1, share 1), in [0, 1]."""
    points = [(0.0, baseline.refusals / baseline.prompts)]
    points += [(trial.kl, trial.refusals / baseline.prompts) for trial in front]
    area, share_before = 0.0, 1.0
    for kl, share in sorted(points):
        if kl < 1 and share < share_before:
            area += (1 - kl) * (share_before - share)
            share_before = share
    return area


def knee(front: Sequence[Trial], objectives: Sequence[Objective] = DEFAULT) -> Trial:
    """The point farthest below the plane between the front's ends (of two objectives the chord), all axes scaled to [0, 1]."""
    costs = [vector(trial, objectives) for trial in front]
    axes = list(zip(*costs, strict=True))
    ranges = [(min(axis), (max(axis) - min(axis)) or 1.0) for axis in axes]

    def below(cost: Vector) -> float:
        left = 1.0
        for value, (least, width) in zip(cost, ranges, strict=True):
            left -= (value - least) / width
        return left

    return max(zip(costs, front, strict=True), key=lambda pair: (below(pair[0]), -pair[1].number))[1]
