"""Run directories are found by their files, and a mistyped one is told as a run and not as a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from abliterate.artifacts import runs
from abliterate.errors import InputError


def make(path: Path, age: int) -> Path:
    path.mkdir(parents=True)
    (path / runs.JOURNAL).touch()
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_the_newest_runs_come_first(tmp_path: Path) -> None:
    made = [make(tmp_path / name, age) for name, age in (("old", 9), ("new", 0), ("middle", 5))]
    (tmp_path / "no-run").mkdir()
    assert runs.runs_in(tmp_path) == [made[1], made[2], made[0]]
    assert runs.runs_in(tmp_path / "nowhere") == []


def test_what_a_mistyped_run_may_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "make one with abliterate run MODEL." in str(runs.no_run(Path("x")))
    make(Path("runs/Qwen3"), 1)
    assert str(runs.no_run(Path("runs/xyzzy"))).endswith("; the newest run is runs/Qwen3.")
    make(Path("runs/demo"), 0)
    assert str(runs.no_run(Path("runs/qwen3"))).endswith("did you mean runs/Qwen3?")
    assert str(runs.no_run(Path("Qwen3"))).endswith("did you mean runs/Qwen3?")
    assert str(runs.no_run(Path("runs/demo/model"))).endswith("did you mean runs/demo?")
    assert str(runs.no_run(Path("runs/xyzzy"))).endswith("; the newest runs are runs/demo, runs/Qwen3.")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "demo", "elsewhere/x", "~/x"])
def test_models_are_no_mistyped_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make(Path("runs/one"), 0)
    runs.check_no_mistyped_run(name)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.5B-Base", "Qwen/Qwen2.5-1.5B", "Qwen/mine-2"])
def test_hub_ids_beside_runs_in_a_folder_of_their_owner_are_models(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("mine", "mine-1", "Qwen2.5-0.5B", "Qwen3-1.7B"):
        make(Path("Qwen") / run, 0)
    runs.check_no_mistyped_run(name)
    with pytest.raises(InputError, match=f"^There is no run in {name}; "):
        runs.check_no_mistyped_run(name, model=False)


@pytest.mark.parametrize("name", ["runs/two", "one", "others/first-rum", "./others/two", "a/b/two"])
def test_mistyped_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("runs/one", "others/first-run", "a/b/one"):
        make(Path(run), 0)
    with pytest.raises(InputError, match=f"^There is no run in {Path(name)}(; | .*directory.; did you mean)") as caught:
        runs.check_no_mistyped_run(name)
    assert ("a model of that name on the Hub" in str(caught.value)) == (name in ("one", "others/first-rum"))
