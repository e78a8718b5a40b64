"""The trial engine: what a model is seen to do under an edit, and what that scores. Knows no Optuna.

A new built-in scorer is a class and a line in `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from abliterate.errors import InputError
from abliterate.evaluation.base import Observation, Response, Scorer
from abliterate.evaluation.engine import TrialEngine
from abliterate.evaluation.kl import KL
from abliterate.evaluation.refusals import Refusals, UnfinishedThinking

# Each maker is given the refusal markers and whether to match them efficiently.
SCORERS: dict[str, Callable[[Sequence[str], bool], Scorer]] = {
    "refusals": lambda markers, efficient: Refusals(markers, efficient=efficient),
    "kl": lambda markers, efficient: KL(),
    "unfinished_thinking": lambda markers, efficient: UnfinishedThinking(),
}


def make_scorers(names: Sequence[str], markers: Sequence[str], *, efficient: bool = True) -> tuple[Scorer, ...]:
    """The scorers named. InputError: no such scorer, or one that the front needs is missing."""
    for name in names:
        if name not in SCORERS:
            raise InputError(f"There is no scorer {name!r}; choose among {', '.join(SCORERS)}.")
    for needed in ("refusals", "kl"):
        if needed not in names:
            raise InputError(f"The setting evaluation.scorers must contain {needed!r}: the front is made of it.")
    return tuple(SCORERS[name](markers, efficient) for name in dict.fromkeys(names))


__all__ = ["SCORERS", "Observation", "Response", "Scorer", "TrialEngine", "make_scorers"]
