"""The Pareto front of trials, its hypervolume and knee, and the rule that picks one. Pure; knows no Optuna.

Two objectives, both minimized: mean KL and refusals (DESIGN §4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from abliterate.errors import AbliterateError, InputError
from abliterate.types import Baseline, Trial


def pareto_front(trials: Sequence[Trial], baseline: Baseline) -> tuple[Trial, ...]:
    """Complete trials not weakly dominated by the baseline (KL 0) or another complete trial, by rising KL.

    Of exactly equal trials the lowest number stays.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    front: list[Trial] = []
    fewest = baseline.refusals
    for trial in sorted(complete, key=lambda trial: (trial.kl, trial.refusals, trial.number)):
        if trial.refusals < fewest:
            front.append(trial)
            fewest = trial.refusals
    return tuple(front)


def hypervolume(front: Sequence[Trial], baseline: Baseline) -> float:
    """Area between the front (with the baseline as a point) and the reference point (KL 1, share 1), in [0, 1]."""
    points = [(0.0, baseline.refusals / baseline.prompts)]
    points += [(trial.kl, trial.refusals / baseline.prompts) for trial in front]
    area, share_before = 0.0, 1.0
    for kl, share in sorted(points):
        if kl < 1 and share < share_before:
            area += (1 - kl) * (share_before - share)
            share_before = share
    return area


def knee(front: Sequence[Trial]) -> Trial:
    """The point farthest below the chord between the front's ends, both axes scaled to [0, 1]."""
    first, last = front[0], front[-1]
    kl_range = (last.kl - first.kl) or 1.0
    refusal_range = (first.refusals - last.refusals) or 1

    def below_chord(trial: Trial) -> float:
        return 1 - (trial.kl - first.kl) / kl_range - (trial.refusals - last.refusals) / refusal_range

    return max(front, key=lambda trial: (below_chord(trial), -trial.number))


@dataclass(frozen=True)
class SelectionRule:
    """A parsed `--select`; call it with a front (not empty)."""

    text: str
    pick: Callable[[Sequence[Trial]], Trial]

    def __call__(self, front: Sequence[Trial]) -> Trial:
        return self.pick(front)

    def preview(self, front: Sequence[Trial]) -> Trial | None:
        """What the rule would pick now; None where nothing satisfies it yet."""
        try:
            return self.pick(front) if front else None
        except AbliterateError:
            return None


def parse_rule(text: str, auto_max_kl: float = 0.1) -> SelectionRule:
    """`auto` | `knee` | `trial:N` | `kl<=X` (fewest refusals) | `refusals<=N` (least KL).

    `auto`: fewest refusals among front points with KL ≤ `auto_max_kl`, else the knee.

    Raises:
        InputError: none of these.
    """
    compact = text.replace(" ", "").lower()
    if compact == "auto":
        return SelectionRule(text, lambda front: _auto(front, auto_max_kl))
    if compact == "knee":
        return SelectionRule(text, knee)
    if match := re.fullmatch(r"trial:(\d+)", compact):
        number = int(match[1])
        return SelectionRule(text, lambda front: _first(front, lambda trial: trial.number == number, text))
    if match := re.fullmatch(r"kl<=((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", compact):
        limit = float(match[1])
        return SelectionRule(text, lambda front: _first(tuple(reversed(front)), lambda trial: trial.kl <= limit, text))
    if match := re.fullmatch(r"refusals<=(\d+)", compact):
        count = int(match[1])
        return SelectionRule(text, lambda front: _first(front, lambda trial: trial.refusals <= count, text))
    raise InputError(f"The selection {text!r} is not a rule; use auto, knee, trial:N, kl<=X or refusals<=N.")


def _auto(front: Sequence[Trial], max_kl: float) -> Trial:
    near = [trial for trial in front if trial.kl <= max_kl]
    return near[-1] if near else knee(front)


def _first(front: Sequence[Trial], wanted: Callable[[Trial], bool], text: str) -> Trial:
    for trial in front:
        if wanted(trial):
            return trial
    raise AbliterateError(
        f"No trial on the front satisfies {text!r}; the trials are kept: look at them with abliterate trials RUN, then "
        "abliterate export RUN --trial N."
    )
