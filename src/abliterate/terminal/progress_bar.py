"""The reporter of library calls: a plain progress bar on standard error, in notebooks and terminals alike."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

from abliterate.terminal.tables import printable
from abliterate.types import Reporter, Table, Trial


class ProgressBarReporter:
    """Shows one bar for each stage that reports progress, and warnings on lines of their own."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._bar: Any = None
        self._stage = ""
        self._warnings: set[str] = set()

    def header(self, fields: Mapping[str, str]) -> None:
        """Show nothing, because the caller knows the arguments of the call."""

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self.close()
        self._stage = name

    def stage_ended(self) -> None:
        """Keep the bar until the next stage, or the end, replaces it."""

    def progress(self, done: int, total: int, unit: str) -> None:
        if self._bar is None or self._bar.total != total or done < self._bar.n:
            self.close()
            self._bar = tqdm(total=total, desc=self._stage, unit=f" {unit}", file=self._out, leave=False)
        self._bar.update(done - self._bar.n)

    def note(self, text: str, **fields: Any) -> None:
        """Show nothing, because the returned values have the same facts as attributes."""

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            tqdm.write(f"warning: {printable(text)}", file=self._out)

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        """Show nothing, because the caller iterates over the trials."""

    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None:
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def default_reporter() -> Reporter:
    """The reporter of library calls that are given no other."""
    return ProgressBarReporter()
