"""The rules that select one trial of the front: `auto`, `knee`, `trial:N`, `kl<=X` and the like."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abliterate.errors import AbliterateError, InputError
from abliterate.objectives import COUNTS, DEFAULT, KL, UNANSWERED, Vector, primary_objective, vector
from abliterate.search.front import knee
from abliterate.types import Objective, Trial

_RULES = "auto, knee, trial:N, kl<=X, unanswered<=N, refusals<=N, NAME<=X or NAME>=X"

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"


@dataclass(frozen=True)
class SelectionRule:
    """A parsed `--select`; call it with a non-empty front. `scorer` is the scorer it names, if some runs lack that scorer."""

    text: str
    pick: Callable[[Sequence[Trial]], Trial]
    scorer: str = ""

    def __call__(self, front: Sequence[Trial]) -> Trial:
        return self.pick(front)

    def preview(self, front: Sequence[Trial]) -> Trial | None:
        """The trial that the rule would pick now; None if no trial satisfies it yet."""
        try:
            return self.pick(front) if front else None
        except AbliterateError:
            return None


def parse_rule(text: str, auto_max_kl: float = 0.1, objectives: Sequence[Objective] = DEFAULT) -> SelectionRule:
    """The rule in `text`: `auto`, `knee`, `trial:N`, `kl<=X`, `unanswered<=N`, `refusals<=N`, `NAME<=X` or `NAME>=X`.

    `auto` takes the best trial in the primary objective among front points with KL ≤ `auto_max_kl`, else the knee. `kl<=X`
    takes the best in the primary objective within the limit, and a limit of a count the least KL. NAME is any other scorer;
    its rules take the best in the primary objective other than NAME.

    Raises:
        InputError: the text is no such rule.
    """
    lower = text.replace(" ", "").lower()
    by_primary = _best_in(primary_objective(objectives), objectives)
    if lower == "auto":
        return SelectionRule(text, lambda front: _auto(front, auto_max_kl, objectives))
    if lower == "knee":
        return SelectionRule(text, lambda front: knee(front, objectives))
    if match := re.fullmatch(r"trial:(\d+)", lower):
        number = int(match[1])
        return SelectionRule(text, lambda front: _best(front, lambda trial: trial.number == number, by_primary, text))
    if match := re.fullmatch(f"kl<=({_NUMBER})", lower):
        limit = float(match[1])
        return SelectionRule(text, lambda front: _best(front, lambda trial: trial.kl <= limit, by_primary, text))
    if match := re.fullmatch(r"(unanswered|refusals)<=(\d+)", lower):
        name, most, by_kl = match[1], int(match[2]), _best_in(Objective(KL, "minimize"), objectives)

        def few(trial: Trial) -> bool:
            return name in trial.scores and trial.value(name) <= most

        return SelectionRule(text, lambda front: _best(front, few, by_kl, text), name if name == UNANSWERED else "")
    # A scorer's name may contain spaces.
    match = re.fullmatch(rf"\s*(.+?)\s*([<>]=)\s*([+-]?{_NUMBER})\s*", text, re.IGNORECASE)
    if match and match[1].lower() not in (KL, *COUNTS):
        scorer, sign, bound = match[1], 1 if match[2] == "<=" else -1, float(match[3])
        by_other_primary = _best_in(primary_objective(objectives, without=scorer), objectives)

        def satisfied(trial: Trial) -> bool:
            return scorer in trial.values and sign * trial.values[scorer] <= sign * bound

        return SelectionRule(text, lambda front: _best(front, satisfied, by_other_primary, text), scorer)
    raise InputError(f"The selection {text!r} is not a rule; use {_RULES}.")


def _best_in(objective: Objective, objectives: Sequence[Objective]) -> Callable[[Trial], tuple[float | Vector, ...]]:
    """A sort key that puts the best trial in one objective first, and equal trials by KL, then by the other objectives."""
    return lambda trial: (objective.cost(trial.value(objective.name)), trial.kl, vector(trial, objectives), trial.number)


def _auto(front: Sequence[Trial], max_kl: float, objectives: Sequence[Objective]) -> Trial:
    within = [trial for trial in front if trial.kl <= max_kl]
    return min(within, key=_best_in(primary_objective(objectives), objectives)) if within else knee(front, objectives)


def _best(
    front: Sequence[Trial], wanted: Callable[[Trial], bool], key: Callable[[Trial], tuple[float | Vector, ...]], text: str
) -> Trial:
    satisfying = [trial for trial in front if wanted(trial)]
    if satisfying:
        return min(satisfying, key=key)
    raise AbliterateError(
        f"No trial on the front satisfies {text!r}; all trials are kept, so list them with abliterate trials RUN and export "
        "one of them with abliterate export RUN --trial N."
    )
