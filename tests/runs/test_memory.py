"""Memory during a run: residuals that are streamed, what is kept between trials, and the same numbers whatever is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abliterate.directions import METHODS
from abliterate.pipeline import stages
from abliterate.settings.schema import Settings
from abliterate.settings.sources import merge
from support.runs import copy_run, outcomes, quick_settings, run_in

Finished = tuple[Path, dict[str, Any], Settings]
Files = dict[str, str]


def forbidden(*args: Any, **kwargs: Any) -> Any:
    """Stands for what must not be called."""
    raise AssertionError("must not be called")


def streamed_settings(files: Files, cache: Path, **over: Any) -> Settings:
    """Of a short run that holds no residuals."""
    options = {"efficiency": {"max_residuals_mb": 0}, "search": {"trials": 1}, "export": {"kind": "none"}}
    return quick_settings(files, cache, **merge(options, over))


def test_large_residuals_are_streamed(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    """To the same directions; the means alone are cached, under a key of their own, and serve every later run."""
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
    for name, limit in (("streamed", 0), ("held", 1024)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "stream_residuals", forbidden)
            patch.setattr(stages, "capture_residuals", forbidden)
            settings = streamed_settings(prompt_files, tmp_path / "cache", efficiency={"max_residuals_mb": limit})
            again, recorder = run_in(tmp_path / name, settings)
        assert again["caches"]["residuals"] == {"hits": 2, "misses": 0}
        assert outcomes(again) == outcomes(first)
        assert not any("added up" in note for note in recorder.notes)


def test_streamed_means_depend_on_winsorizing(tmp_path: Path, prompt_files: Files) -> None:
    found = []
    for quantile in (1.0, 0.9):
        settings = streamed_settings(prompt_files, tmp_path / "cache", directions={"winsorize_quantile": quantile})
        result, _ = run_in(tmp_path / str(quantile), settings)
        assert result["caches"]["residuals"] == {"hits": 0, "misses": 2}
        found.append(load_file(tmp_path / str(quantile) / "directions.safetensors")["directions"])
        full, _ = run_in(
            tmp_path / f"full {quantile}",
            streamed_settings(
                prompt_files,
                tmp_path / "other",
                directions={"winsorize_quantile": quantile},
                efficiency={"max_residuals_mb": 99},
            ),
        )
        # Direction options key the directions only: the second run finds the first one's residuals.
        assert full["caches"]["residuals"] == ({"hits": 0, "misses": 2} if quantile == 1 else {"hits": 2, "misses": 0})
        assert torch.equal(load_file(tmp_path / f"full {quantile}" / "directions.safetensors")["directions"], found[-1])
    assert not torch.equal(*found)


def test_cached_residuals_are_used_however_large(finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    path, _, settings = finished
    cache = copy_run(Path(settings.cache_dir), tmp_path / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "stream_residuals", forbidden)
        result, _ = run_in(tmp_path / "run", streamed_settings(prompt_files, cache))
    assert result["caches"]["residuals"] == {"hits": 2, "misses": 0}
    assert torch.equal(*(load_file(run / "directions.safetensors")["directions"] for run in (tmp_path / "run", path)))


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
    _, recorder = run_in(tmp_path / "run", settings)
    assert shapes == [(30, 13, 128)]
    assert not any("added up" in note for note in recorder.notes)


def kept_settings(files: Files, cache: Path, room: int, **over: Any) -> Settings:
    """Of a short run that keeps so many MiB between trials."""
    few = {"search": {"trials": 3, "startup_trials": 3}, "export": {"kind": "none"}, "efficiency": {"max_kept_mb": room}}
    return quick_settings(files, cache, **merge(few, over))


def scores(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each trial: parameters, state, refusals and KL."""
    return [(t["params"], t["state"], t["scores"]["refusals"], t["scores"]["kl"]["mean"]) for t in result["trials"]]


def test_trials_do_not_depend_on_what_is_kept(tmp_path: Path, prompt_files: Files) -> None:
    """Nothing; the prepared edits alone; everything. What is left out is said."""
    found, notes = [], []
    for room in (0, 1, 2048):
        result, recorder = run_in(tmp_path / str(room), kept_settings(prompt_files, tmp_path / "cache", room))
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
