"""Estimate which parameters mattered in a search, by Optuna's PED-ANOVA on the values that the sampler saw.

PED-ANOVA (Watanabe et al. 2023) compares the trials that score best in one number with all trials, parameter by parameter; it
uses no random numbers. All data come from the records in `result.json`, so it works on any run directory.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, create_trial

from abliterate.objectives import DEFAULT, KL, reported_values
from abliterate.types import Objective, Trial, TrialParams

# With fewer trials the best tenth is one or two trials.
ENOUGH = 20


def importances(
    trials: Sequence[Trial], prompts: int, seed: int = 0, objectives: Sequence[Objective] = DEFAULT
) -> dict[str, dict[str, float]]:
    """{objective: {parameter: share of the total importance}}, largest first; empty if there are too few trials.

    The refusals of a pruned trial are the bound that the sampler saw, out of `prompts`. Refined trials, which the sampler
    neither suggested nor saw, are left out.
    """
    scored = [trial for trial in trials if trial.state != "failed" and isinstance(trial.params, TrialParams)]
    if len(scored) < ENOUGH:
        return {}
    with _quietly():
        return _shares(scored, prompts, seed, objectives)


def _shares(scored: Sequence[Trial], prompts: int, seed: int, objectives: Sequence[Objective]) -> dict[str, dict[str, float]]:
    # It imports scikit-learn, which takes a second, and every command that shows a run imports this module.
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    params = [_parameters(trial, seed) for trial in scored]
    distributions = _distributions(params)
    # PED-ANOVA takes low values for good ones, so maximized objectives are negated.
    study = optuna.create_study(directions=["minimize"] * len(objectives), sampler=optuna.samplers.RandomSampler(seed=seed))
    study.add_trials(
        [
            create_trial(
                params={name: trial_params[name] for name in distributions},
                distributions=distributions,
                values=list(map(Objective.cost, objectives, reported_values(trial, objectives, prompts))),
            )
            for trial, trial_params in zip(scored, params, strict=True)
        ]
    )
    shares_by_objective = {}
    for index, objective in enumerate(objectives):
        if distributions and len({trial.values[index] for trial in study.trials}) > 1:
            shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(), target=_value(index))
            shares_by_objective["KL" if objective.name == KL else objective.name] = dict(
                sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))
            )
    return shares_by_objective


def _value(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[index]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence Optuna's lines about a study in memory, and its warning that it looks at low values, which is intended here."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _parameters(trial: Trial, seed: int) -> dict[str, float | str]:
    """The parameters as they were suggested, as far as the record shows them.

    If a component is off, the value suggested for the edge of its kernel is lost. It had no effect, which a random number
    expresses better than 0, because 0 would stand for "off".
    """
    assert isinstance(trial.params, TrialParams)
    params: dict[str, float | str] = {"scope": trial.params.scope, "direction index": trial.params.direction_index}
    for name, kernel in trial.params.kernels.items():
        drawn = random.Random(f"{seed}:{trial.number}:{name}").random()
        params |= {
            f"{name} max": kernel.max_coeff,
            f"{name} position": kernel.position,
            f"{name} edge": kernel.min_coeff / kernel.max_coeff if kernel.max_coeff else drawn,
            f"{name} distance": kernel.distance,
        }
    return {**params, **trial.params.extra}


def _distributions(params: Sequence[Mapping[str, float | str]]) -> dict[str, BaseDistribution]:
    """The ranges that occurred; a parameter that never changed explains nothing and is left out."""
    distributions: dict[str, BaseDistribution] = {}
    for name in params[0]:
        values = [trial_params[name] for trial_params in params if name in trial_params]
        if len(values) < len(params) or len(set(values)) < 2:
            continue
        if isinstance(values[0], str):
            distributions[name] = CategoricalDistribution(sorted({str(value) for value in values}))
        else:
            numbers = [float(value) for value in values]
            distributions[name] = FloatDistribution(min(numbers), max(numbers))
    return distributions
