"""`abliterate evaluate`: resolve the settings, measure the candidate, and show the result as tables or as a JSON line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import exit
from abliterate.errors import AbliterateError
from abliterate.evaluation.lm_eval import Tasks
from abliterate.pipeline.evaluate import evaluate as evaluate_candidate
from abliterate.pipeline.evaluate import parse_candidate
from abliterate.report.tables import heldout_table
from abliterate.settings.sources import by_section, load_settings, options_of
from abliterate.settings.untrusted import Request, code_note, scorers_note, to_measure, unsaid, with_places_of, without
from abliterate.terminal import json_lines
from abliterate.terminal.reporters import make_reporter
from abliterate.terminal.tables import print_table, show_table


def evaluate(text: str, given: Mapping[str, Any], config: str, assignments: list[str], tasks: Tasks, *, as_json: bool) -> None:
    """`abliterate evaluate BASE CANDIDATE`; a run's trial is measured with the run's settings where no others are given."""
    candidate = parse_candidate(text)
    options = options_of(given, assignments)
    left_out: tuple[Request, ...] = ()
    of_run: dict[str, Any] = {}
    directory = RunDirectory(Path(candidate.source)) if candidate.kind == "trial" else None
    doubt = Result.read(directory).doubt if directory else ""  # read first, so that "no run there" is the first error
    own = load_settings(config, options)
    if directory:
        stored = directory.stored_settings()
        left_out = unsaid(stored, own, directory.path)
        of_run = to_measure(without(stored, left_out))
    # What the trial is, neither a configuration file nor the environment changes; what it is measured on may be another.
    trial: dict[str, Any] = {name: of_run.pop(name) for name in ("seed", "directions", "edit", "load") if name in of_run}
    settings = with_places_of(own, load_settings(config, by_section(trial, options), stored=of_run))
    exit.quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    for note in filter(None, (doubt, scorers_note(left_out), code_note(left_out))):
        reporter.warn(note)

    def show(heldout: Mapping[str, Any]) -> None:
        if not as_json:
            reporter.close()
            show_table(heldout_table(heldout, "candidate"))

    with exit.ending_at_once(reporter, "interrupted; nothing was changed.", as_json=as_json):
        record = evaluate_candidate(settings, reporter, candidate, tasks, show=show)
    if as_json:
        json_lines.emit("result", **record)
    elif record["benchmarks"]:
        rows = [_cells(row) for row in record["benchmarks"]]
        print_table(("task", "metric", "base", "candidate"), rows, "lm-eval", ("base", "candidate"))
    if record["error"]:
        raise AbliterateError(f"There are no benchmarks ({record['error']}); the held-out figures stand.")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    return row["task"], row["metric"] + arrow, *(_number(row[name]) for name in ("base", "candidate"))


def _number(value: Mapping[str, Any]) -> str:
    error = "" if value["stderr"] is None else f" ± {value['stderr']:.4f}"
    return f"{value['value']:.4f}{error}"
