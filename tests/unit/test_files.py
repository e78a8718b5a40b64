"""One process holds a lock, and a look at it keeps nobody out; nothing that exists counts as a new file."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from abliterate import files
from abliterate.errors import AbliterateError, InputError
from abliterate.files import check_new_file, drop_lock, is_locked, take_lock


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    file = take_lock(path)
    assert is_locked(path)
    started = time.monotonic()
    with pytest.raises(BlockingIOError):
        take_lock(path)
    assert time.monotonic() - started >= 0.05
    drop_lock(file, path)
    assert not path.exists()


def test_a_look_at_a_lock_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.touch()
    look = path.open("rb")
    fcntl.flock(look, fcntl.LOCK_SH)  # as `is_locked` does
    monkeypatch.setattr(time, "sleep", lambda seconds: look.close())
    drop_lock(take_lock(path), path)


def test_whatever_has_the_name_of_a_new_file_is_not_replaced(tmp_path: Path) -> None:
    check_new_file(tmp_path / "new")
    check_new_file(tmp_path / ("n" * 5000))  # is told where it is written
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match=f"^The file {path} exists and is not replaced; "):
            check_new_file(path)


def test_a_lock_file_is_removed_where_open_files_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where a lock keeps nobody out, and the file's existence says that a run is at work."""
    monkeypatch.setattr(files, "fcntl", None)
    path, unlink = tmp_path / ".lock", Path.unlink
    file = files.take_lock(path)

    def refuse(self: Path, **options: bool) -> None:
        if not file.closed:
            raise PermissionError(13, "another process has the file open")
        unlink(self, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    assert files.is_locked(path)
    files.drop_lock(file, path)
    assert not files.is_locked(path)


def test_a_reader_of_the_old_file_only_delays_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, replace, slept = iter([True, True, False]), Path.replace, list[float]()

    def refuse(self: Path, target: Path) -> Path:
        if next(tries):
            raise PermissionError(13, "another process has the file open")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    monkeypatch.setattr(files, "IS_WINDOWS", True)
    files.write_atomically(tmp_path / "result.json", "new")
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == "new"
    assert slept == [0.02, 0.05]


def test_a_link_of_the_temporary_name_isnt_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's folder may hold links of any names that can be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("mine", encoding="utf-8")
    (tmp_path / f".report.html.{os.getpid()}.tmp").symlink_to(victim)
    files.write_atomically(tmp_path / "report.html", "new")
    assert (victim.read_text(encoding="utf-8"), (tmp_path / "report.html").is_symlink()) == ("mine", False)
    (tmp_path / ".report.html.guessed.tmp").symlink_to(victim)
    monkeypatch.setattr(files.uuid, "uuid4", lambda: type("Guessed", (), {"hex": "guessed"}))
    with pytest.raises(AbliterateError, match="File exists"):
        files.write_atomically(tmp_path / "report.html", "newer")
    assert victim.read_text(encoding="utf-8") == "mine"
