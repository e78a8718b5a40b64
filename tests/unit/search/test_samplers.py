"""Samplers and start-up sequences: what they draw, and that a resumed study equals an uninterrupted one."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.storages import InMemoryStorage
from scipy.stats.qmc import Sobol

from abliterate.errors import InputError
from abliterate.search.samplers import check_packages, make_sampler, startup_values
from abliterate.search.space import Space, layer_quantile, values_of
from abliterate.search.study import Study, open_study
from abliterate.settings.schema import SearchSettings
from abliterate.types import Kernel, Range, Trial, TrialParams

EXTRA = {"weight.1": Range(0.0, 1.0), "k": Range(1, 15, whole=True), "s": Range(1e-4, 1.0, log=True)}


def space_of(**settings: Any) -> Space:
    return Space(SearchSettings(trials=12, ei_candidates=8, **settings), 12, ("attn.o_proj",), extra=EXTRA)


def finish(study: Study, count: int, *, lose: bool = False) -> None:
    """Carry out trials with made-up scores; `lose`: another one is asked for and never finished."""
    for _ in range(count):
        asked = study.ask()
        assert asked is not None
        kernel = asked.params.kernels["attn.o_proj"]
        refusals = round(100 * math.exp(-kernel.max_coeff * kernel.distance / 4))
        scores = {"kl": {"mean": 0.1 * kernel.max_coeff**2}, "refusals": refusals, "unanswered": {"count": refusals}}
        # Bounds of stopped trials are values like others.
        state = "stopped" if asked.number % 3 == 1 else "complete"
        study.tell(asked, Trial(asked.number, asked.params, state, scores), 100)
    if lose:
        study.ask()


def journal(folder: Path, space: Space, seed: int = 0) -> Study:
    folder.mkdir(exist_ok=True)
    study = open_study("", folder / "study.journal", space, seed)
    study.claim({"model": "m"})
    study.begin(prior=[0.0] * 7 + [0.5] * 5)
    study.fail_interrupted()
    return study


@pytest.mark.parametrize(
    ("sampler", "startup", "count"),
    [("tpe", "sobol", 6), ("gp", "random", 5), ("nsga2", "random", 9), ("nsga2", "sobol", 6)],
)
def test_resuming_after_every_trial_equals_the_uninterrupted_study(
    tmp_path: Path, sampler: str, startup: str, count: int
) -> None:
    """With this seed the third generation of NSGA-II, which trial 8 begins, depends on the order of its parents."""
    space = space_of(sampler=sampler, startup=startup, startup_trials=4)
    whole = journal(tmp_path / "whole", space, seed=2)
    finish(whole, count)
    for _ in range(count):
        finish(journal(tmp_path / "parts", space, seed=2), 1, lose=True)
    assert journal(tmp_path / "parts", space, seed=2).trials() == whole.trials()
    assert len({str(trial.params) for trial in whole.trials()}) > 3  # NSGA-II may repeat a parent


def test_a_sampler_is_made_of_the_seed_and_the_slot() -> None:
    settings = SearchSettings(sampler="nsga2")
    assert make_sampler(settings, 0, 0, 0, liar=False).population_size == 2  # type: ignore[attr-defined]
    drawn = {}
    for seed, slot in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        study = Study(InMemoryStorage(), "s", space_of(sampler="nsga2", startup_trials=3), seed)
        study._study.sampler = make_sampler(settings, 3, seed, slot, liar=False)
        drawn.setdefault((seed, slot), set()).add(study._study.ask().suggest_float("x", 0, 1))
    assert [len(values) for values in drawn.values()] == [1, 1, 1]
    assert len(set.union(*drawn.values())) == 3


def test_sobol_trials_are_the_points_of_one_sequence() -> None:
    """The point of a slot depends on the run's seed and on the slot alone, and a power of two of them fills each interval."""
    space = space_of(startup="sobol")
    points = Sobol(len(space.names), rng=7).random(16)
    for slot in (0, 1, 9, 15):
        coordinates = dict(zip(space.names, points[slot], strict=True))
        assert startup_values(space, 7, slot) == space.at(coordinates.__getitem__)
    values = [startup_values(space, 7, slot) for slot in range(16)]
    last = 11
    cells = sorted(math.floor(16 * (value["direction_index"] / last - 0.4) / 0.5) for value in values)  # type: ignore[operator]
    assert cells == list(range(16))
    assert sorted(value["scope"] for value in values) == ["global"] * 8 + ["per layer"] * 8
    assert startup_values(space, 8, 0) != values[0]
    assert startup_values(space_of(), 7, 0) == {}


