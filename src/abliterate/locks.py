"""Lock files: held by one process at a time, released by the kernel at any end of it. Knows not what is locked."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]


def take_lock(path: Path) -> IO[bytes]:
    """The lock file, made, opened and locked; hand it to `drop_lock`. On a file system without locks, just opened.

    Raises:
        BlockingIOError: another process holds it. OSError: the file can't be made.
    """
    while True:
        file = path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # whoever held it has just removed it: the next one has the name
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file


def drop_lock(file: IO[bytes], path: Path) -> None:
    """Remove the file and release the lock."""
    with contextlib.suppress(OSError):  # Windows removes no open file
        path.unlink(missing_ok=True)
    file.close()
