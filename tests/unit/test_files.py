"""Lock files: one process holds one, and a look at it keeps nobody out."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

import pytest

from abliterate.files import drop_lock, is_locked, take_lock


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
