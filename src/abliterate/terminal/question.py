"""Ask which trial is to be exported: keys go through the proposals, and after some time the first one is taken."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TextIO

try:
    import termios
    import tty
except ImportError:  # Windows: the question is answered by a line, without a time limit
    termios = tty = None  # type: ignore[assignment]

What = Literal["export", "chat", "quit"]
# Keys as a terminal sends them.
_UP, _DOWN = ("\x1b[A", "\x1bOA"), ("\x1b[B", "\x1bOB")
_ENTER, _BACKSPACE, _END = ("\r", "\n"), ("\x7f", "\b"), "\x04"
# A key is one character, or a sequence as of → (Esc [ C), F2 (Esc O Q) or Delete (Esc [ 3 ~), whose end is no key of its own.
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|.", re.DOTALL)
_BEGUN = re.compile(r"\x1b(\[[0-?]*[ -/]*|O)?\Z")
# A key's further bytes come at once; what comes later is another key.
_SAME_KEY = 0.05
# An answer as a line: a number, a word, both or nothing; and the key that its word stands for.
_LINE = re.compile(r"([0-9]*)\s*(c|chat|q|quit|n|no)?", re.IGNORECASE)
_MEANT = {"c": "c", "q": "q", "n": "q"}
# Seconds between two looks at whether a job has come to the foreground.
_LOOK = 0.5


@dataclass(frozen=True)
class Choice:
    """What a person wants: to export a trial, to chat with it first, or to leave without an export."""

    what: What
    number: int


@dataclass
class Question:
    """A question for one of `numbers`; the arrow keys move through `listed`, and Enter takes the number that is shown.

    `proposed` is shown first, and is taken after `wait` seconds in which no key was pressed, unless `wait` is infinite.
    """

    numbers: Collection[int]
    listed: Sequence[int]
    proposed: int
    wait: float
    clock: Callable[[], float] = time.monotonic
    _typed: str = field(default="", init=False)
    _moved: bool = field(default=False, init=False)

    def explanation(self) -> str:
        """What each key does."""
        minutes = f"{self.wait / 60:.0f} minutes" if self.wait >= 90 else f"{self.wait:.0f} seconds"
        limited = self.wait < float("inf") and termios is not None
        later = f" If no key is pressed for {minutes}, trial {self.proposed} is exported." if limited else ""
        return (
            "Enter exports the trial that is shown, ↑ and ↓ go through the front, and the number of any complete trial names "
            f"it; c chats with it first, q leaves without an export.{later}"
        )

    def key(self, key: str) -> Choice | None:
        """Take a key; the answer, if it gives one."""
        if key in _ENTER:
            return Choice("export", self.shown) if self.shown in self.numbers else None
        if key == _END:
            return Choice("export", self.proposed)
        if key in ("c", "C") and self.shown in self.numbers:
            return Choice("chat", self.shown)
        if key in ("q", "Q"):
            return Choice("quit", self.proposed)
        if key in _UP or key in _DOWN:
            self._move(-1 if key in _UP else 1)
        elif key in _BACKSPACE:
            self._typed = self._typed[:-1]
        elif key.isascii() and key.isdigit():
            # A digit behind an arrow key begins a number of its own.
            self._typed = key if self._moved else (self._typed + key)[:6]
            self._moved = False
        return None

    @property
    def shown(self) -> int:
        """The number that Enter takes."""
        return int(self._typed) if self._typed else self.proposed

    def line(self) -> str:
        """The question with the present answer."""
        if self.shown not in self.numbers:
            return f"Export trial {self.shown}? (no complete trial)"  # short: a line that wraps can't be cleared
        return f"Export trial {self.shown}? {'(proposed)' if self.shown == self.proposed else ''}".rstrip()

    def _move(self, step: int) -> None:
        at = self.listed.index(self.shown) + step if self.shown in self.listed else 0
        self._typed = str(self.listed[max(0, min(at, len(self.listed) - 1))])
        self._moved = True


def ask(question: Question, source: TextIO | None = None, out: TextIO | None = None) -> Choice:
    """Ask at the terminal that `source` reads and `out` writes, by default standard input and output.

    At the end of the input, and where the terminal has gone, the proposal is taken.
    """
    source, out = source or sys.stdin, out or sys.stdout
    if termios is None:
        return _by_line(question, out)
    begun = question.clock()
    try:
        while not _in_foreground(source.fileno()):
            if question.clock() - begun >= question.wait:
                return Choice("export", question.proposed)
            time.sleep(_LOOK)
        return _by_keys(question, source, out)
    except (OSError, termios.error):
        return Choice("export", question.proposed)


def _in_foreground(descriptor: int) -> bool:
    """Whether this process may read the terminal: a job in the background (`&`) would be stopped for trying."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # not the terminal that controls this process, which therefore isn't a job of it
        return True


def _by_keys(question: Question, source: TextIO, out: TextIO) -> Choice:
    with _single_keys(source.fileno()):
        pressed = question.clock()
        while True:
            out.write(f"\r\x1b[2K{question.line()} ")
            out.flush()
            left = pressed + question.wait - question.clock()
            keys = _keys(source.fileno(), left)
            if keys is None:
                out.write("\n")
                return Choice("export", question.proposed)
            pressed = question.clock()
            for key in keys:
                if (choice := question.key(key)) is not None:
                    out.write("\n")
                    return choice


def _by_line(question: Question, out: TextIO) -> Choice:
    while True:
        out.write(question.line() + " ")
        out.flush()
        try:
            text = input().strip()
        except EOFError:
            return Choice("export", question.proposed)
        answer = _LINE.fullmatch(text)
        if answer is None:
            out.write(f"The answer {text[:40]!r} is none of these. {question.explanation()}\n")
            continue
        number, word = answer.groups()
        question._typed = ""  # each line is an answer of its own
        for key in (*number, _MEANT.get((word or "")[:1].lower(), "\n")):
            if (choice := question.key(key)) is not None:
                return choice


def _keys(descriptor: int, seconds: float) -> list[str] | None:
    """The keys that are pressed next, if any are within so many seconds; the end of the input is one, too."""
    timeout = None if seconds == float("inf") else max(0.0, seconds)
    if not select.select([descriptor], [], [], timeout)[0]:
        return None
    text = _read(descriptor)
    while _BEGUN.search(text) and select.select([descriptor], [], [], _SAME_KEY)[0]:
        text += _read(descriptor)
    return _KEY.findall(text)


def _read(descriptor: int) -> str:
    return os.read(descriptor, 64).decode("utf-8", "replace") or _END


@contextlib.contextmanager
def _single_keys(descriptor: int) -> Iterator[None]:
    """While active, keys come at once and aren't shown; signals work as before. Keys pressed earlier are forgotten."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
