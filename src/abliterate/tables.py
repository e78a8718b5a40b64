"""Results as tables on the terminal. With `console`, all of Rich."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from abliterate.types import Trial

# What would move the cursor, clear the screen, change colours, or turn text around; and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """Text of anybody's making as a terminal may be given it: control characters as they are written in Python."""
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def make_console() -> Console:
    """A console for tables on standard output."""
    return Console()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """A table of plain text on standard output."""
    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    make_console().print(table)


def front_table(result: Mapping[str, Any], marked: int | None = None) -> Table:
    """The front as a table, the selected trial marked; the baseline as its first row."""
    selected = result["selected"] if marked is None else marked
    total = result["baseline"]["prompts"]
    table = Table(title="Front: every trial that no other beats on both scores", title_justify="left")
    for column in ("", "trial", "refusals", "KL mean", "KL median", "KL max"):
        table.add_column(column, justify="right")
    table.add_row("", "base", f"{result['baseline']['refusals']}/{total}", "0", "0", "0", style="dim")
    by_number = {record["number"]: Trial.from_record(record) for record in result["trials"]}
    for number in result["front"]:
        trial = by_number[number]
        kl = trial.scores["kl"]
        cells = [f"{kl[name]:.4f}" for name in ("mean", "median", "max")]
        style = "bold green" if number == selected else None
        table.add_row("→" if number == selected else "", str(number), f"{trial.refusals}/{total}", *cells, style=style)
    return table


def component_table(coverage: Mapping[str, Any]) -> Table:
    """What writes to the residual stream, and whether it is edited; `coverage` as in `inspection.inspect`."""
    total = sum(group["parameters"] for group in coverage["groups"])
    table = Table(title="What writes to the residual stream", title_justify="left")
    for column, justify in (("component", "left"), ("module", "left"), ("layers", "right"), ("matrices", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("d_out × d_in", "parameters", "share"):
        table.add_column(column, justify="right")
    table.add_column("edited")
    for group in coverage["groups"]:
        shape = " × ".join(map(str, group["shape"])) if group["shape"] else "?"
        counts = [str(group["layers"]), str(group["matrices"]), shape, f"{group['parameters']:,}"]
        edited = "[green]yes[/]" if group["edited"] else f"[yellow]no: {escape(printable(group['left_out']))}[/]"
        cells = [
            *(escape(printable(group[name])) for name in ("component", "path")),
            *counts,
            f"{group['parameters'] / total:.1%}",
        ]
        table.add_row(*cells, edited)
    return table
