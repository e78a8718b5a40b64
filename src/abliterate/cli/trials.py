"""`abliterate trials`: which trials are wanted, in which order, and shown as tables, as CSV or as one JSON line.

Reads `result.json` only, which a run at work replaces as a whole: what is shown is one moment of it.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.objectives import DEFAULT, KL, REFUSALS, other_names, to_records
from abliterate.terminal import json_lines
from abliterate.terminal.tables import print_trials
from abliterate.types import Objective, Trial

_STATES = ("complete", "stopped", "failed")
_KERNEL = ("max_coeff", "position", "min_coeff", "distance")
# In these a spreadsheet would see a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _kl(trial: Trial) -> float:
    return trial.kl if "kl" in trial.scores else math.inf


def _refusals(trial: Trial) -> tuple[float, bool]:
    """A bound comes after the same number of a complete trial: its true count may be larger."""
    return (trial.refusals if "refusals" in trial.scores else math.inf), trial.state != "complete"


_ORDERS: dict[str, Callable[[Trial], Any]] = {
    "number": lambda trial: trial.number,
    "kl": lambda trial: (_kl(trial), trial.number),
    "refusals": lambda trial: (*_refusals(trial), _kl(trial), trial.number),
    "seconds": lambda trial: (trial.seconds, trial.number),
}


@dataclass(frozen=True)
class TrialFilter:
    """Which trials, as the options say; None and "" mean all."""

    front: bool = False
    state: str = ""
    max_kl: float | None = None
    max_refusals: int | None = None
    sort: str = "number"
    limit: int | None = None
    where: tuple[str, ...] = ()

    def check(self, scorers: Sequence[str] = ()) -> None:
        """InputError for a value that means nothing, and for options that no trial could satisfy together.

        `scorers`: those of the run beside refusals and KL.
        """
        _check_name("--state", self.state or _STATES[0], _STATES)
        _check_name("--sort", self.sort, (*_ORDERS, *scorers))
        for text in self.where:
            _check_name("--where", _condition(text)[0], (KL, REFUSALS, *scorers))
        if self.max_kl is not None and not self.max_kl >= 0:
            raise InputError(f"The option --max-kl needs a number from 0, not {self.max_kl}.")
        if self.max_refusals is not None and self.max_refusals < 0:
            raise InputError(f"The option --max-refusals needs a number from 0, not {self.max_refusals}.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"The option --limit needs a number from 1, not {self.limit}.")
        if self.front and self.state in ("stopped", "failed"):
            raise InputError(f"The front has complete trials only, so --front and --state {self.state} contradict; give one.")
        if self.state == "failed" and (self.max_kl is not None or self.max_refusals is not None):
            raise InputError("Failed trials have no scores, so --state failed contradicts --max-kl and --max-refusals.")
        if self.state == "stopped" and self.max_refusals is not None:
            raise InputError(
                "Of stopped trials only a lower bound of the refusals is known, so --state stopped contradicts --max-refusals."
            )

    @property
    def in_words(self) -> str:
        """The conditions, without the order; empty where all trials are wanted."""
        conditions = ("on the front" if self.front else "", self.state)
        limits = (
            "" if self.max_kl is None else f"KL ≤ {self.max_kl:g}",
            "" if self.max_refusals is None else f"refusals ≤ {self.max_refusals}",
            *self.where,
            "" if self.limit is None else f"the first {self.limit} by {self.sort}",
        )
        return ", ".join(part for part in (*conditions, *limits) if part)

    def of(self, trials: Sequence[Trial], front: Sequence[int], objectives: Sequence[Objective] = DEFAULT) -> list[Trial]:
        """Those of `trials` that are wanted, in order. What isn't known to satisfy a limit doesn't."""
        conditions = [_condition(text) for text in self.where]
        kept = [
            trial
            for trial in trials
            if (not self.front or trial.number in front)
            and (not self.state or trial.state == self.state)
            and (self.max_kl is None or _kl(trial) <= self.max_kl)
            and (self.max_refusals is None or (trial.state == "complete" and trial.refusals <= self.max_refusals))
            and all(_is_known(trial, name) and holds(trial.value(name)) for name, holds in conditions)
        ]
        return sorted(kept, key=_ORDERS.get(self.sort) or _best_in(self.sort, objectives))[: self.limit]


def _is_known(trial: Trial, name: str) -> bool:
    """Whether a trial has this score, and not only a bound of it."""
    return name in {KL, REFUSALS, *trial.values} & {*trial.scores} and (name != REFUSALS or trial.state == "complete")


def show_trials(path: Path, wanted: TrialFilter, *, as_json: bool, as_csv: bool) -> None:
    """`abliterate trials RUN`."""
    if as_json and as_csv:
        raise InputError("The options --json and --csv contradict each other; give one.")
    directory = RunDirectory(path)
    result = _read(directory)
    trials, objectives = result.trials, result.objectives_or_default()
    wanted.check(_others(trials, objectives))
    chosen = wanted.of(trials, result.front, objectives)
    if as_json:
        json_lines.emit("result", **_record(result, chosen, path))
    elif as_csv:
        _print_csv(csv_rows(result, trials, chosen))
    else:
        print_trials(result.to_record(), trials, chosen, wanted.in_words)


def csv_rows(result: Result, trials: Sequence[Trial], chosen: Sequence[Trial]) -> Iterator[list[Any]]:
    """A header and one flat row a trial; the columns depend on the run, never on which trials are chosen."""
    components = list(dict.fromkeys(name for trial in trials for name in trial.params.kernels))
    others = _others(trials, result.objectives_or_default())
    kernels = [(name, part) for name in components for part in _KERNEL]
    yield [
        *("number", "state", "front", "selected", "refusals", "refusals_exact", "kl_mean", "kl_median", "kl_max"),
        *others,
        *("seconds", "scope", "direction_index"),
        *(f"{name}.{part}" for name, part in kernels),
        "reason",
    ]
    for trial in chosen:
        kl = trial.scores.get("kl", {})
        kernel_of = trial.params.kernels
        yield [
            *(trial.number, trial.state, trial.number in result.front, trial.number == result.selected),
            *(trial.scores.get("refusals"), trial.state == "complete", *(kl.get(name) for name in ("mean", "median", "max"))),
            *(trial.values.get(name, trial.scores.get(name)) for name in others),
            *(trial.seconds, trial.params.scope, trial.params.direction_index),
            *(getattr(kernel_of[name], part) if name in kernel_of else None for name, part in kernels),
            trial.reason,
        ]


def _others(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[str]:
    """The run's scorers beside refusals and KL, objectives first."""
    return other_names({name for trial in trials for name in (*trial.scores, *trial.values)}, objectives)


