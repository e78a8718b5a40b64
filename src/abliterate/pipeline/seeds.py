"""Take the first trials' parameters from another run: its front, or a spread of its complete trials (`search.seed_from`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.files import expanded, read_toml
from abliterate.objectives import vector
from abliterate.search.front import pareto_front
from abliterate.search.space import Space, Value, is_coeff, values_of
from abliterate.settings.schema import SearchSettings
from abliterate.types import Trial, TrialParams


@dataclass(frozen=True)
class Seeds:
    """The run that `search.seed_from` names, its edit mode ("" if its settings don't say it), and its trials to repeat."""

    result: Result
    mode: str
    trials: tuple[Trial, ...]


def seed_trials(settings: SearchSettings) -> Seeds:
    """The run that `search.seed_from` names, and its trials that are measured again, in the order of their costs.

    They are the trials on its front, half of the budget at most. Where these are fewer than the start-up trials, others of its
    complete trials are taken to that number, evenly spread over their costs. Refined trials are left out.

    Raises:
        InputError: the run can't be read or has no complete trial that was suggested by a sampler.
    """
    if settings.trials == 0:
        raise InputError("Without trials none of another run's is measured; give some with -n, or leave --seed-from out.")
    path = expanded(settings.seed_from)
    result = Result.read(RunDirectory(path))
    objectives, baseline = result.objectives_or_default(), result.baseline
    complete = [trial for trial in result.trials if trial.state == "complete" and isinstance(trial.params, TrialParams)]
    if not complete or baseline is None or result.model is None or not result.model.n_layers:
        raise InputError(
            f"The run in {path} has no complete trial of its search whose parameters could be measured again; name another one "
            "with --seed-from."
        )
    front = pareto_front(complete, baseline, objectives)
    taken = _spread(front, max(1, settings.trials // 2))
    others = [trial for trial in complete if trial not in front]
    others.sort(key=lambda trial: (vector(trial, objectives), trial.number))
    taken = [*taken, *_spread(others, settings.n_startup_trials - len(taken))]
    trials = tuple(sorted(taken, key=lambda trial: (vector(trial, objectives), trial.number)))
    return Seeds(result, _edit_mode(RunDirectory(path)), trials)


def check_continued(settings: SearchSettings, directory: RunDirectory) -> None:
    """Raise InputError if the run in `directory` began with another `search.seed_from`, or without.

    The trials are in its study by then, so another run would be recorded without having any effect.
    """
    stored: Any = None
    with contextlib.suppress(InputError):  # without its settings nobody knows
        stored = read_toml(directory.settings).get("search")
    began = stored.get("seed_from", "") if isinstance(stored, dict) else settings.seed_from
    if not directory.holds_run or began == settings.seed_from:
        return
    if not began or not isinstance(began, str):
        raise InputError(
            "The run has begun without search.seed_from, on which its first trials depend; leave --seed-from out, or start "
            "over with --restart."
        )
    if not settings.seed_from or expanded(began).absolute() != expanded(settings.seed_from).absolute():
        raise InputError(
            f"The run has begun with trials of {began} and can't be continued with another search.seed_from; give this one, or "
            "start over with --restart."
        )


def seed_values(space: Space, mode: str, seeds: Seeds) -> list[dict[str, Value]]:
    """The values of the trials' parameters in a search of its own `space`: scaled to its model's depth, and clamped.

    Components are matched by name; what the other run doesn't have is left to the sampler, and so are its largest coeffs if its
    edit mode wasn't `mode`, because in another mode they mean something else.

    Raises:
        InputError: the run's model has none of the space's components.
    """
    assert seeds.result.model is not None
    scale = (space.n_layers - 1) / max(1, seeds.result.model.n_layers - 1)
    alike = seeds.mode in ("", mode)
    values = []
    for trial in seeds.trials:
        assert isinstance(trial.params, TrialParams)
        if not set(trial.params.kernels) & set(space.components):
            raise InputError(
                f"The run of search.seed_from edits {', '.join(trial.params.kernels)}, and this model has only "
                f"{', '.join(space.components)}; name a run of a model with the same components."
            )
        fitted = space.fitted(values_of(trial.params, scale))
        values.append({name: value for name, value in fitted.items() if alike or not is_coeff(name)})
    return values


def _edit_mode(directory: RunDirectory) -> str:
    with contextlib.suppress(InputError):
        edit = read_toml(directory.settings).get("edit")
        return str(edit.get("mode", "")) if isinstance(edit, dict) else ""
    return ""


def _spread(trials: Sequence[Trial], most: int) -> list[Trial]:
    """At most so many of the trials, evenly spread from the first to the last."""
    count = min(len(trials), max(0, most))
    if count < 2:
        return list(trials[:count])
    return [trials[round(index * (len(trials) - 1) / (count - 1))] for index in range(count)]
