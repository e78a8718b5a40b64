"""`report.html`: one self-contained offline page made of `result.json`. Knows no model and no tensors."""

from __future__ import annotations

import html
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.rundir import write_atomically

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 0.5rem 0 1.5rem; }}
th, td {{ padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #8885; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.selected {{ font-weight: bold; background: #4a82; }}
pre {{ overflow-x: auto; padding: 0.8rem; border: 1px solid #8885; border-radius: 6px; }}
</style></head><body>
<h1>{title}</h1>
<p>{summary}</p>
<h2>Front</h2><div class="scroll">{front}</div>
<h2>Selected parameters</h2><pre>{params}</pre>
<h2>All trials</h2><div class="scroll">{trials}</div>
<h2>Where the time went</h2><div class="scroll">{timings}</div>
<h2>Model, environment, export</h2><pre>{facts}</pre>
</body></html>
"""


def write_report(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page for `result` (the content of `result.json`)."""
    write_atomically(path, render(result))


def render(result: Mapping[str, Any]) -> str:
    """The page as text; everything that came from outside is escaped."""
    total, before = result["baseline"]["prompts"], result["baseline"]["refusals"]
    by_number = {trial["number"]: trial for trial in result["trials"]}
    chosen = by_number.get(result["selected"])
    summary = f"The base model refuses {before} of {total} harmful evaluation prompts"
    if chosen:
        summary += (
            f"; trial {chosen['number']} refuses {chosen['scores']['refusals']} at a mean first-token KL of "
            f"{chosen['scores']['kl']['mean']:.4f} on the harmless ones"
        )
    facts = {name: result[name] for name in ("model", "environment", "export", "memory", "caches")}
    return _PAGE.format(
        title=html.escape(f"abliterate: {result['model'].get('id', '')}"),
        summary=html.escape(summary + "."),
        front=_trial_table([by_number[number] for number in result["front"]], result),
        params=html.escape(json.dumps(chosen["params"] if chosen else {}, indent=1)),
        trials=_trial_table(result["trials"], result),
        timings=_table(("stage", "seconds"), [(name, f"{spent:.1f}") for name, spent in result["timings"].items()]),
        facts=html.escape(json.dumps(facts, indent=1, ensure_ascii=False)),
    )


def _trial_table(trials: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    rows: list[tuple[Any, ...]] = []
    marked: set[int] = set()
    for trial in trials:
        if trial["number"] == result["selected"]:
            marked.add(len(rows))
        if trial["state"] == "failed":
            rows.append((trial["number"], "failed", trial["reason"], "", "", f"{trial['seconds']:.1f}"))
            continue
        kl, bound = trial["scores"]["kl"], "≥ " if trial["state"] == "stopped" else ""
        values = [f"{kl[name]:.4f}" for name in ("mean", "median", "max")]
        rows.append((trial["number"], f"{bound}{trial['scores']['refusals']}", *values, f"{trial['seconds']:.1f}"))
    return _table(("trial", "refusals", "KL mean", "KL median", "KL max", "seconds"), rows, marked)


def _table(head: Iterable[str], rows: Sequence[Sequence[Any]], marked: Container[int] = ()) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [
        ('<tr class="selected">' if index in marked else "<tr>")
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    ]
    return f"<table><tr>{header}</tr>{''.join(lines)}</table>"
