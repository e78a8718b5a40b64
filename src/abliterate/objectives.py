"""What a search is for: objectives, and trials as vectors of them in which less is better. Pure; knows no scorers.

KL comes first wherever it is an objective, the others follow as they were given: so studies have always been told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

from abliterate.types import Baseline, Direction, Objective, Trial

Vector = tuple[float, ...]
KL, REFUSALS = "kl", "refusals"
# Settings that name what trials are scored by; any may be in a file.
OWN = ("evaluation.scorers", "search.objectives")
# Scorers that ask another model: one from a path or the Hub, or a server.
CLASSIFIER = "classifier"
JUDGES = (CLASSIFIER, "endpoint")
DEFAULT: tuple[Objective, ...] = (Objective(KL, "minimize"), Objective(REFUSALS, "minimize"))


def split(text: str) -> tuple[str, Direction | Literal[""]]:
    """(scorer, goal) of `NAME`, `NAME:minimize` or `NAME:maximize`; the goal is "" where none is said."""
    name, _, goal = text.rpartition(":")
    if not name or name.endswith(".py"):  # a class in a file may be called by such a word
        return text, ""
    return (name, "minimize") if goal == "minimize" else (name, "maximize") if goal == "maximize" else (text, "")


def is_custom(name: str) -> bool:
    """Whether a scorer's name is `path/to/file.py:ClassName`."""
    return ".py:" in name


def public(text: str) -> str:
    """A scorer or objective as it may be shown: of a class in a file the file's name, not where it lies."""
    place, mark, wanted = text.partition(".py:")
    return f"{PurePath(place).name}{mark}{wanted}" if mark else text


def ordered(objectives: Iterable[Objective]) -> tuple[Objective, ...]:
    """As they are told to the sampler."""
    return tuple(sorted(objectives, key=lambda one: one.name != KL))


def to_records(objectives: Sequence[Objective]) -> list[dict[str, str]]:
    """JSON form, the inverse of `objectives_from_result`."""
    return [{"name": one.name, "goal": one.goal} for one in objectives]


def objectives_from_result(result: Mapping[str, Any]) -> tuple[Objective, ...]:
    """The objectives of the run that a `result.json` is of; runs of earlier versions had the two."""
    return tuple(Objective(**one) for one in result.get("objectives") or ()) or DEFAULT


def vector(trial: Trial, objectives: Sequence[Objective]) -> Vector:
    """A trial's costs: what is to be maximized is negated."""
    return tuple(one.cost(trial.value(one.name)) for one in objectives)


def reported_values(trial: Trial, objectives: Sequence[Objective], n_prompts: int) -> list[float]:
    """What the sampler is told of a trial: values as they are, of refusals their share."""
    return [trial.refusals / n_prompts if one.name == REFUSALS else trial.value(one.name) for one in objectives]


def base_vector(baseline: Baseline, objectives: Sequence[Objective]) -> Vector:
    """The unedited model's costs."""
    return tuple(one.cost(baseline.value(one.name)) for one in objectives)


def least_vector(baseline: Baseline, objectives: Sequence[Objective]) -> Vector:
    """The same, to compare with: no KL is smaller than the base's, whatever rounding says."""
    least = Objective(KL, "minimize")
    costs = base_vector(baseline, objectives)
    return tuple(-math.inf if one == least else cost for one, cost in zip(objectives, costs, strict=True))


def no_worse(one: Vector, other: Vector) -> bool:
    """Whether `one` weakly dominates `other`."""
    return all(mine <= theirs for mine, theirs in zip(one, other, strict=True))


def primary_objective(objectives: Sequence[Objective], without: str = "") -> Objective:
    """What a selection looks at first: refusals, else the first that isn't KL, else the first; another than `without`."""
    left = [one for one in objectives if one.name != without] or list(objectives)
    return min(left, key=lambda one: (one.name != REFUSALS, one.name == KL))


def in_words(objectives: Sequence[Objective]) -> str:
    """`kl (minimized), words (maximized)`."""
    return ", ".join(f"{one.name} ({one.goal}d)" for one in objectives)


def other_names(values: Iterable[str], objectives: Sequence[Objective] = ()) -> list[str]:
    """Of scorers' names those that tables have no columns of their own for, objectives first."""
    known = [one.name for one in objectives]
    rest = sorted(set(values) - {*known, KL, REFUSALS})
    return [name for name in (*known, *rest) if name not in (KL, REFUSALS)]


def other_scores(trial: Trial, before: Mapping[str, float] | None = None) -> list[str]:
    """What scorers beside refusals and KL say of a trial, `NAME VALUE` each; `before`: what they say of the base."""
    return [
        f"{name} " + (f"{before[name]:.4g} → " if before and name in before else "") + f"{trial.values[name]:.4g}"
        for name in other_names(trial.values)
    ]
