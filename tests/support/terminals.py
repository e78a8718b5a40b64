"""Run `abliterate` in a forked process at a pseudo-terminal of the test."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

from support.forked import CONTEXT, abliterate


def _at(name: str, arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    """In the child: begin a session with this terminal, so that Ctrl+C becomes a signal."""
    import fcntl
    import termios

    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(terminal, descriptor)
    os.environ["COLUMNS"] = "200"
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(descriptor, mode, encoding="utf-8", closefd=False) for descriptor, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    if before is not None:
        before()
    try:
        abliterate(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class AtTerminal:
    """`abliterate` in a terminal, up to the moment when `question` is shown; `before` runs in its process."""

    def __init__(self, arguments: Sequence[object], question: str, before: Callable[[], None] | None = None) -> None:
        import pty

        self._terminal, inside = pty.openpty()
        self._process = CONTEXT.Process(target=_at, args=(os.ttyname(inside), [*map(str, arguments)], before), daemon=True)
        self._process.start()
        timer = threading.Timer(120, self._process.kill)
        timer.daemon = True
        timer.start()
        self.seen = ""
        while question not in self.seen and (text := self._read()):
            self.seen += text
        os.close(inside)
        assert question in self.seen

    def press(self, key: bytes) -> int | None:
        """Press a key, and return the exit code; the shown text is in `seen`."""
        time.sleep(0.5)  # until the question waits for input
        os.write(self._terminal, key)
        while text := self._read():
            self.seen += text
        os.close(self._terminal)
        self._process.join()
        return self._process.exitcode

    def _read(self) -> str:
        try:
            return os.read(self._terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""
