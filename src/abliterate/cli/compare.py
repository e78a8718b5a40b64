"""`abliterate compare`: the fronts of several runs beside each other, and what differs between the runs. It loads no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.files import write_atomically
from abliterate.objectives import to_records
from abliterate.report.compare import Comparison, compare, differences, differences_table, fronts_table, runs_table, verdict
from abliterate.report.compare_page import compare_page, fronts_lines
from abliterate.terminal import json_lines
from abliterate.terminal.tables import printable, show_table
from abliterate.types import Trial


def compare_runs(paths: Sequence[Path], page: Path | None, select: str, *, as_json: bool) -> None:
    """Print the comparison, and write it as a page to `page`, if that is given; an older page there is replaced."""
    if page is not None and page.suffix.lower() not in (".html", ".htm"):  # an older file there is replaced
        raise InputError(f"The page of a comparison is HTML, and {page} doesn't end in .html; give such a name with -o.")
    found = compare([RunDirectory(path) for path in paths], select)
    for run in found.runs:
        for doubt in run.doubts:
            _warn(f"{run.label}: {doubt}")
    if page is not None:
        write_atomically(page, compare_page(found, _warn))
    if as_json:
        json_lines.emit("result", **_record(found, paths))
        return
    print("\n".join(map(printable, verdict(found))))
    for table in (runs_table(found), fronts_table(found)):
        print()
        show_table(table)
    print()
    print("\n".join(map(printable, fronts_lines(found))))
    print()
    show_table(differences_table(found))
    if page is not None:
        print(printable(str(page)))


def _warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def _record(found: Comparison, paths: Sequence[Path]) -> dict[str, Any]:
    def place(owner: int, trial: Trial) -> dict[str, Any]:
        return {"directory": str(paths[owner]), "trial": trial.number}

    return {
        "comparable": not found.obstacles,
        "obstacles": list(found.obstacles),
        "rule": found.rule,
        "best": None if found.best is None else place(*found.best),
        "common_front": [place(*one) for one in found.front],
        "runs": [
            {
                "directory": str(path),
                "objectives": to_records(run.search.objectives),
                "baseline": run.search.baseline.to_record() if run.search.baseline else None,
                "selected": run.search.selected,
                "trials": [trial.to_record() for trial in run.search.front_trials],
            }
            for path, run in zip(paths, found.runs, strict=True)
        ],
        "differences": [{"name": name, "values": values} for name, values in differences(found).items()],
    }
