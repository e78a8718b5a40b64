"""The trial engine: what a model is seen to do under an edit, and what that scores. Knows no Optuna.

A new built-in scorer is a class and a line in `SCORERS`, a plugin's is a line in its `scorers`, and a user's custom scorer is
a class in a file (`scorers/custom.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abliterate.errors import InputError
from abliterate.objectives import is_custom, ordered, public, split
from abliterate.plugins import Registry
from abliterate.scorers.base import Judge, Observation, Response, Scorer
from abliterate.scorers.custom import check_scorer, load_scorer
from abliterate.scorers.judges import Classifier, Endpoint
from abliterate.scorers.kl import KL
from abliterate.scorers.refusals import Refusals, UnfinishedThinking
from abliterate.settings.schema import EvaluationSettings
from abliterate.types import Objective


@dataclass(frozen=True)
class Making:
    """What scorers are made of: the refusal markers, whether to match them efficiently, and the settings."""

    markers: Sequence[str]
    efficient: bool = True
    settings: EvaluationSettings = field(default_factory=EvaluationSettings)


SCORERS: Registry[Callable[[Making], Scorer]] = Registry(
    "scorers",
    "scorer",
    {
        "refusals": lambda making: Refusals(making.markers, efficient=making.efficient),
        "kl": lambda making: KL(),
        "unfinished_thinking": lambda making: UnfinishedThinking(),
        "classifier": lambda making: Classifier(making.settings.judge_model, making.settings.judge_label),
        "endpoint": lambda making: Endpoint(),
    },
    needs=("__call__",),
)


def make_scorers(
    names: Sequence[str], markers: Sequence[str], *, efficient: bool = True, settings: EvaluationSettings | None = None
) -> tuple[Scorer, ...]:
    """The scorers named. InputError: no such scorer, two of one name, or one that the front needs is missing."""
    for name in names:
        if name not in SCORERS and not is_custom(name):
            own = "path/to/file.py:ClassName"
            if name.partition(":")[0] in SCORERS:
                raise InputError(
                    f"The objective {name!r} says more than a scorer and a goal; give NAME, NAME:minimize or NAME:maximize."
                )
            raise InputError(
                f"There is no scorer {name!r}; choose among {', '.join(SCORERS)}, give {own}, or install the plugin that has "
                "that scorer."
            )
    for needed in ("refusals", "kl"):
        if needed not in names:
            raise InputError(f"The setting evaluation.scorers must contain {needed!r}: exports are verified by it.")
    making = Making(markers, efficient, settings or EvaluationSettings())
    made = tuple(load_scorer(name) if is_custom(name) else _make(name, making) for name in dict.fromkeys(names))
    taken = [scorer.name for scorer in made]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"Two scorers have the name {twice!r}; give your own another one.")
    return made


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
    """The objectives named, in the order in which the sampler is told; `names`: those that `scorers` were made by.

    Raises:
        InputError: no such scorer, one named twice, or one of which nobody says whether more or less is better.
    """
    made = dict(zip(dict.fromkeys(names), scorers, strict=True))
    found: dict[str, Objective] = {}
    for text in texts:
        name, said = split(text)
        scorer = made[name]
        goal = said or scorer.goal
        if scorer.name in found:
            raise InputError(f"The objective {scorer.name!r} is given twice; give it once.")
        if goal != "minimize" and goal != "maximize":
            shown = public(name)
            raise InputError(
                f"The scorer {scorer.name!r} doesn't say which values are better; give --objective {shown}:minimize or "
                f"--objective {shown}:maximize."
            )
        found[scorer.name] = Objective(scorer.name, goal)
    return ordered(found.values())


__all__ = ["SCORERS", "Judge", "Making", "Observation", "Response", "Scorer", "make_objectives", "make_scorers"]
