"""`abliterate trials`: filter and sort the trials of a run, and print them as tables, as CSV or as one JSON line.

It reads `result.json` only. A run at work replaces that file as a whole, so the trials shown are those of one moment.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.objectives import COUNTS, DEFAULT, KL, REFUSALS, UNANSWERED, to_records
from abliterate.report.tables import SearchRecord, exact_trial_table, full_front_table, trial_table
from abliterate.terminal import json_lines
from abliterate.terminal.tables import show_table
from abliterate.types import Objective, Table, Trial

_STATES = ("complete", "stopped", "failed")
# A spreadsheet takes a cell that begins with one of these for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _kl(trial: Trial) -> float:
    return trial.kl if "kl" in trial.scores else math.inf


def _count(trial: Trial, name: str) -> tuple[float, bool]:
    """A bound comes after the same number of a complete trial, because the true count may be larger."""
    return (trial.value(name) if name in trial.scores else math.inf), trial.state != "complete"


_ORDERS: dict[str, Callable[[Trial], Any]] = {
    "number": lambda trial: trial.number,
    "kl": lambda trial: (_kl(trial), trial.number),
    "refusals": lambda trial: (*_count(trial, REFUSALS), _kl(trial), trial.number),
    "unanswered": lambda trial: (*_count(trial, UNANSWERED), _kl(trial), trial.number),
    "seconds": lambda trial: (trial.seconds, trial.number),
}


@dataclass(frozen=True)
class TrialFilter:
    """The options that choose and sort trials; None and "" mean all trials."""

    front: bool = False
    state: str = ""
    max_kl: float | None = None
    max_refusals: int | None = None
    sort: str = "number"
    limit: int | None = None
    where: tuple[str, ...] = ()

    def check(self, scorers: Sequence[str] = ()) -> None:
        """Raise InputError for a value that means nothing, and for options that no trial could satisfy together.

        `scorers`: the run's scorers beside refusals and KL.
        """
        _check_name("--state", self.state or _STATES[0], _STATES)
        _check_name("--sort", self.sort, (*_ORDERS, *scorers))
        for text in self.where:
            _check_name("--where", _condition(text)[0], (KL, *COUNTS, *scorers))
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
        """The conditions without the order; empty where all trials are wanted."""
        conditions = ("on the front" if self.front else "", self.state)
        limits = (
            "" if self.max_kl is None else f"KL ≤ {self.max_kl:g}",
            "" if self.max_refusals is None else f"refusals ≤ {self.max_refusals}",
            *self.where,
            "" if self.limit is None else f"the first {self.limit} by {self.sort}",
        )
        return ", ".join(condition for condition in (*conditions, *limits) if condition)

    def of(self, trials: Sequence[Trial], front: Sequence[int], objectives: Sequence[Objective] = DEFAULT) -> list[Trial]:
        """The wanted ones of `trials`, in order. A trial that isn't known to satisfy a limit is left out."""
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
    """Whether a trial has this score, and not just a bound of it."""
    return name in {KL, REFUSALS, *trial.values} & {*trial.scores} and (name not in COUNTS or trial.state == "complete")


def show_trials(path: Path, wanted: TrialFilter, *, as_json: bool, as_csv: bool) -> None:
    """`abliterate trials RUN`."""
    if as_json and as_csv:
        raise InputError("The options --json and --csv contradict each other; give one.")
    directory = RunDirectory(path)
    result = Result.so_far(directory)
    search = SearchRecord.of(result)
    if result.doubt:
        print(f"warning: {result.doubt}", file=sys.stderr)
    wanted.check(search.others)
    chosen = wanted.of(search.trials, search.front, search.objectives)
    if as_json:
        json_lines.emit("result", **_record(result, chosen, path))
    elif as_csv:
        _print_csv(exact_trial_table(search, chosen))
    else:
        _print_tables(search, chosen, wanted.in_words)


def _print_tables(search: SearchRecord, chosen: Sequence[Trial], conditions: str) -> None:
    """Print the front and then all trials or, where there are conditions, only the trials `chosen` by them."""
    if not search.trials or search.baseline is None:
        print("no trial has finished yet")
        return
    total, wider = len(search.trials), ", a pipe or --csv"
    if not conditions:
        show_table(full_front_table(search), wider)
        print()
    which = f"{len(chosen)} of {total} trials: {conditions}" if conditions else f"All {total} trials"
    base, kinds = search.baseline, search.baseline.unanswered
    unanswered = f" and leaves {kinds['count']}/{search.prompts} unanswered" if kinds is not None else ""
    title = f"{which}; the model itself refuses {base.refusals}/{search.prompts}{unanswered}"
    show_table(trial_table(search, chosen, title), wider)


def _condition(text: str) -> tuple[str, Callable[[float], bool]]:
    """`NAME<=X` or `NAME>=X` as a name and a check."""
    match = re.fullmatch(r"\s*(.+?)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        if match is None or math.isnan(bound := float(match[3])):
            raise ValueError
    except ValueError:
        raise InputError(f"The option --where needs NAME<=X or NAME>=X, not {text!r}.") from None
    return match[1], (lambda value: value <= bound) if match[2] == "<=" else (lambda value: value >= bound)


def _best_in(name: str, objectives: Sequence[Objective]) -> Callable[[Trial], Any]:
    """Sort by a scorer's value: the best first if it is an objective, else the smallest; trials without a value come last."""
    objective = next((objective for objective in objectives if objective.name == name), Objective(name, "minimize"))
    return lambda trial: (objective.cost(trial.values[name]) if name in trial.values else math.inf, trial.number)


def _print_csv(table: Table) -> None:
    """Print RFC 4180: comma, quotes doubled, CRLF at the end of every line; in UTF-8 whatever the terminal's encoding."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    header: Iterable[Any] = [column.key for column in table.columns]
    writer = csv.writer(sys.stdout, lineterminator="\r\n")
    for row in (header, *table.rows):
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


def _check_name(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}."
        raise InputError(f"The option {option} doesn't know {given!r}; {remedy}")
