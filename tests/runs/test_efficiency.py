"""Every switch of `[efficiency]`: both positions give the same trials, and each does what it says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.cache import ArtifactStore
from abliterate.pipeline import calibrate, from_settings
from abliterate.scorers.refusals import AutomatonMatcher, PlainMatcher
from abliterate.settings.schema import EfficiencySettings, Settings
from abliterate.settings.sources import merge
from support.runs import outcomes, quick_settings, run_in

pytestmark = pytest.mark.usefixtures("lean")
# All trials random: their parameters then depend on the seed alone, so scores can be compared one by one.
FEW = {
    "search": {"trials": 3, "startup_trials": 3},
    "response": {"max_new_tokens": 12, "detect_prefix": False},
    "export": {"kind": "none"},
}
GRID = {"edit": {"representation": "svd", "rank": 2, "coeff_grid": 1.0, "direction_grid": 4.0}}
TUNED = {"evaluation": {"batch_size": 0}}

# Other positions that change no bit of a trial.
EXACT: dict[str, Any] = {
    "enable_residual_cache": False,
    "cache_residuals_in_memory": False,
    "max_residuals_mb": 0,
    "use_efficient_refusal_detection": False,
    "use_incremental_adapter_updates": False,
}
# The same for the memo of svd edits.
MEMO: dict[str, Any] = {"enable_svd_cache": False, "max_svd_cache_size": 1}
# These change the batch size or what precedes it, so the last bits may move.
ROUNDED = {"use_binary_search_batch_tuning": False, "use_global_warmup": False}
# Other ways to the same numbers; a stopped trial has a bound in place of the count.
ENGINE = (
    "use_shared_prefix",
    "use_layer_skip",
    "use_certified_stop",
    "use_settled_rows",
    "use_drafts",
    "max_kept_mb",  # off is 0: nothing is kept
)
# Group i turns off each switch whose three groups name i. With the run in which all are on, any two switches are seen together
# in all four positions, since of two different threes of five numbers neither holds the other and they have one in common.
GROUPS = tuple(
    tuple(switch for switch, three in zip(ENGINE, itertools.combinations(range(5), 3), strict=False) if group in three)
    for group in range(5)
)
# `tests/unit` has these: test_residuals, test_calibrate, test_trial_engine and test_static_cache. A run on a CPU reaches none.
ELSEWHERE = (
    *("offload_residuals_to_cpu", "cache_clear_frequency"),
    *("residual_cache_dir", "use_amp_for_residuals", "use_trial_engine", "use_static_cache"),
)


def few_settings(files: dict[str, str], cache: Path, **over: Any) -> Settings:
    """Settings of a run of two seconds."""
    return quick_settings(files, cache, **merge(FEW, over))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the run with the default switches."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def expected(prompt_files: dict[str, str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with the default switches."""
    return run_in(tmp_path_factory.mktemp("expected") / "run", few_settings(prompt_files, cache))[0]


def assert_close(found: dict[str, Any], expected: dict[str, Any], kl: float, refusals: int = 0) -> None:
    """Equal parameters, and scores within the tolerances."""
    for one, other in zip(found["trials"], expected["trials"], strict=True):
        assert one["params"] == other["params"]
        counts = {trial["state"]: trial["scores"]["refusals"] for trial in (one, other)}
        if set(counts) == {"stopped", "complete"}:
            assert counts["complete"] >= counts["stopped"]
        else:
            assert abs(one["scores"]["refusals"] - other["scores"]["refusals"]) <= refusals
            unanswered = [trial["scores"]["unanswered"]["count"] for trial in (one, other)]
            assert abs(unanswered[0] - unanswered[1]) <= refusals
        assert one["scores"]["kl"]["mean"] == pytest.approx(other["scores"]["kl"]["mean"], rel=kl, abs=1e-5)


def test_every_switch_is_tested() -> None:
    assert {*EXACT, *MEMO, *ROUNDED, *ENGINE, *ELSEWHERE} == set(EfficiencySettings.model_fields)


def test_any_two_engine_switches_meet_in_all_positions() -> None:
    for one, other in itertools.combinations(ENGINE, 2):
        assert {(one in group, other in group) for group in ((), *GROUPS)} == set(itertools.product((True, False), repeat=2))