def test_start_up_trials_are_sobol_points_and_later_ones_are_the_samplers() -> None:
    space = space_of(startup="sobol", startup_trials=4)
    study = Study(InMemoryStorage(), "s", space, 3)
    finish(study, 6)
    points = [_near(startup_values(space, 3, slot)) for slot in range(4)]
    assert [values_of(trial.params) for trial in study.trials()[:4]] == points  # type: ignore[arg-type]
    assert values_of(study.trials()[5].params) != _near(startup_values(space, 3, 5))  # type: ignore[arg-type]


class _near:
    """Equals values that differ by rounding alone."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, dict)
        return self.values.keys() == other.keys() and all(
            value == other[name] if isinstance(value, str) else math.isclose(value, other[name], rel_tol=1e-12)
            for name, value in self.values.items()
        )

    __hash__ = None  # type: ignore[assignment]


# The layer prior.


@pytest.mark.parametrize(
    ("low", "high", "weights"),
    [
        (0.0, 11.0, [0.1 * layer for layer in range(12)]),
        (6.6, 11.0, [0.0] * 8 + [0.5, 0.1, 0.0, 0.4]),
        (2.2, 2.4, [1.0] * 12),
        (0.0, 3.0, [0.5, -0.3, 0.0, 0.2]),
        (0.0, 11.0, [0.0] * 12),
    ],
)
def test_positions_are_drawn_in_proportion_to_the_weights_of_layers(low: float, high: float, weights: list[float]) -> None:
    """Against a density that is added up on a fine grid."""
    grid = np.linspace(low, high, 200_001)
    middles = (grid[1:] + grid[:-1]) / 2
    density = np.maximum(0, np.array(weights)[np.rint(middles).astype(int)])
    density = density if density.any() else np.ones_like(density)
    cumulated = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
    shares = np.linspace(0.005, 0.995, 67)
    drawn = [layer_quantile(share, low, high, weights) for share in shares]
    assert np.interp(drawn, grid, cumulated) == pytest.approx(shares, abs=1e-4)
    assert drawn == sorted(drawn)
    for share in (0.0, 0.5, 1 - 2**-53):
        position = layer_quantile(share, low, high, weights)
        assert low <= position <= high
        assert max(weights) <= 0 or max(weights[math.floor(position + 0.5)], weights[math.ceil(position - 0.5)]) > 0


def test_equal_weights_change_nothing() -> None:
    for share in (0.0, 0.3, 0.99):
        assert layer_quantile(share, 1.7, 9.9, [0.3] * 12) == pytest.approx(1.7 + share * 8.2)


@pytest.mark.parametrize("startup", ["random", "sobol"])
def test_start_up_trials_follow_the_prior(startup: str) -> None:
    space = space_of(startup=startup, startup_trials=12, prior="silhouette", position=(0.0, 1.0), direction_index=(0.0, 1.0))
    study = Study(InMemoryStorage(), "s", space, 0)
    study.begin(prior=[1.0 if layer == 4 else 0.0 for layer in range(12)])
    finish(study, 12)
    positions = [trial.params.kernels["attn.o_proj"].position for trial in study.trials()]  # type: ignore[union-attr]
    assert all(3.5 <= position <= 4.5 for position in positions)
    assert len(set(positions)) == 12
    assert all(3.5 <= trial.params.direction_index <= 4.5 for trial in study.trials())  # type: ignore[union-attr]


# Values of parameters.


def test_values_give_the_parameters_back() -> None:
    space = space_of()
    for params in space.samples(50, seed=1):
        values = values_of(params)
        assert set(values) == set(space.names)
        assert space.fitted(values) == values
    off = values_of(TrialParams("global", 1.0, {"mlp": Kernel(0.0, 2.0, 0.0, 1.0)}))
    assert "mlp.min_fraction" not in off


def test_values_of_another_model_are_scaled_and_clamped() -> None:
    space = space_of()
    params = space.samples(1, seed=2)[0]
    scaled = values_of(params, 3.0)
    kernel = params.kernels["attn.o_proj"]
    assert scaled["direction_index"] == 3 * params.direction_index
    assert scaled["attn.o_proj.position"] == 3 * kernel.position
    assert scaled["attn.o_proj.distance"] == 3 * kernel.distance
    assert scaled["attn.o_proj.max_coeff"] == kernel.max_coeff
    fitted = space.fitted({**scaled, "k": 99, "other.position": 1.0, "scope": "elsewhere"})
    assert fitted["direction_index"] == pytest.approx(0.9 * 11)
    assert fitted["k"] == 15
    assert set(fitted) == set(space.names) - {"scope"}
    with pytest.raises((TypeError, ValueError)):
        space.fitted({"k": "3"})
    with pytest.raises((TypeError, ValueError)):
        space.fitted({"direction_index": math.nan})


# What a study is given at its beginning.


def test_seeds_are_the_first_trials_and_need_no_other_run_later(tmp_path: Path) -> None:
    space = space_of(startup_trials=5)
    seeds = [values_of(params) for params in space.samples(3, seed=4)]
    seeds[1].pop("k")
    first = open_study("", tmp_path / "study.journal", space, 0)
    first.claim({"model": "m"})
    first.begin(seeds=seeds)
    finish(first, 2, lose=True)
    resumed = open_study("", tmp_path / "study.journal", space, 0)
    resumed.fail_interrupted()
    assert resumed.has("seeds")
    resumed.begin(seeds=[])  # what the study was given before holds
    finish(resumed, 6)
    trials = resumed.trials()
    assert [values_of(trial.params) for trial in trials[:3:2]] == [_near(seeds[0]), _near(seeds[2])]  # type: ignore[arg-type]
    second = values_of(trials[1].params)  # type: ignore[arg-type]
    assert 1 <= second.pop("k") <= 15  # type: ignore[operator]
    assert second == _near(seeds[1])
    # The sampler sees them: it begins after three seeds and two random trials.
    stored = [frozen.params for frozen in resumed._study.trials if frozen.values]
    assert stored[0]["direction_index"] == seeds[0]["direction_index"]
    unseeded = Study(InMemoryStorage(), "s", space, 0)
    finish(unseeded, 5)
    assert unseeded.trials()[3:5] == trials[3:5]


def test_a_study_that_began_without_seeds_takes_none() -> None:
    study = Study(InMemoryStorage(), "s", space_of(), 0)
    finish(study, 1)
    with pytest.raises(InputError, match=r"without search\.seed_from"):
        study.begin(seeds=[{}])


@pytest.mark.parametrize("seeds", [["x"], [{"k": "many"}], [{"direction_index": [1]}], {"k": 1}, 7])
def test_a_strangers_seeds_are_refused_in_a_sentence(seeds: Any) -> None:
    study = Study(InMemoryStorage(), "s", space_of(), 0)
    study.begin(seeds=seeds)
    with pytest.raises(InputError, match=r"The study's seeds can't be read"):
        study.ask()


@pytest.mark.parametrize("settings", [{"sampler": "gp"}, {"startup": "sobol"}])
def test_a_missing_package_is_told_before_the_search(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(SearchSettings(**settings))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package scipy.*samplers"):
        check_packages(SearchSettings(**settings))
    check_packages(SearchSettings())
