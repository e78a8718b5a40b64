"""What `--json` prints: strict JSON, one object a line, in ASCII, each with `event`, `format` and `time`.

Owns the lines; docs/json.schema.json says what is in them, docs/json.md the same to a person. Light at import, for `cli`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from abliterate.types import Trial

# Of the lines. What is in a result has a format of its own (`results.FORMAT`).
FORMAT = 1


def emit(event: str, *, out: TextIO | None = None, **fields: Any) -> None:
    """Print one line, on standard output unless said otherwise; a number that is not finite becomes null."""
    record = {"event": event, "format": FORMAT, "time": round(time.time(), 3), **fields}
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False)
    # Escaped to ASCII: whatever the terminal's encoding, no character is lost, and no line separator splits a line.
    print(text, file=out or sys.stdout, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


class JsonReporter:
    """The `Reporter` of `--json`; the last line of a run is its result."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def header(self, fields: Mapping[str, str]) -> None:
        self._emit("header", fields=dict(fields))

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self._emit("stage", name=name, detail=detail)

    def progress(self, done: int, total: int, unit: str) -> None:
        self._emit("progress", done=done, total=total, unit=unit)

    def note(self, text: str, **fields: Any) -> None:
        self._emit("note", text=text, fields=fields)

    def warn(self, text: str) -> None:
        self._emit("warning", text=text)

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        best_number = None if best is None else best.number
        self._emit("trial", trial=trial.to_record(), total=total, front=front, best=best_number)

    def finish(self, result: Mapping[str, Any], where: str) -> None:
        self._emit("result", result=dict(result), directory=where)

    def close(self) -> None:
        """Nothing is open."""

    def _emit(self, event: str, **fields: Any) -> None:
        emit(event, out=self._out, **fields)
