"""Run `abliterate` in a forked process at a pseudo-terminal of the test."""

from __future__ import annotations

import os
import socket
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
    _run(arguments, before)


def _run(arguments: Sequence[str], before: Callable[[], None] | None) -> None:
    """In the child: run the command line with descriptors 0 to 2 as its terminal."""
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


# What a terminal runs in place of `abliterate`, whose interpreter would start for seconds: it hands the terminal to a forked
# process, passes Ctrl+C on to it, and ends as it does.
PASS_ON = """
import os, signal, socket, sys
forked = socket.socket(socket.AF_UNIX)
forked.connect(sys.argv[1])
socket.send_fds(forked, [os.environ["TERM"].encode()], [0, 1, 2])
number = int(forked.recv(20))
signal.signal(signal.SIGINT, lambda *ignored: os.kill(number, signal.SIGINT))
sys.exit(int(forked.recv(20) or 1))
"""


def serve(place: str, arguments: Sequence[str], before: Callable[[], None] | None = None) -> None:
    """In the child: run `abliterate` in the terminal of whoever runs `PASS_ON` with the socket at `place`."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{place}.begun")
    server.listen(1)
    os.rename(f"{place}.begun", place)  # there when it can be connected to
    other, _ = server.accept()
    kind, descriptors, _, _ = socket.recv_fds(other, 100, 3)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.environ["TERM"] = kind.decode()
    other.send(str(os.getpid()).encode())
    code: object = 0
    try:
        _run(arguments, before)
    except SystemExit as ended:
        code = ended.code or 0
    other.send(str(code).encode())


class Unhurried:
    """In the child: a chat answers with twelve tokens a second, so that there is time to press a key."""

    def __call__(self) -> None:
        from abliterate.chat import generate

        feed = generate._Reading.feed

        def slow(reading: generate._Reading, token: int) -> None:
            time.sleep(0.08)
            feed(reading, token)

        generate._Reading.feed = slow  # type: ignore[method-assign]


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

    def press_and_see(self, keys: bytes, text: str) -> None:
        """Press keys, and wait until the terminal shows `text`."""
        time.sleep(0.5)
        begin = len(self.seen)
        os.write(self._terminal, keys)
        while text not in self.seen[begin:] and (more := self._read()):
            self.seen += more
        assert text in self.seen[begin:], self.seen

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
