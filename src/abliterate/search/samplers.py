"""The samplers that suggest a trial's parameters, and the points that the first trials begin with instead.

Optuna doesn't store a sampler's state, so everything here is made anew for each trial from the run's seed and the trial's slot.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import random
import warnings
from collections.abc import Callable

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial

from abliterate.errors import InputError, install_extra
from abliterate.search.space import Space, Value
from abliterate.settings.schema import SearchSettings


class _Generations(NSGAIISampler):
    """NSGA-II whose parents have one order.

    Optuna gives them in the order of their choice when it chooses them, and later in the order of the storage. A trial that is
    repeated after an interruption would have other parents.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)


def make_sampler(settings: SearchSettings, n_startup: int, seed: int, slot: int, *, liar: bool) -> BaseSampler:
    """The sampler that the settings name, seeded for one slot; `liar`: other trials are running."""
    own = int.from_bytes(hashlib.sha256(f"{seed}:{slot}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if settings.sampler == "gp":
            # It advises a package that would save it a part of its time, in the middle of the list of trials.
            logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)
            return GPSampler(n_startup_trials=max(1, n_startup), seed=own, warn_independent_sampling=False)
        if settings.sampler == "nsga2":
            # A generation has as many trials as there are random ones, and they are the first generation.
            return _Generations(population_size=max(2, n_startup), seed=own)
        return TPESampler(
            n_startup_trials=n_startup,
            n_ei_candidates=settings.ei_candidates,
            multivariate=True,
            constant_liar=liar,
            seed=own,
        )


def startup_values(space: Space, seed: int, slot: int) -> dict[str, Value]:
    """The values of a start-up trial by the settings' sequence and the space's prior; {}: the sampler itself draws them."""
    if space.settings.startup == "sobol":
        return space.at(_sobol_point(space.names, seed, slot))
    if space.prior:
        return space.at(lambda name: random.Random(f"{seed}:{slot}:{name}").random())
    return {}


def _sobol_point(names: tuple[str, ...], seed: int, slot: int) -> Callable[[str], float]:
    """Point number `slot` of the Sobol sequence that `seed` scrambles (Owen 1998), as a coordinate in [0, 1) of each name."""
    from scipy.stats.qmc import Sobol  # it takes half a second, and most searches don't need it

    sequence = Sobol(len(names), scramble=True, rng=seed)
    if slot:
        sequence.fast_forward(slot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the balance of 2^n points is no concern of a single one
        point = sequence.random(1)[0]
    return dict(zip(names, map(float, point), strict=True)).__getitem__


def check_packages(settings: SearchSettings) -> None:
    """InputError if the package that the sampler or the start-up sequence computes with isn't installed."""
    asks = "sampler=gp" if settings.sampler == "gp" else "startup=sobol" if settings.startup == "sobol" else ""
    if asks and importlib.util.find_spec("scipy") is None:
        raise InputError(
            f"The setting search.{asks} needs the package scipy, which isn't installed; run {install_extra('samplers')}."
        )
