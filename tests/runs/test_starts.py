"""Whole runs that look in another way, or begin with the trials of another run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import abliterate as ab
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError, Interrupted
from abliterate.pipeline.run import run
from abliterate.settings.schema import Settings
from support.runs import Recorder, interrupt_after, quick_settings, run_in

Files = Mapping[str, str]
LOOKS = {"sampler": "nsga2", "startup": "sobol", "prior": "silhouette", "kernel": "gaussian"}


def settings_of(files: Files, tmp_path: Path, **search: Any) -> Settings:
    """A run of three short trials."""
    few = {"trials": 3, "startup_trials": 2, "objectives": ["refusals", "kl"], **search}
    return quick_settings(files, tmp_path / "cache", search=few, response={"max_new_tokens": 4}, export={"kind": "none"})


def test_a_run_that_looks_in_another_way_seeds_a_search(prompt_files: Files, tmp_path: Path) -> None:
    first, _ = run_in(tmp_path / "first", settings_of(prompt_files, tmp_path, **LOOKS))
    kernels = [kernel for trial in first["trials"] for kernel in trial["params"]["kernels"].values()]
    assert {kernel["shape"] for kernel in kernels} == {"gaussian"}

    seeded = settings_of(prompt_files, tmp_path, **LOOKS, seed_from=str(tmp_path / "first"))
    with ab.load(seeded.model_copy(update={"seed": 7})) as bench:
        again = next(iter(ab.search(bench, ab.find_directions(bench)))).to_record()
    places = {trial["params"]["direction_index"]: trial for trial in first["trials"]}
    before = places[again["params"]["direction_index"]]
    assert again["scores"]["refusals"] == before["scores"]["refusals"]
    assert again["scores"]["kl"]["mean"] == pytest.approx(before["scores"]["kl"]["mean"], rel=1e-4)


def test_what_a_start_needs_is_told_before_the_search(prompt_files: Files, tmp_path: Path) -> None:
    missing = settings_of(prompt_files, tmp_path, seed_from=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="There is no run"):
        run_in(tmp_path / "run", missing)
    prior = settings_of(prompt_files, tmp_path, prior="silhouette")
    small = prior.model_copy(update={"efficiency": prior.efficiency.model_copy(update={"max_residuals_mb": 0})})
    with pytest.raises(InputError, match=r"search\.prior.*take [1-9]\d* MiB; raise efficiency\.max_residuals_mb"):
        run_in(tmp_path / "run", small)
    assert not (tmp_path / "run").exists()  # so search.prior can be left out, as the sentence says


@pytest.mark.usefixtures("lean")
def test_a_seeded_run_goes_on_without_the_other(
    finished: tuple[Path, dict[str, Any], Settings], prompt_files: Files, tmp_path: Path
) -> None:
    path, before, own = finished
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(path / "result.json", other)
    settings = settings_of(prompt_files, Path(own.cache_dir).parent, seed_from=str(other))
    directory, recorder = RunDirectory(tmp_path / "run"), Recorder()
    with pytest.raises(Interrupted):
        run(settings, recorder, directory, check=interrupt_after(recorder, 1))
    shutil.rmtree(other)
    another = settings.model_copy(update={"search": settings.search.model_copy(update={"seed_from": str(path)})})
    with pytest.raises(InputError, match=rf"begun with trials of {other} and can't"):
        run_in(directory.path, another, resume=True)
    result, _ = run_in(directory.path, settings, resume=True)
    taken, known = ([trial["params"] for trial in record["trials"]] for record in (result, before))
    assert len(taken) == 3
    assert all(params in known for params in taken[:2])
    assert taken[2] not in known
