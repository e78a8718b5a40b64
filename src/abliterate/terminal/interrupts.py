"""Handle Ctrl+C, SIGTERM and SIGHUP: the first signal stops the run at the next safe point, the second stops it at once.

A safe point is a call of `check`: after each pass, at each stage, and at each reported step of progress. While the user is
asked a question, and in stages that have no safe points and lose nothing, the first signal stops the run at once, too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

from abliterate.errors import INTERRUPTED, TERMINATED, Interrupted
from abliterate.types import Reporter


def end_with(descriptor: int, patience: float = 20.0) -> None:
    """Let this process end as SIGTERM ends it when the pipe `descriptor` ends, whose other end the parent process holds open.

    A pipe ends when the process at its other end is gone, however it went. If no safe point comes within `patience` seconds,
    the process ends at once.
    """

    def watch() -> None:
        # Not by a Python stream: a thread that waits in one can't be left behind when the interpreter ends.
        while os.read(descriptor, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="end with the run").start()


class Interrupts:
    """Turns signals into `Interrupted`, which `check` raises at the next safe point."""

    def __init__(self) -> None:
        self._exit_code = 0
        self._asking = False

    def check(self) -> None:
        """Raise `Interrupted` if a signal has come since `listening` began."""
        if self._exit_code:
            raise Interrupted(self._exit_code)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals while active; the old handlers come back afterwards."""
        old = {number: signal.signal(number, self._handle) for number in _handled()}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While active, a signal raises `Interrupted` at once; a question to the user has no safe point."""
        self.check()
        self._asking = True
        try:
            yield
        finally:
            self._asking = False

    def watched(self, reporter: Reporter) -> Reporter:
        """The same reporter, with its stages and steps as safe points."""
        return cast(Reporter, _Watched(self, reporter))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code:
            raise KeyboardInterrupt(self._exit_code)
        self._exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if self._asking:
            self.check()


def _handled() -> tuple[signal.Signals, ...]:
    """The signals that stop a run. A closed terminal's isn't among them where the user has it ignored (`nohup`)."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hangup


class _Watched:
    def __init__(self, interrupts: Interrupts, reporter: Reporter) -> None:
        self._interrupts = interrupts
        self._reporter = reporter

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self._interrupts._asking = at_once
        self._interrupts.check()
        self._reporter.stage(name, detail, at_once=at_once)

    def stage_ended(self) -> None:
        self._interrupts._asking = False
        self._reporter.stage_ended()

    def progress(self, done: int, total: int, unit: str) -> None:
        self._interrupts.check()
        self._reporter.progress(done, total, unit)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)
