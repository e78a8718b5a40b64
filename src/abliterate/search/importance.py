"""Which parameters mattered in a search, by Optuna's PED-ANOVA on what the sampler was told. Knows no model and no storage.

PED-ANOVA (Watanabe et al. 2023) asks how the trials that score best in one number differ, parameter by parameter, from all
trials; it uses no random numbers. Everything is taken from the records in `result.json`, so it works on any run directory.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

from abliterate.objectives import DEFAULT, KL, reported_values
from abliterate.types import Objective, Trial

# With fewer trials the best tenth is one or two.
ENOUGH = 20


def importances(
    trials: Sequence[Trial], prompts: int, seed: int = 0, objectives: Sequence[Objective] = DEFAULT
) -> dict[str, dict[str, float]]:
    """{objective: {parameter: share of what all explain}}, largest first; empty where there are too few trials.

    Of stopped trials the refusals are the bound that the sampler was told, out of `prompts`.
    """
    scored = [trial for trial in trials if trial.state != "failed"]
    if len(scored) < ENOUGH:
        return {}
    with _quietly():
        return _shares(scored, prompts, seed, objectives)


def _shares(scored: Sequence[Trial], prompts: int, seed: int, objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    params = [_parameters(trial, seed) for trial in scored]
    distributions = _distributions(params)
    # PED-ANOVA takes low values for good ones, so what is maximized is negated.
    study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=optuna.samplers.RandomSampler(seed=seed))
    study.add_trials(
        [
            create_trial(
                params={name: one[name] for name in distributions},
                distributions=distributions,
                values=list(map(Objective.cost, objectives, reported_values(trial, objectives, prompts))),
            )
            for trial, one in zip(scored, params, strict=True)
        ]
    )
    found = {}
    for index, objective in enumerate(objectives):
        if distributions and len({trial.values[index] for trial in study.trials}) > 1:
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=_value(index))
            found["KL" if objective.name == KL else objective.name] = dict(
                sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
            )
    return found


def _value(index: int) -> Callable[[FrozenTrial], float]:
    return lambda one: one.values[index]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's lines about a study in memory, and its warning that low values are looked at: wanted here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _parameters(trial: Trial, seed: int) -> dict[str, float | str]:
    """As they were suggested, as far as the record tells.

    Where a component is off, what was suggested for the edge of its kernel is lost; it had no effect, and a random number
    says so better than 0 would, which would stand for "off".
    """
    params: dict[str, float | str] = {"scope": trial.params.scope, "direction index": trial.params.direction_index}
    for name, kernel in trial.params.kernels.items():
        drawn = random.Random(f"{seed}:{trial.number}:{name}").random()
        params |= {
            f"{name} max": kernel.max_coeff,
            f"{name} position": kernel.position,
            f"{name} edge": kernel.min_coeff / kernel.max_coeff if kernel.max_coeff else drawn,
            f"{name} distance": kernel.distance,
        }
    return params


def _distributions(params: Sequence[Mapping[str, float | str]]) -> dict[str, BaseDistribution]:
    """Ranges as they were met; what never changed explains nothing and is left out."""
    found: dict[str, BaseDistribution] = {}
    for name in params[0]:
        values = [one[name] for one in params if name in one]
        if len(values) < len(params) or len(set(values)) < 2:
            continue
        if isinstance(values[0], str):
            found[name] = CategoricalDistribution(sorted({str(value) for value in values}))
        else:
            numbers = [float(value) for value in values]
            found[name] = FloatDistribution(min(numbers), max(numbers))
    return found
