"""Scorers turn what a model did under an edit into numbers; this module makes them by name.

A new built-in scorer is a class and a line in `SCORERS`, a plugin's scorer a line in its `scorers`, and a custom scorer is a
class in a file that the user names (`scorers/custom.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abliterate.errors import InputError
from abliterate.objectives import is_custom, ordered, public, split
from abliterate.plugins import Registry
from abliterate.scorers.base import BaseView, Judge, Observation, Response, Scorer
from abliterate.scorers.custom import check_scorer, load_scorer
from abliterate.scorers.judges import Classifier, Endpoint
from abliterate.scorers.kl import KL
from abliterate.scorers.refusals import Refusals, UnfinishedThinking
from abliterate.scorers.strongreject import StrongReject
from abliterate.scorers.unanswered import Unanswered
from abliterate.settings.schema import EvaluationSettings
from abliterate.types import Objective


@dataclass(frozen=True)
class Making:
    """The ingredients of scorers: the refusal markers, whether to match them efficiently, and the settings."""

    markers: Sequence[str]
    efficient: bool = True
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)


SCORERS: Registry[Callable[[Making], Scorer]] = Registry(
    "scorers",
    "scorer",
    {
        "refusals": lambda making: Refusals(making.markers, efficient=making.efficient),
        "unanswered": lambda making: Unanswered(Refusals(making.markers, efficient=making.efficient)),
        "kl": lambda making: KL(),
        "unfinished_thinking": lambda making: UnfinishedThinking(),
        "classifier": lambda making: Classifier(making.settings.judge_model, making.settings.judge_label),
        "endpoint": lambda making: Endpoint(),
        "strongreject": lambda making: StrongReject(),
    },
    needs=("__call__",),
)


def make_scorers(
    names: Sequence[str], markers: Sequence[str], *, efficient: bool = True, settings: EvaluationSettings | None = None
) -> tuple[Scorer, ...]:
    """The scorers called `names`.

    Raises:
        InputError: a name is unknown, two scorers share a name, or a scorer that the front needs is missing.
    """
    for name in names:
        if name not in SCORERS and not is_custom(name):
            custom = "path/to/file.py:ClassName"
            if name.partition(":")[0] in SCORERS:
                raise InputError(
                    f"The objective {name!r} is more than a scorer and a goal; give NAME, NAME:minimize or NAME:maximize."
                )
            raise InputError(
                f"There is no scorer {name!r}; choose among {', '.join(SCORERS)}, give {custom}, or install the plugin that "
                "has that scorer."
            )
    for needed in ("refusals", "kl"):
        if needed not in names:
            raise InputError(f"The setting evaluation.scorers must contain {needed!r}, because exports are verified by it.")
    making = Making(markers, efficient, settings or EvaluationSettings())
    scorers = tuple(load_scorer(name) if is_custom(name) else _make(name, making) for name in dict.fromkeys(names))
    taken_names = [scorer.name for scorer in scorers]
    duplicate = next((name for name in taken_names if taken_names.count(name) > 1), None)
    if duplicate is not None:
        raise InputError(f"Two scorers have the name {duplicate!r}; give the custom scorer another name.")
    return scorers


def _make(name: str, making: Making) -> Scorer:
    """A scorer by its name; InputError where a plugin's can't be made or isn't one."""
    plugin = SCORERS.plugin(name)
    if plugin is None:
        return SCORERS[name](making)
    try:
        scorer = SCORERS[name](making)
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        said = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(". ")
        raise InputError(f"The scorer {name} of the plugin {plugin.title} can't be made: {said}.") from error
    check_scorer(scorer, f"{name} of the plugin {plugin.title}")
    if scorer.name != name:
        raise InputError(
            f"The scorer {name} of the plugin {plugin.title} calls itself {scorer.name!r}; both names must be the same, see "
            "docs/extending.md."
        )
    return scorer


def make_objectives(texts: Sequence[str], names: Sequence[str], scorers: Sequence[Scorer]) -> tuple[Objective, ...]:
    """The objectives in `texts`, in the order in which the sampler sees them; `names` are the names `scorers` were made from.

    Raises:
        InputError: a scorer is unknown or named twice, or neither it nor the text says which values are better.
    """
    scorer_by_name = dict(zip(dict.fromkeys(names), scorers, strict=True))
    objectives: dict[str, Objective] = {}
    for text in texts:
        name, given_goal = split(text)
        scorer = scorer_by_name[name]
        goal = given_goal or scorer.goal
        if scorer.name in objectives:
            raise InputError(f"The objective {scorer.name!r} is given twice; give it once.")
        if goal != "minimize" and goal != "maximize":
            shown = public(name)
            raise InputError(
                f"The scorer {scorer.name!r} doesn't say which values are better; give --objective {shown}:minimize or "
                f"--objective {shown}:maximize."
            )
        objectives[scorer.name] = Objective(scorer.name, goal)
    return ordered(objectives.values())


__all__ = ["SCORERS", "BaseView", "Judge", "Making", "Observation", "Response", "Scorer", "make_objectives", "make_scorers"]
