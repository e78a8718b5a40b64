"""Every switch of `[efficiency]`: both positions give the same trials, and each does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import outcomes, quick_settings, run_in

from abliterate.artifacts.cache import ArtifactStore
from abliterate.pipeline import calibrate, from_settings
from abliterate.scorers.refusals import AutomatonMatcher, PlainMatcher
from abliterate.settings.schema import EfficiencySettings, Settings
from abliterate.settings.sources import merge

# All trials random: their parameters then depend on the seed alone, so scores can be compared one by one.
FEW = {
    "search": {"trials": 3, "startup_trials": 3},
    "response": {"max_new_tokens": 12, "detect_prefix": False},
    "export": {"kind": "none"},
}
SVD = {"edit": {"representation": "svd", "rank": 2}}
GRID = merge(SVD, {"edit": {"coeff_grid": 1.0, "direction_grid": 4.0}})
TUNED = {"evaluation": {"batch_size": 0}}

# (switch, its other position, what the run needs besides for the switch to matter)
EXACT: list[tuple[str, Any, dict[str, Any]]] = [
    ("enable_residual_cache", False, {}),
    ("cache_residuals_in_memory", False, {}),
    ("offload_residuals_to_cpu", False, {}),
    ("cache_clear_frequency", 1, {}),
    ("max_residuals_mb", 0, {}),
    ("use_efficient_refusal_detection", False, {}),
    ("use_incremental_adapter_updates", False, {}),
    ("enable_svd_cache", False, SVD),
    ("max_svd_cache_size", 1, SVD),
]
# These change the batch size or what precedes it, so the last bits may move.
ROUNDED = [("use_binary_search_batch_tuning", False, TUNED), ("use_global_warmup", False, TUNED)]
# Other ways to the same numbers; a stopped trial has a bound in place of the count.
ENGINE = (
    "use_trial_engine",
    "use_shared_prefix",
    "use_layer_skip",
    "use_certified_stop",
    "use_settled_rows",
    "use_drafts",
    "use_cacheless_prefill",
    "use_early_prefix_detection",
    "use_memory_recovery",
    "use_free_adapters",
    "max_kept_mb",  # off is 0: nothing is kept
)
ELSEWHERE = ("residual_cache_dir", "use_amp_for_residuals")


def few_settings(files: dict[str, str], cache: Path, **over: Any) -> Settings:
    """Settings of a run of two seconds."""
    return quick_settings(files, cache, **merge(FEW, over))


@pytest.fixture(scope="module")
def references(prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs with the default switches: exact and svd edits."""
    folder = tmp_path_factory.mktemp("references")
    exact, _ = run_in(folder / "exact", few_settings(prompt_files, folder / "cache"))
    svd, _ = run_in(folder / "svd", few_settings(prompt_files, folder / "cache", **SVD))
    return {"exact": exact, "svd": svd}


def assert_close(found: dict[str, Any], expected: dict[str, Any], kl: float, refusals: int = 0) -> None:
    """Equal parameters, and scores within the tolerances."""
    for one, other in zip(found["trials"], expected["trials"], strict=True):
        assert one["params"] == other["params"]
        counts = {trial["state"]: trial["scores"]["refusals"] for trial in (one, other)}
        if set(counts) == {"stopped", "complete"}:
            assert counts["complete"] >= counts["stopped"]
        else:
            assert abs(one["scores"]["refusals"] - other["scores"]["refusals"]) <= refusals
        assert one["scores"]["kl"]["mean"] == pytest.approx(other["scores"]["kl"]["mean"], rel=kl, abs=1e-5)


def test_every_switch_is_tested() -> None:
    tested = {name for name, _, _ in (*EXACT, *ROUNDED)} | set(ENGINE) | set(ELSEWHERE)
    assert tested == set(EfficiencySettings.model_fields)