def test_exact_switches_give_the_same_trials(expected: dict[str, Any], prompt_files: dict[str, str], tmp_path: Path) -> None:
    assert all(getattr(EfficiencySettings(), switch) != value for switch, value in EXACT.items())
    result, _ = run_in(tmp_path / "run", few_settings(prompt_files, tmp_path / "cache", efficiency=EXACT))
    assert outcomes(result) == outcomes(expected)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_memo_of_svd_edits_and_residual_cache_dir_change_no_trial(prompt_files: dict[str, str], tmp_path: Path) -> None:
    found = {}
    for switch in ("", *MEMO):
        switches = {"use_incremental_adapter_updates": False, **({switch: MEMO[switch]} if switch else {})}
        if not switch:  # nor does another place of residuals
            switches["residual_cache_dir"] = str(tmp_path / "there")
        settings = few_settings(prompt_files, tmp_path / "cache", efficiency=switches, **GRID)
        found[switch], _ = run_in(tmp_path / f"run {switch}", settings)
        if not switch:
            assert len(list((tmp_path / "there" / "residuals").glob("*.safetensors"))) == 2
            assert not (tmp_path / "cache").exists()
    assert outcomes(found[""]) == outcomes(found["enable_svd_cache"]) == outcomes(found["max_svd_cache_size"])
    hits = {switch: result["caches"]["svd"]["hits"] for switch, result in found.items()}
    assert hits[""] > hits["enable_svd_cache"] == 0
    assert all(result["caches"]["svd"]["misses"] > 0 for result in found.values())


def test_tuning_switches_give_the_same_scores(expected: dict[str, Any], prompt_files: dict[str, str], tmp_path: Path) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency=ROUNDED, **TUNED)
    result, _ = run_in(tmp_path / "run", settings)
    assert_close(result, expected, kl=1e-3)


# Unit tests of the engine try each switch; whole runs try one here, and the others with ./scripts/test --all.
@pytest.mark.parametrize(
    "off",
    [("use_trial_engine",), *(pytest.param(group, marks=pytest.mark.slow) for group in GROUPS)],
    ids=["engine", *map(str, range(5))],
)
def test_engine_switches_give_the_same_scores(
    expected: dict[str, Any], cache: Path, prompt_files: dict[str, str], tmp_path: Path, off: tuple[str, ...]
) -> None:
    switches = dict.fromkeys(off, False) | {"residual_cache_dir": str(cache)}  # no residual depends on them; a baseline does
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency=switches)
    result, recorder = run_in(tmp_path / "run", settings)
    assert_close(result, expected, kl=1e-4)
    assert recorder.warnings == []


def test_reference_gives_the_same_scores(expected: dict[str, Any], prompt_files: dict[str, str], tmp_path: Path) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", **TUNED)
    slow = settings.model_copy(update={"efficiency": settings.efficiency.reference()})
    result, _ = run_in(tmp_path / "run", slow)
    assert_close(result, expected, kl=1e-3)
    assert not (tmp_path / "cache").exists()


def test_amp_within_tolerance(expected: dict[str, Any], prompt_files: dict[str, str], tmp_path: Path) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={"use_amp_for_residuals": True})
    result, _ = run_in(tmp_path / "run", settings)
    # bfloat16 turns directions by about a degree: 10 % of the KL, and a refusal or two at the edge
    assert_close(result, expected, kl=0.1, refusals=2)
    assert outcomes(result) != outcomes(expected)  # it was on


def test_in_memory_residuals_are_not_read_again(tmp_path: Path) -> None:
    import torch

    for in_memory in (True, False):
        store = ArtifactStore(tmp_path / str(in_memory), warn=print, in_memory=in_memory)
        store.put("residuals", {"k": 1}, {"residuals": torch.ones(2)})
        for path in (tmp_path / str(in_memory)).rglob("*.*"):
            path.unlink()
        assert (store.get("residuals", {"k": 1}) is not None) == in_memory


@pytest.mark.parametrize(("efficient", "matcher"), [(True, AutomatonMatcher), (False, PlainMatcher)])
def test_refusal_detection_switch(prompt_files: dict[str, str], tmp_path: Path, efficient: bool, matcher: type) -> None:
    settings = few_settings(prompt_files, tmp_path, efficiency={"use_efficient_refusal_detection": efficient})
    assert isinstance(from_settings.scorers_of(settings)[0]._matcher, matcher)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("once", "expected"), [(True, 1), (False, 3)])
def test_warm_up_runs_once_or_before_each_probe(once: bool, expected: int) -> None:
    calls: list[int] = []
    warm_up = calibrate.WarmUp(lambda: calls.append(1), once=once)
    for _ in range(3):
        warm_up()
    assert len(calls) == warm_up.runs == expected


def test_reference_turns_every_switch_off() -> None:
    slow = EfficiencySettings().reference()
    on = {name for name, value in slow if value is True}
    assert on == {"use_global_warmup"}  # an honest peer warms up once
