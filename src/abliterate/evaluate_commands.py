"""What `abliterate evaluate` does once its options are read: settings, and the result as tables or as a JSON line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate import commands, events
from abliterate.benchmarks import Tasks
from abliterate.console import make_reporter
from abliterate.evaluating import evaluate as evaluate_candidate
from abliterate.evaluating import parse_candidate
from abliterate.rundir import RunDirectory
from abliterate.settings_sources import load_settings, merge, read_toml
from abliterate.tables import heldout_lines, print_table

# Of a run's settings: what is its own affair, and not how its trials are to be measured.
_NOT_THE_RUNS = ("cache_dir", "device", "export", "out", "model")


def evaluate(text: str, given: Mapping[str, Any], config: str, assignments: list[str], tasks: Tasks, *, as_json: bool) -> None:
    """`abliterate evaluate BASE CANDIDATE`; a run's trial is measured with the run's own settings, unless others are given."""
    candidate = parse_candidate(text)
    options = commands.options_of(given, assignments)
    if candidate.kind == "trial":
        directory = RunDirectory(Path(candidate.place))
        directory.read_result()  # "no run there" comes first
        stored = {name: part for name, part in read_toml(directory.settings).items() if name not in _NOT_THE_RUNS}
        options = merge(stored, options)
    settings = load_settings(config, options)
    commands.quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    with commands.ending_at_once(reporter, "interrupted; nothing was changed."):
        found = evaluate_candidate(settings, reporter, candidate, tasks)
    if as_json:
        events.emit("result", **found)
        return
    for line in heldout_lines(found["heldout"]):
        print(line)
    if found["benchmarks"]:
        rows = [_cells(row) for row in found["benchmarks"]]
        print_table(("task", "metric", "base", "candidate"), rows, "lm-eval", ("base", "candidate"))


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    return row["task"], row["metric"] + arrow, *(_number(row[name]) for name in ("base", "candidate"))


def _number(value: Mapping[str, Any]) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
    return f"{value['value']:.4f}{error}"
