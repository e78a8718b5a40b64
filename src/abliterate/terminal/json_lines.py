"""Print the lines of `--json`: one object of strict JSON a line, in ASCII, each with `event`, `format` and `time`.

docs/json.schema.json describes the fields of every line, and docs/generated/json.md describes them to a person. This module
imports nothing heavy, since the command line imports it at its start.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from abliterate.terminal.streams import say_if_unread
from abliterate.types import Table, Trial

# The version of the lines. The content of a result has a version of its own.
FORMAT = 1


def emit(event: str, *, out: TextIO | None = None, **fields: Any) -> None:
    """Print one line on `out`, by default standard output; a number that is not finite becomes null."""
    record = {"event": event, "format": FORMAT, "time": round(time.time(), 3), **fields}
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False)
    # Escaped to ASCII, so that no character is lost in any terminal's encoding and no line separator splits a line.
    print(text, file=out or sys.stdout, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


class JsonReporter:
    """The `Reporter` of `--json`, which ends a run with its result as the last line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def header(self, fields: Mapping[str, str]) -> None:
        self._emit("header", fields=dict(fields))

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self._emit("stage", name=name, detail=detail)

    def stage_ended(self) -> None:
        """Write nothing, because the next line says it."""

    def progress(self, done: int, total: int, unit: str) -> None:
        self._emit("progress", done=done, total=total, unit=unit)

    def note(self, text: str, **fields: Any) -> None:
        self._emit("note", text=text, fields=fields)

    def warn(self, text: str) -> None:
        self._emit("warning", text=text)

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        best_number = None if best is None else best.number
        self._emit("trial", trial=trial.to_record(), total=total, front=front, best=best_number)

    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None:
        self._emit("result", result=dict(result), directory=where)

    def close(self) -> None:
        """Nothing is open."""

    def _emit(self, event: str, **fields: Any) -> None:
        emit(event, out=self._out, **fields)
        say_if_unread(self._out)
