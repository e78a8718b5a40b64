"""Read the messages and commands of a chat: line editing and history on a terminal, plain lines in a pipe, and Ctrl+C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

try:
    import readline
except ImportError:  # Windows: the console has its own line editing
    readline = None  # type: ignore[assignment]

_HISTORY_LENGTH = 1000
_FENCE = '"""'
_MORE = "… "


class Lines(Protocol):
    """The source of messages and commands."""

    interactive: bool

    def read(self, prompt: str) -> str:
        """The next message or command; EOFError if there is none, KeyboardInterrupt if the person starts the line anew."""


class PipedLines:
    """`Lines` from a pipe: every line is a message or a command."""

    interactive = False

    def __init__(self, source: TextIO) -> None:
        self._source = source

    def read(self, prompt: str) -> str:
        # No prompt is shown, because nobody would see it.
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


class TypedLines:
    """`Lines` typed at a terminal, with a history kept in `file`; a trailing backslash or three quotes continue the input."""

    interactive = True

    def __init__(self, file: Path, commands: Sequence[str], ask: Callable[[str], str] = input) -> None:
        self._file = file
        self._ask = ask
        self._kept = 0
        if readline is not None:
            self._set_up(commands)

    def read(self, prompt: str) -> str:
        try:
            line = self._ask(prompt)
            if line.strip().startswith(_FENCE):
                return _clean(self._fenced(line.strip()[len(_FENCE) :]))
            while line.endswith("\\"):
                line = f"{line[:-1]}\n{self._ask(_MORE)}"
            return _clean(line)
        finally:
            self._keep()

    def _fenced(self, first: str) -> str:
        lines = [first] if first else []
        if first.endswith(_FENCE):
            return first[: -len(_FENCE)]
        while not (line := self._ask(_MORE)).rstrip().endswith(_FENCE):
            lines.append(line)
        last = line.rstrip()[: -len(_FENCE)]
        return "\n".join([*lines, *([last] if last else [])])

    def _set_up(self, commands: Sequence[str]) -> None:
        with contextlib.suppress(OSError):  # a chat works without a history, if there is none yet or it can't be read
            readline.read_history_file(self._file)
        readline.set_history_length(_HISTORY_LENGTH)
        self._kept = readline.get_current_history_length()

        def complete(text: str, state: int) -> str | None:
            matches = [name for name in commands if text and name.startswith(text)]
            return matches[state] if state < len(matches) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")

    def _keep(self) -> None:
        """Append new lines to the file at once, since a chat may be killed. Only its owner may read the file."""
        if readline is None:
            return
        length = readline.get_current_history_length()
        new, self._kept = length - self._kept, length
        if new <= 0:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_CREAT | os.O_WRONLY, 0o600))
            self._file.chmod(0o600)
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(new, self._file)
            else:  # libedit
                readline.write_history_file(self._file)
            self._file.chmod(0o600)


def _clean(text: str) -> str:
    """`text` with question marks for bytes of another encoding, which can't be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Presses:
    """Ctrl+C and SIGTERM while answers are generated: the first ends the answer at its next token, the second at once."""

    def __init__(self) -> None:
        self._count = 0
        self.signal = 0

    def next_answer(self) -> None:
        """A new answer begins: a Ctrl+C that ended the last answer was meant for that answer only."""
        if self.signal == signal.SIGINT:
            self._count, self.signal = 0, 0

    def wanted(self) -> bool:
        """Whether the answer should end."""
        return self._count > 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle both signals while active."""
        self._count, self.signal = 0, 0
        with handling({signal.SIGINT: self._handle, signal.SIGTERM: self._handle}):
            yield

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self.signal = signal.SIGTERM if number == signal.SIGTERM else self.signal or number
        if self._count > 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def handling(handlers: dict[Any, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Install signal handlers while active; the old handlers are restored."""
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def at_terminal() -> bool:
    """Whether a person types the messages and sees the answers."""
    return sys.stdin.isatty() and sys.stdout.isatty()
