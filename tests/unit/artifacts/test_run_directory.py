"""The run directory: preparing it, names, and atomic writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from abliterate.artifacts.result import Result, damaged
from abliterate.artifacts.run_directory import RunDirectory, default_path, latest_run
from abliterate.errors import AbliterateError, InputError, as_command
from abliterate.export import folder as export_folder
from abliterate.files import safe_name, write_atomically, write_json
from abliterate.search.storage import disk_refused


def make_run(path: Path) -> RunDirectory:
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_json(run.result, {"format": 1})
    run.journal.touch()
    return run


def test_a_new_directory_is_made(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a" / "b")
    run.prepare(resume=False, restart=False)
    assert run.path.is_dir()
    assert not run.holds_run


@pytest.mark.parametrize("name", ["study.name", "study.journal"])
def test_another_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    run = RunDirectory(tmp_path)
    with pytest.raises(InputError, match=r"--resume.*--restart.*--out"):
        run.prepare(resume=False, restart=False)
    assert (tmp_path / name).read_text() == "x"
    run.prepare(resume=True, restart=False)
    assert (tmp_path / name).read_text() == "x"


def test_restart_keeps_the_old_runs_under_other_names(tmp_path: Path) -> None:
    for number in (1, 2):
        run = make_run(tmp_path / "run")
        run.prepare(resume=False, restart=True)
        assert list(run.path.iterdir()) == []
        assert RunDirectory(tmp_path / f"run.old-{number}").holds_run
        run.path.rmdir()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["mine.txt", "settings.toml", "result.json"])
def test_foreign_directories_are_refused(tmp_path: Path, name: str, restart: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("x")
    with pytest.raises(InputError, match="not empty and holds no run"):
        RunDirectory(tmp_path / "mine").prepare(resume=not restart, restart=restart)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine", tmp_path / "mine" / name]


def test_a_run_without_its_study_says_so_and_begins_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run.settings, run.result):
        path.write_text("x")
    run.journal.unlink()
    for resume in (False, True):
        with pytest.raises(InputError, match=r"study .* is gone; put its study.journal back .*--resume.*--restart.*--out"):
            run.prepare(resume=resume, restart=False)
    run.prepare(resume=False, restart=True)
    assert list(run.path.iterdir()) == []
    assert {path.name for path in (tmp_path / "run.old-1").iterdir()} == {run.settings.name, run.result.name}


@pytest.mark.parametrize("restart", [False, True])
def test_files_are_refused(tmp_path: Path, restart: bool) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        RunDirectory(tmp_path / "mine.txt").prepare(resume=False, restart=restart)
    with pytest.raises(InputError, match="--out"):
        RunDirectory(tmp_path / "mine.txt" / "below").prepare(resume=False, restart=restart)
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_an_empty_directory_is_removed_by_who_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    run.remove_if_empty()
    run.prepare(resume=False, restart=False)
    run.remove_if_empty()
    assert not run.path.exists()
    kept = make_run(tmp_path / "kept")
    kept.remove_if_empty()
    assert kept.holds_run
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    for path in (tmp_path / "own", Path()):
        own = RunDirectory(path)
        own.prepare(resume=False, restart=False)
        own.remove_if_empty()
        assert own.path.is_dir()


def test_a_restart_that_came_to_nothing_is_undone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.prepare(resume=False, restart=True)
    assert not run.holds_run
    run.remove_if_empty()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert run.holds_run


def test_no_two_runs_share_a_studys_name(tmp_path: Path) -> None:
    runs = [RunDirectory(tmp_path / folder / "mine") for folder in "ab"]
    for run in runs:
        run.prepare(resume=False, restart=False)
    names = [run.study_name("owner/model") for run in runs]
    assert [RunDirectory(run.path).study_name("other") for run in runs] == names  # kept in the directory
    runs[0].prepare(resume=False, restart=True)
    names.append(runs[0].study_name("owner/model"))
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"abliterate-model-\d{8}-\d{6}-[0-9a-f]{12}", name) for name in names)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen3-0.6B"),
        ("/home/me/models/x y/", "x-y"),
        ("C:\\models\\tiny", "tiny"),
        ("..", "model"),
        ("a/../..", "model"),
        ("", "model"),
        ("m" * 200, "m" * 80),
    ],
)
def test_safe_names(text: str, name: str) -> None:
    assert safe_name(text) == name


def test_default_and_latest_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert latest_run("org/m") is None
    assert default_path("org/m").parent == Path("runs")
    assert default_path("org/m").name.startswith("m-")
    runs = [  # from the oldest to the newest
        ("m-20260101-000000", "org/m"),
        ("m-20260102-000000", "org/m"),
        ("m-20260103-000000", "other/m"),
        ("m-20260104-000000.old-1", "org/m"),
        ("m-Instruct-20260105-000000", "org/m-Instruct"),
        ("m-notes", "org/m"),
    ]
    for number, (name, model) in enumerate(runs):
        make_run(Path("runs") / name).settings.write_text(f'model = "{model}"\n')
        os.utime(Path("runs") / name, (number, number))
    (Path("runs") / "m-20260106-000000").mkdir()  # newest, but no run
    make_run(Path("runs") / "m-20260107-000000")  # of nobody knows which model
    assert latest_run("org/m") == Path("runs") / "m-20260102-000000"
    assert latest_run("m") is None


def test_atomic_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "é")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AbliterateError, match="No space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_one_run_at_a_time_in_a_directory(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), RunDirectory(tmp_path / "run")
    run.refined.mkdir()
    before = {path.name for path in run.path.iterdir()}
    (run.path / ".result.json.123.tmp").write_text("half", encoding="utf-8")  # of a killed run
    for name in (".7.safetensors.123.tmp", ".7.safetensors.tmp", "7.safetensors"):
        (run.refined / name).write_text("half", encoding="utf-8")
    with run.locked():
        run.prepare(resume=True, restart=False)
        assert {path.name for path in run.path.iterdir()} == before | {".lock"}
        assert {path.name for path in run.refined.iterdir()} == {".7.safetensors.tmp", "7.safetensors"}
        for restart in (False, True):
            with pytest.raises(InputError, match="Another run is at work"), other.locked():
                other.prepare(resume=not restart, restart=restart)
    assert {path.name for path in run.path.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with other.locked():  # released
        other.prepare(resume=True, restart=False)


def test_two_new_runs_in_one_directory(tmp_path: Path) -> None:
    """Also before there is a study; and a restart holds the new directory, not the old one."""
    one, two = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with one.locked(), two.locked():
        one.prepare(resume=False, restart=False)
        with pytest.raises(InputError, match="Another run is at work"):
            two.prepare(resume=False, restart=False)
        one.journal.touch()
    with one.locked():
        one.prepare(resume=False, restart=True)
        assert [path.name for path in one.path.iterdir()] == [".lock"]
        assert [path.name for path in (tmp_path / "run.old-1").iterdir()] == ["study.journal"]
        with pytest.raises(InputError, match="Another run is at work"), two.locked():
            two.prepare(resume=False, restart=False)
    one.remove_if_empty()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert one.holds_run  # the restart came to nothing


def test_a_lock_file_alone_is_no_run_of_anybodys(tmp_path: Path) -> None:
    """A run killed at its very beginning leaves it."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".study.name.77.tmp").touch()
    run = RunDirectory(tmp_path)
    with run.locked():
        run.prepare(resume=False, restart=False)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["con", "CON.txt", "nul", "com1", "Lpt9.a.b"])
