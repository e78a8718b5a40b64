"""One process holds a lock, and a look at it keeps nobody out; nothing that exists counts as a new file."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest

from abliterate.errors import InputError
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