@pytest.mark.parametrize(("switch", "value", "over"), EXACT, ids=[name for name, _, _ in EXACT])
def test_switch_gives_the_same_trials(
    references: dict[str, dict[str, Any]],
    prompt_files: dict[str, str],
    tmp_path: Path,
    switch: str,
    value: Any,
    over: dict[str, Any],
) -> None:
    assert getattr(EfficiencySettings(), switch) != value
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={switch: value}, **over)
    result, _ = run_in(tmp_path / "run", settings)
    assert outcomes(result) == outcomes(references["svd" if over else "exact"])


@pytest.mark.parametrize(("switch", "value", "over"), ROUNDED, ids=[name for name, _, _ in ROUNDED])
def test_tuning_switch_gives_the_same_scores(
    references: dict[str, dict[str, Any]],
    prompt_files: dict[str, str],
    tmp_path: Path,
    switch: str,
    value: Any,
    over: dict[str, Any],
) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={switch: value}, **over)
    result, _ = run_in(tmp_path / "run", settings)
    assert_close(result, references["exact"], kl=1e-3)


@pytest.mark.parametrize("switch", ENGINE)
def test_engine_switch_gives_the_same_scores(
    references: dict[str, dict[str, Any]], prompt_files: dict[str, str], tmp_path: Path, switch: str
) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={switch: False})
    result, recorder = run_in(tmp_path / "run", settings)
    assert_close(result, references["exact"], kl=1e-4)
    assert recorder.warnings == []


def test_reference_gives_the_same_scores(
    references: dict[str, dict[str, Any]], prompt_files: dict[str, str], tmp_path: Path
) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", **TUNED)
    slow = settings.model_copy(update={"efficiency": settings.efficiency.reference()})
    result, _ = run_in(tmp_path / "run", slow)
    assert_close(result, references["exact"], kl=1e-3)
    assert not (tmp_path / "cache").exists()


def test_amp_within_tolerance(references: dict[str, dict[str, Any]], prompt_files: dict[str, str], tmp_path: Path) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={"use_amp_for_residuals": True})
    result, _ = run_in(tmp_path / "run", settings)
    # bfloat16 turns directions by about a degree: 10 % of the KL, and a refusal or two at the edge
    assert_close(result, references["exact"], kl=0.1, refusals=2)
    assert outcomes(result) != outcomes(references["exact"])  # it was on


def test_residual_cache_dir_is_used(
    references: dict[str, dict[str, Any]], prompt_files: dict[str, str], tmp_path: Path
) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={"residual_cache_dir": str(tmp_path / "there")})
    result, _ = run_in(tmp_path / "run", settings)
    assert len(list((tmp_path / "there" / "residuals").glob("*.safetensors"))) == 2
    assert not (tmp_path / "cache").exists()
    assert outcomes(result) == outcomes(references["exact"])


def test_cache_off_writes_nothing(prompt_files: dict[str, str], tmp_path: Path) -> None:
    settings = few_settings(prompt_files, tmp_path / "cache", efficiency={"enable_residual_cache": False}, search={"trials": 1})
    run_in(tmp_path / "run", settings)
    assert not (tmp_path / "cache").exists()


def test_in_memory_residuals_are_not_read_again(tmp_path: Path) -> None:
    import torch

    for in_memory in (True, False):
        store = ArtifactStore(tmp_path / str(in_memory), warn=print, in_memory=in_memory)
        store.put("residuals", {"k": 1}, {"residuals": torch.ones(2)})
        for path in (tmp_path / str(in_memory)).rglob("*.*"):
            path.unlink()
        assert (store.get("residuals", {"k": 1}) is not None) == in_memory


@pytest.mark.parametrize("enabled", [True, False])
def test_svd_cache_hits_only_when_on(prompt_files: dict[str, str], tmp_path: Path, enabled: bool) -> None:
    switches = {"enable_svd_cache": enabled, "use_incremental_adapter_updates": False}
    result, _ = run_in(tmp_path / "run", few_settings(prompt_files, tmp_path / "cache", efficiency=switches, **GRID))
    assert (result["caches"]["svd"]["hits"] > 0) == enabled
    assert result["caches"]["svd"]["misses"] > 0


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
    # An honest peer warms up once and loses no trial to its batch size.
    assert on == {"use_global_warmup", "use_memory_recovery"}