def test_windows_devices_are_no_names(name: str) -> None:
    assert safe_name(name) == f"model-{name}"
    assert safe_name(f"{name}x") == f"{name}x" or "." in name


@pytest.mark.parametrize("name", ["my run", "it's", "a;b", "$HOME", "run"])
def test_commands_in_sentences_can_be_pasted(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / name)
    path = str(run.path)
    assert shlex.split(as_command("trials", run.path)) == ["abliterate", "trials", path]
    sentence = str(damaged(run, "a fault"))
    again = sentence.partition("(a fault); ")[2].removesuffix(" rebuilds it.")
    assert shlex.split(again) == ["abliterate", "run", "--resume", "--out", path]
    with pytest.raises(InputError) as caught:
        Result().trial(3, run.path)
    assert shlex.split(str(caught.value).partition("; see ")[2].removesuffix(".")) == ["abliterate", "trials", path]
    with run.locked(), pytest.raises(InputError) as caught, RunDirectory(run.path).locked():
        raise AssertionError
    assert shlex.split(str(caught.value).partition("(abliterate ")[2].partition(" would")[0]) == ["worker", path]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "make the disk writable"),
        (errno.EACCES, "get permission to write there"),
        (errno.EIO, "fix the cause"),
    ],
)
def test_a_disk_that_refuses_is_told_what_helps(
    number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(number, os.strerror(number))

    def refuse(*args: object, **options: object) -> None:
        raise error

    said = [str(disk_refused(error)), export_folder.disk_sentence(tmp_path, error)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(AbliterateError) as caught:
            write_atomically(tmp_path / "x", "x")
        said.append(str(caught.value))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(AbliterateError) as caught:
            RunDirectory(tmp_path / "new").prepare(resume=False, restart=False)
        said.append(str(caught.value))
    for sentence in said:
        assert remedy in sentence
        assert os.strerror(number) in sentence
        assert ("free some space" in sentence) == (remedy == "free some space")