def _condition(text: str) -> tuple[str, Callable[[float], bool]]:
    """`NAME<=X` or `NAME>=X` as a name and a check."""
    found = re.fullmatch(r"\s*(.+?)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        if found is None or math.isnan(bound := float(found[3])):
            raise ValueError
    except ValueError:
        raise InputError(f"The option --where needs NAME<=X or NAME>=X, not {text!r}.") from None
    return found[1], (lambda value: value <= bound) if found[2] == "<=" else (lambda value: value >= bound)


def _best_in(name: str, objectives: Sequence[Objective]) -> Callable[[Trial], Any]:
    """Sorts by a scorer's value, the best first where it is an objective, else the least; what has none comes last."""
    objective = next((one for one in objectives if one.name == name), Objective(name, "minimize"))
    return lambda trial: (objective.cost(trial.values[name]) if name in trial.values else math.inf, trial.number)


def _print_csv(rows: Iterator[list[Any]]) -> None:
    """RFC 4180: comma, quotes doubled, CRLF at the end of every line; in UTF-8 whatever the terminal's encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    writer = csv.writer(sys.stdout, lineterminator="\r\n")
    for row in rows:
        writer.writerow(map(_cell, row))


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(_FORMULA):
        return "'" + value
    return value


def _record(result: Result, chosen: Sequence[Trial], path: Path) -> dict[str, Any]:
    return {
        "directory": str(path),
        "objectives": to_records(result.objectives_or_default()),
        "baseline": result.baseline.to_record() if result.baseline else None,
        "front": result.front,
        "selected": result.selected,
        "finished": len(result.trials),
        "trials": [trial.to_record() for trial in chosen],
    }


def _read(directory: RunDirectory) -> Result:
    """The run's result; an empty one of a run that hasn't come to its first trial."""
    if directory.holds_run and not directory.result.exists():
        return Result()
    return Result.read(directory)


def _check_name(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}."
        raise InputError(f"The option {option} doesn't know {given!r}; {remedy}")
