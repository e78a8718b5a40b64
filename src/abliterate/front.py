"""The Pareto front of trials, its hypervolume and knee, and the rule that picks one. Pure; knows no Optuna.

Any number of objectives; by default two, both minimized: mean KL and refusals (DESIGN §4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abliterate.errors import AbliterateError, InputError
from abliterate.objectives import DEFAULT, KL, REFUSALS, Vector, in_words, lead, least_vector, no_worse, vector
from abliterate.types import Baseline, Objective, Trial

_RULES = "auto, knee, trial:N, kl<=X, refusals<=N, NAME<=X or NAME>=X"
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"


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


@dataclass(frozen=True)
class SelectionRule:
    """A parsed `--select`; call it with a front (not empty). `scorer`: the one that it names, if it isn't always there."""

    text: str
    pick: Callable[[Sequence[Trial]], Trial]
    scorer: str = ""

    def __call__(self, front: Sequence[Trial]) -> Trial:
        return self.pick(front)

    def preview(self, front: Sequence[Trial]) -> Trial | None:
        """What the rule would pick now; None where nothing satisfies it yet."""
        try:
            return self.pick(front) if front else None
        except AbliterateError:
            return None


def parse_rule(text: str, auto_max_kl: float = 0.1, objectives: Sequence[Objective] = DEFAULT) -> SelectionRule:
    """`auto` | `knee` | `trial:N` | `kl<=X` (best in the lead objective) | `refusals<=N` (least KL) | `NAME<=X` | `NAME>=X`.

    `auto`: the best in the lead objective among front points with KL ≤ `auto_max_kl`, else the knee. NAME is any other scorer:
    the best in the lead objective beside it.

    Raises:
        InputError: none of these.
    """
    lower = text.replace(" ", "").lower()
    first = _best_in(lead(objectives), objectives)
    if lower == "auto":
        return SelectionRule(text, lambda front: _auto(front, auto_max_kl, objectives))
    if lower == "knee":
        return SelectionRule(text, lambda front: knee(front, objectives))
    if match := re.fullmatch(r"trial:(\d+)", lower):
        number = int(match[1])
        return SelectionRule(text, lambda front: _best(front, lambda trial: trial.number == number, first, text))
    if match := re.fullmatch(f"kl<=({_NUMBER})", lower):
        limit = float(match[1])
        return SelectionRule(text, lambda front: _best(front, lambda trial: trial.kl <= limit, first, text))
    if match := re.fullmatch(r"refusals<=(\d+)", lower):
        count, least = int(match[1]), _best_in(Objective(KL, "minimize"), objectives)
        return SelectionRule(text, lambda front: _best(front, lambda trial: trial.refusals <= count, least, text))
    # A scorer's name may have spaces in it.
    match = re.fullmatch(rf"\s*(.+?)\s*([<>]=)\s*([+-]?{_NUMBER})\s*", text, re.IGNORECASE)
    if match and match[1].lower() not in (KL, REFUSALS):
        name, sign, bound = match[1], 1 if match[2] == "<=" else -1, float(match[3])
        beside = _best_in(lead(objectives, without=name), objectives)

        def satisfied(trial: Trial) -> bool:
            return name in trial.values and sign * trial.values[name] <= sign * bound

        return SelectionRule(text, lambda front: _best(front, satisfied, beside, text), name)
    raise InputError(f"The selection {text!r} is not a rule; use {_RULES}.")


def _best_in(objective: Objective, objectives: Sequence[Objective]) -> Callable[[Trial], tuple[float | Vector, ...]]:
    """Sorts the best in one objective first; of equal ones the best in KL, then in the others."""
    return lambda trial: (objective.cost(trial.value(objective.name)), trial.kl, vector(trial, objectives), trial.number)


def _auto(front: Sequence[Trial], max_kl: float, objectives: Sequence[Objective]) -> Trial:
    near = [trial for trial in front if trial.kl <= max_kl]
    return min(near, key=_best_in(lead(objectives), objectives)) if near else knee(front, objectives)


def _best(
    front: Sequence[Trial], wanted: Callable[[Trial], bool], key: Callable[[Trial], tuple[float | Vector, ...]], text: str
) -> Trial:
    satisfying = [trial for trial in front if wanted(trial)]
    if satisfying:
        return min(satisfying, key=key)
    raise AbliterateError(
        f"No trial on the front satisfies {text!r}; the trials are kept: look at them with abliterate trials RUN, then "
        "abliterate export RUN --trial N."
    )
