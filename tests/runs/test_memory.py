"""Memory during a run: residuals that are streamed, what is kept between trials, and the same numbers whatever is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abliterate.directions import METHODS
from abliterate.pipeline import stages
from abliterate.pipeline.workbench import load
from abliterate.settings.schema import Settings
from abliterate.settings.sources import merge
from support.cli import forbidden
from support.runs import Recorder, copy_run, outcomes, quick_settings, run_in

pytestmark = pytest.mark.usefixtures("lean")
Finished = tuple[Path, dict[str, Any], Settings]
Files = dict[str, str]


def streamed_settings(files: Files, cache: Path, **over: Any) -> Settings:
    """Of a short run that holds no residuals."""
    options = {"efficiency": {"max_residuals_mb": 0}, "search": {"trials": 1}, "export": {"kind": "none"}}
    return quick_settings(files, cache, **merge(options, over))


def directions_of(settings: Settings) -> tuple[torch.Tensor, dict[str, int], Recorder]:
    """A run's directions without the rest of it: (directions, how often residuals came from the cache or not, reporter)."""
    recorder = Recorder()
    with load(settings, recorder) as bench:
        directions = stages.directions(bench.context, stages.residuals(bench))
        return directions.vectors, dict(bench.context.store.counts("residuals")), recorder


def test_large_residuals_are_streamed(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    """To the same directions; the means alone are cached, under a key of their own, and serve later runs that stream."""
    path, _, _ = finished
    expected = load_file(path / "directions.safetensors")["directions"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "capture_residuals", forbidden)
        first, recorder = run_in(tmp_path / "one", streamed_settings(prompt_files, tmp_path / "cache"))
    assert sum("added up as they come" in note for note in recorder.notes) == 2
    assert torch.equal(load_file(tmp_path / "one" / "directions.safetensors")["directions"], expected)
    entries = [load_file(entry) for entry in (tmp_path / "cache" / "residuals").glob("*.safetensors")]
    assert [{name: (part.dtype, part.ndim) for name, part in entry.items()} for entry in entries] == 2 * [
        {"means": (torch.float64, 2)}
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "stream_residuals", forbidden)
        patch.setattr(stages, "capture_residuals", forbidden)
        streamed = streamed_settings(prompt_files, tmp_path / "cache")
        found, counts, recorder = directions_of(streamed)
        assert torch.equal(found, expected)
        assert counts == {"hits": 2, "misses": 0}
        assert not any("added up" in note for note in recorder.notes)
    held = streamed_settings(prompt_files, tmp_path / "cache", efficiency={"max_residuals_mb": 1024})
    again, recorder = run_in(tmp_path / "held", held)
    assert again["caches"]["residuals"] == {"hits": 0, "misses": 2}, "the report's projection needs the residuals themselves"
    assert outcomes(again) == outcomes(first)
    assert not any("added up" in note for note in recorder.notes)


def test_streamed_means_depend_on_winsorizing(tmp_path: Path, prompt_files: Files) -> None:
    found = []
    for quantile in (1.0, 0.9):
        given = {"directions": {"winsorize_quantile": quantile}}
        streamed, counts, _ = directions_of(streamed_settings(prompt_files, tmp_path / "cache", **given))
        assert counts == {"hits": 0, "misses": 2}
        found.append(streamed)
        whole = streamed_settings(prompt_files, tmp_path / "other", efficiency={"max_residuals_mb": 99}, **given)
        full, counts, _ = directions_of(whole)
        # Direction options key the directions only: the second time, the first one's residuals are found.
        assert counts == ({"hits": 0, "misses": 2} if quantile == 1 else {"hits": 2, "misses": 0})
        assert torch.equal(full, streamed)
    assert not torch.equal(*found)


def test_cached_residuals_are_used_however_large(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    path, _, settings = finished
    cache = copy_run(Path(settings.cache_dir), tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "stream_residuals", forbidden)
        found, counts, _ = directions_of(streamed_settings(prompt_files, cache))
    assert counts == {"hits": 2, "misses": 0}
    assert torch.equal(found, load_file(path / "directions.safetensors")["directions"])


def test_a_method_that_needs_all_residuals_gets_them(
    tmp_path: Path, prompt_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    class Whole:
        name = "whole"

        def compute(self, harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(harmful.shape))
            assert harmful.dtype == torch.float32
            return METHODS["projected"].compute(harmful.double().mean(0), harmless.double().mean(0))

    monkeypatch.setitem(METHODS, "whole", Whole())
    monkeypatch.setattr(stages, "stream_residuals", forbidden)
    settings = streamed_settings(prompt_files, tmp_path / "cache", directions={"method": "whole"})
    _, _, recorder = directions_of(settings)
    assert shapes == [(30, 13, 128)]
    assert not any("added up" in note for note in recorder.notes)


def kept_settings(files: Files, cache: Path, room: int, **over: Any) -> Settings:
    """Of a short run that keeps so many MiB between trials."""
    few = {"search": {"trials": 3, "startup_trials": 3}, "export": {"kind": "none"}, "efficiency": {"max_kept_mb": room}}
    return quick_settings(files, cache, **merge(few, over))


def scores(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each trial: parameters, state, refusals and KL."""
    return [(t["params"], t["state"], t["scores"]["refusals"], t["scores"]["kl"]["mean"]) for t in result["trials"]]


def test_trials_do_not_depend_on_what_is_kept(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    """Nothing; the prepared edits alone; everything. What is left out is said."""
    found, notes = [], []
    for room in (0, 1, 2048):
        result, recorder = run_in(tmp_path / str(room), kept_settings(prompt_files, Path(finished[2].cache_dir), room))
        found.append(scores(result))
        notes.append([note for note in recorder.notes if "max_kept_mb" in note])
        assert recorder.warnings == []
    for some in found[:-1]:
        for one, other in zip(some, found[-1], strict=True):
            assert one[:-1] == other[:-1]
            assert one[-1] == pytest.approx(other[-1], rel=1e-4, abs=1e-5)
    assert ["prepared again in each trial" in note for note in notes[0]] == [True, False]
    assert "no pass begins there" in notes[0][1]
    assert any("no pass begins there" in note for note in notes[1])
    assert notes[2] == []
