"""Ctrl+C and SIGTERM: the first asks to stop at the next safe point, the second stops at once; at a question every one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from abliterate.errors import INTERRUPTED, TERMINATED, Interrupted


class Interrupts:
    """`check` is called at safe points and raises `Interrupted` once a signal has come."""

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
        old = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """While a person is asked something no safe point comes, so `Interrupted` is raised where they are asked."""
        self.check()
        self._asking = True
        try:
            yield
        finally:
            self._asking = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code:
            raise KeyboardInterrupt
        self._exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if self._asking:
            self.check()
