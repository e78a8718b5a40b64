"""The objectives of a search, and trials as vectors of costs, in which less is better.

If KL is an objective it comes first; the others follow in the given order, which is the order of the values in a study.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Literal

from abliterate.errors import InputError
from abliterate.types import Baseline, Objective, Sense, Trial

Vector = tuple[float, ...]
KL, REFUSALS, UNANSWERED = "kl", "refusals", "unanswered"
# Scorers whose values are numbers of harmful prompts; the sampler is told their share.
COUNTS = (UNANSWERED, REFUSALS)
# Scorers that have columns of their own in tables.
_OWN_COLUMNS = (KL, *COUNTS)
# Settings that name scorers; each scorer may be a class in a file.
SETTINGS_NAMING_SCORERS = ("evaluation.scorers", "search.objectives")
# Scorers that consult another model, from a path, the Hub, or a server.
CLASSIFIER = "classifier"
ASKING = ("endpoint", "strongreject")  # these ask the server that the environment names
JUDGES = (CLASSIFIER, *ASKING)
DEFAULT: tuple[Objective, ...] = (Objective(KL, "minimize"), Objective(UNANSWERED, "minimize"))
# The objectives of comparable tools, which count refusal markers alone.
BY_MARKERS: tuple[Objective, ...] = (Objective(KL, "minimize"), Objective(REFUSALS, "minimize"))


def check_searchable(objectives: Sequence[Objective]) -> None:
    """InputError for objectives of which no edit is better than none."""
    if tuple(objectives) == (Objective(KL, "minimize"),):
        raise InputError("KL is least without any edit, so alone it leaves nothing to find; add --objective unanswered.")


def split(text: str) -> tuple[str, Sense | Literal[""]]:
    """(scorer, goal) of `NAME`, `NAME:minimize` or `NAME:maximize`; the goal is "" if none is named."""
    name, _, goal = text.rpartition(":")
    if not name or name.endswith(".py"):  # a class in a file may have such a name
        return text, ""
    return (name, "minimize") if goal == "minimize" else (name, "maximize") if goal == "maximize" else (text, "")


def is_custom(name: str) -> bool:
    """Whether a scorer's name is `path/to/file.py:ClassName`."""
    return ".py:" in name


def public(text: str) -> str:
    """A scorer or objective as it may be published: for a class in a file, the file's name without its folder."""
    path, mark, class_name = text.partition(".py:")
    return f"{PurePath(path).name}{mark}{class_name}" if mark else text


def ordered(objectives: Iterable[Objective]) -> tuple[Objective, ...]:
    """The objectives in the order in which their values are reported to the sampler."""
    return tuple(sorted(objectives, key=lambda objective: objective.name != KL))


def to_records(objectives: Sequence[Objective]) -> list[dict[str, str]]:
    """The JSON form."""
    return [{"name": objective.name, "goal": objective.goal} for objective in objectives]


def vector(trial: Trial, objectives: Sequence[Objective]) -> Vector:
    """A trial's costs; values to be maximized are negated."""
    return tuple(objective.cost(trial.value(objective.name)) for objective in objectives)


def counted(objectives: Sequence[Objective]) -> str:
    """The count that is minimized beside KL if these are all objectives, else ""."""
    return {DEFAULT: UNANSWERED, BY_MARKERS: REFUSALS}.get(tuple(objectives), "")


def reported_values(trial: Trial, objectives: Sequence[Objective], n_prompts: int) -> list[float]:
    """A trial's values as they are reported to the sampler; counts are reported as a share."""
    return [trial.value(one.name) / (n_prompts if one.name in COUNTS else 1) for one in objectives]


def base_vector(baseline: Baseline, objectives: Sequence[Objective]) -> Vector:
    """The costs of the unedited model."""
    return tuple(objective.cost(baseline.value(objective.name)) for objective in objectives)


def least_vector(baseline: Baseline, objectives: Sequence[Objective]) -> Vector:
    """The costs of the unedited model for comparisons: no KL is below the base's, even after rounding."""
    kl = Objective(KL, "minimize")
    costs = base_vector(baseline, objectives)
    return tuple(-math.inf if objective == kl else cost for objective, cost in zip(objectives, costs, strict=True))


def no_worse(first: Vector, second: Vector) -> bool:
    """Whether `first` weakly dominates `second`."""
    return all(mine <= theirs for mine, theirs in zip(first, second, strict=True))


def primary_objective(objectives: Sequence[Objective], without: str = "") -> Objective:
    """The primary objective: unanswered prompts, else refusals, else the first that isn't KL, else the first.

    It is another than `without` if possible.
    """
    others = [objective for objective in objectives if objective.name != without] or list(objectives)
    return min(others, key=lambda one: (one.name != UNANSWERED, one.name != REFUSALS, one.name == KL))


def in_words(objectives: Sequence[Objective]) -> str:
    """The objectives in words: `kl (minimized), words (maximized)`."""
    return ", ".join(f"{objective.name} ({objective.goal}d)" for objective in objectives)


def other_names(values: Iterable[str], objectives: Sequence[Objective] = ()) -> list[str]:
    """The names of scorers other than those with their own columns in tables; objectives come first."""
    known = [objective.name for objective in objectives]
    rest = sorted(set(values) - {*known, *_OWN_COLUMNS})
    return [name for name in (*known, *rest) if name not in _OWN_COLUMNS]


def other_scores(trial: Trial, before: Mapping[str, float] | None = None) -> list[str]:
    """`NAME VALUE` for each scorer beside those with their own columns; `before` holds the values of the base model."""
    return [
        f"{name} " + (f"{before[name]:.4g} → " if before and name in before else "") + f"{trial.values[name]:.4g}"
        for name in other_names(trial.values)
    ]
