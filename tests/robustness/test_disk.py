"""A full or read-only disk under a run: one sentence, what was paid for is kept, and a resume is as if nothing had been.

Full disks are real ones where root may mount them (`tmpfs`), and everywhere calls that fail as they do on one (`fsync`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import app
from abliterate.errors import AbliterateError
from abliterate.files import write_atomically
from abliterate.model.loader import demo_path
from abliterate.pipeline import context
from abliterate.pipeline import run as pipeline_run
from abliterate.settings.schema import Settings
from support.runs import Recorder, copy_run, outcomes, quick_settings, run_in

Files = dict[str, str]
Finished = tuple[Path, dict[str, Any], Settings]


class Disk:
    """Something that can be full; `place` lies on it."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self) -> None:
        """From now on nothing more fits."""
        with contextlib.suppress(OSError), (self.place / "filler").open("ab", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass

    def free(self) -> None:
        """Room again."""
        (self.place / "filler").unlink()


class PretendedDisk(Disk):
    """Every write that is made durable fails."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(place)
        self.patch = monkeypatch

    def fill(self) -> None:
        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch.setattr(os, "fsync", full)

    def free(self) -> None:
        self.patch.undo()


def mount(place: Path, *options: str) -> None:
    """Skip where that isn't allowed."""
    place.mkdir(parents=True, exist_ok=True)
    command = shutil.which("mount")
    if command is None or subprocess.run([command, *options, str(place)], capture_output=True, check=False).returncode:
        pytest.skip("mounting isn't allowed here")


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    mount(place, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(params=["tmpfs", "fsync"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if request.param == "tmpfs":
        yield Disk(request.getfixturevalue("tmpfs"))
        return
    (tmp_path / "disk").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        yield PretendedDisk(tmp_path / "disk", patch)


class Filling(Recorder):
    """Fills the disk when a stage begins, or when so many trials have ended."""

    def __init__(self, disk: Disk, moment: str | int) -> None:
        super().__init__()
        self._disk, self._moment, self.filled = disk, moment, False

    def _at(self, here: bool) -> None:
        if here and not self.filled:
            self.filled = True
            self._disk.fill()

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        super().stage(name, detail)
        self._at(name == self._moment)

    def trial(self, *args: Any) -> None:
        super().trial(*args)
        self._at(len(self.trials) == self._moment)


MOMENTS: dict[str | int, str] = {
    "load": r"(study|settings\.toml)",
    "residuals": "directions",
    "baseline": "(study|result)",
    2: "(study|result)",
    "export": r"(export|result\.json)",
    "report": r"(report\.html|result\.json)",
}


# Each disk fills at some moments of one run; the others in the long suite.
SHORT = {"tmpfs": ("load", 2, "export"), "fsync": ("residuals", "report")}


@pytest.mark.parametrize(
    ("disk", "moments"),
    [
        *SHORT.items(),
        *(
            pytest.param(kind, tuple(moment for moment in MOMENTS if moment not in short), marks=pytest.mark.slow)
            for kind, short in SHORT.items()
        ),
    ],
    indirect=["disk"],
)
def test_a_full_disk_loses_nothing(moments: tuple[str | int, ...], disk: Disk, finished: Finished, prompt_files: Files) -> None:
    _, first, settings = finished
    own = quick_settings(prompt_files, Path(settings.cache_dir), export={"kind": "adapter"}, search={"trials": 3})
    run, told = disk.place / "run", 0
    for moment in moments:
        recorder = Filling(disk, moment)
        with pytest.raises(AbliterateError, match=MOMENTS[moment]) as caught:
            pipeline_run.run(own, recorder, RunDirectory(run), resume=RunDirectory(run).holds_run)
        assert recorder.filled
        assert caught.value.exit_code == 1
        assert "No space left" in str(caught.value)
        assert "free some space" in str(caught.value)
        assert "\n" not in str(caught.value)
        disk.free()
        assert_kept(told, recorder)
        told += len(recorder.trials)
        if moment == "load" and not RunDirectory(run).holds_run:
            shutil.rmtree(run, ignore_errors=True)
    again = Recorder()
    result = pipeline_run.run(own, again, RunDirectory(run), resume=True).to_record()
    assert outcomes(result) == outcomes(first)[:3]
    assert result["export"]["verified"] is True
    assert_kept(told, again)
    files = "study.journal settings.toml result.json directions.safetensors geometry.json answers.json recipe.json report.html"
    assert {path.name for path in run.iterdir()} == {*files.split(), "model"}
    load_file(run / "model" / "adapter_model.safetensors")


def assert_kept(told: int, recorder: Recorder) -> None:
    """A run that was continued has all trials that had been reported."""
    assert told == 0 or any(f"{count} trials are kept" in note for count in (told, told + 1) for note in recorder.notes)


@pytest.mark.usefixtures("lean")
def test_a_full_cache_is_a_warning(disk: Disk, finished: Finished, tmp_path: Path, prompt_files: Files) -> None:
    over = {"export": {"kind": "none"}, "efficiency": {"cache_residuals_in_memory": False}, "search": {"trials": 2}}
    own = quick_settings(prompt_files, disk.place / "cache", **over)
    if isinstance(disk, PretendedDisk):  # which would be full for the run directory, too
        store = context.make_store(own, recorder := Recorder())
        disk.fill()
        store.put("residuals", {"a": 1}, {"r": torch.ones(2)})
        disk.free()
        assert store.get("residuals", {"a": 1}) is None
    else:
        disk.fill()
        result, recorder = run_in(tmp_path / "run", own)
        disk.free()
        assert outcomes(result) == outcomes(finished[1])[:2]
    assert any("can't be written (No space left on device)" in warning for warning in recorder.warnings)
    assert not list((disk.place / "cache").glob("*/*"))


@pytest.mark.parametrize("name", ["settings.toml", "result.json", "study.name", "directions.safetensors", "report.html"])
def test_files_keep_their_content_on_a_full_disk(name: str, tmpfs: Path) -> None:
    write_atomically(tmpfs / name, "old")
    Disk(tmpfs).fill()
    with pytest.raises(AbliterateError, match=f"{name} can't be written: No space left on device; free some space"):
        write_atomically(tmpfs / name, "new" * 10_000)
    assert (tmpfs / name).read_text() == "old"
    assert {path.name for path in tmpfs.iterdir()} == {name, "filler"}


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The sentence of a command that is bad usage."""
    monkeypatch.setattr(sys, "argv", ["abliterate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    err = " ".join(capsys.readouterr().err.split())
    assert (ended.value.code, "Traceback" in err) == (2, False), err
    assert err.endswith(".")
    return err


@pytest.mark.usefixtures("lean")
def test_read_only_places(
    finished: Finished, prompt_files: Files, tmpfs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out: refused, new or not. Cache: a warning. Model: no matter."""
    path, first, settings = finished
    copy_run(path, tmpfs / "run")
    (tmpfs / "new").mkdir()
    model = copy_run(demo_path() / "model", tmpfs / "demo")
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    config = path / "settings.toml"
    for out, words in ((tmpfs / "run", "can't be written to"), (tmpfs / "new", "can't be written to"), (tmpfs / "x", "made")):
        err = refused(["run", "demo", "-c", config, "-o", out, "--resume"], capsys, monkeypatch)
        assert words in err
        assert "Read-only file system" in err
        assert "free some space" not in err
    own = quick_settings(
        prompt_files,
        tmpfs / "cache",
        model=str(model),
        efficiency={"cache_residuals_in_memory": False},
        export={"kind": "none"},
        search={"trials": 2},
    )
    result, recorder = run_in(tmp_path / "run", own)
    assert outcomes(result) == outcomes(first)[:2]
    assert any("can't be written (Read-only file system)" in warning for warning in recorder.warnings)


@pytest.mark.parametrize("make", [lambda path: path.write_text("x"), lambda path: path.symlink_to(path / "loop")])
def test_what_is_in_the_way_of_directories(
    make: Callable[[Path], Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, finished: Finished
) -> None:
    """A file, and a link to itself, where a directory should be: also for root, whom permissions don't stop."""
    make(tmp_path / "x")
    config = finished[0] / "settings.toml"
    for out in (tmp_path / "x", tmp_path / "x" / "below"):
        assert "--out" in refused(["run", "demo", "-c", config, "-o", out], capsys, monkeypatch)
    refused(["run", tmp_path / "x" / "model", "-o", tmp_path / "run"], capsys, monkeypatch)
    assert not (tmp_path / "run").exists()
