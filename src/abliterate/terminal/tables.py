"""Render a `Table` in the terminal: ruled by Rich where a person looks, aligned lines that never wrap in a pipe.

Foreign text (names of models, answers, reasons) never controls the terminal.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Container, Iterable, Sequence
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RuledTable
from rich.text import Text

from abliterate.types import Column, Table

# What would move the cursor, clear the screen, change colours, or turn text around; and halves of surrogate pairs.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Wider than any terminal. Rich caps a table's measured width at the width it is given.
_WIDEST = 10_000
# A text may take several lines; a column of texts needs at least this width.
_FOLDED = 24


def printable(text: str, keep: str = "") -> str:
    """Foreign text with its control characters written as Python writes them, but for those in `keep`."""
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def make_console(**options: Any) -> Console:
    """A console on standard output.

    It reads no emoji codes, for `:train:` in the name of a data set is one, and colours no numbers, which would stand out at
    random.
    """
    return Console(emoji=False, highlight=False, **options)


def between_words(text: str, width: int, indent: str = "") -> str:
    """`text` in lines of `width` columns; a path or id that is longer than a line stays whole, so that it can be copied."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def show_table(table: Table, wider: str = " or a pipe") -> None:
    """Print a table on standard output. `wider` names further places that show all columns."""
    console = make_console()
    if console.is_terminal:
        print_on(console, table, wider)
    else:
        print("\n".join(plain_lines(table)), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Container[str] = ()) -> None:
    """Print plain text as a table on standard output; the columns named in `right` are aligned at the right."""
    made = tuple(Column(name, name, "number" if name in right else "text") for name in columns)
    show_table(Table(title, made, tuple(map(tuple, rows))))


def print_on(console: Console, table: Table, wider: str = " or a pipe") -> None:
    """Print a table on a terminal, without the optional columns for which it is too narrow."""
    shown = _fitting(table, console)
    if table.title:  # above and not in Rich's table, which would break it at the table's width
        console.print(escape(printable(table.title)), style="italic")
    console.print(_ruled(shown, shown.texts))
    remarks = [" · ".join(shown.legends)] if shown.legends else []
    if len(shown.columns) < len(table.columns):
        remarks.append(f"A wider terminal{wider} shows all columns.")
    for note in table.notes:
        console.print(escape(printable(note)))
    for remark in remarks:
        console.print(escape(remark), style="dim")


def plain_lines(table: Table) -> list[str]:
    """A table as aligned lines of text: its title, a header, one line a row, and its notes."""
    # Each row is one line, whatever its cells hold.
    headings = [column.heading for column in table.columns]
    lines = [[printable(" ".join(text.split())) for text in row] for row in (headings, *table.texts)]
    widths = [max(cell_len(line[index]) for line in lines) for index in range(len(headings))]
    shown = [printable(table.title)] if table.title else []
    for line in lines:
        cells = []
        for column, text, width in zip(table.columns, line, widths, strict=True):
            space = " " * (width - cell_len(text))
            cells.append(space + text if column.kind == "number" else text + space)
        shown.append("  ".join(cells).rstrip())
    return [*shown, *map(printable, table.notes)]


def print_marked(before: str, text: str, spans: Iterable[Sequence[int]]) -> None:
    """Print foreign text of several lines with its `spans` highlighted, which a pipe shows in brackets."""
    shown, position = Text(before, style="dim"), 0
    console = make_console()
    left, right = ("", "") if console.is_terminal else ("[", "]")
    for start, end in spans:
        shown.append(printable(text[position:start], "\n\t"), style="not dim")
        shown.append(left + printable(text[start:end], "\n\t") + right, style="not dim bold reverse")
        position = end
    shown.append(printable(text[position:], "\n\t"), style="not dim")
    if console.is_terminal:
        console.print(shown)
    else:
        print(shown.plain)


def _fitting(table: Table, console: Console) -> Table:
    """The table, or the largest part of it that fits: the most optional columns go first."""
    ranks = sorted({column.optional for column in table.columns} - {0}, reverse=True)
    while ranks and _width(table, console) > console.width:
        rank = ranks.pop(0)
        table = table.without([column.key for column in table.columns if column.optional == rank])
    return table


def _width(table: Table, console: Console) -> int:
    """The columns that a table takes if its texts are folded."""
    folds = [column.kind == "text" for column in table.columns]
    rows = [[text[:_FOLDED] if fold else text for text, fold in zip(row, folds, strict=True)] for row in table.texts]
    return console.measure(_ruled(table, rows), options=console.options.update(width=_WIDEST)).maximum


def _ruled(table: Table, rows: Iterable[Sequence[str]]) -> RuledTable:
    """Rich's form of a table, with these texts as its rows."""
    ruled = RuledTable()
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column.kind == "number" else "left"
        ruled.add_column(escape(printable(column.heading)), justify=justify, no_wrap=column.kind == "number")
    for index, row in enumerate(rows):
        style = "bold green" if index == table.chosen else None
        ruled.add_row(*(escape(printable(text)) for text in row), style=style)
    return ruled
