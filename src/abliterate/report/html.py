"""Make pieces of HTML: tables, paragraphs, and answers with their markers. Every text is escaped where it becomes HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from abliterate.report.tables import pair_table
from abliterate.types import Column, Table

escape = html.escape


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """A sentence that stands for something missing."""
    return paragraph(text, "missing")


def table(content: Table) -> str:
    """A table that scrolls by itself, with its legends and notes below."""

    def kind(column: Column) -> str:
        return "" if column.kind == "number" else f' class="{column.kind}"'

    head = "".join(f'<th scope="col"{kind(column)}>{escape(column.heading)}</th>' for column in content.columns)
    lines = [
        ('<tr class="selected">' if index == content.chosen else "<tr>")
        + "".join(f"<td{kind(column)}>{escape(text)}</td>" for column, text in zip(content.columns, row, strict=True))
        + "</tr>"
        for index, row in enumerate(content.texts)
    ]
    # Focusable, so that keys can scroll it.
    title = escape(content.title)
    below = "".join(paragraph(note) for note in content.notes)
    if content.legends and content.rows:
        below = paragraph(" · ".join(content.legends), "quiet") + below
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def pairs(values: Mapping[str, Any], caption: str) -> str:
    """A table of names and values; nested names are dotted."""
    return table(pair_table(caption, [(name, in_words(value)) for name, value in flat(values)]))


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    named: list[tuple[str, Any]] = []
    for name, value in values.items():
        named += flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else [(f"{before}{name}", value)]
    return named


def in_words(value: Any) -> str:
    """A value as a person reads it."""
    if value is None or value in ("", {}, []):
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    """Content that a reader may unfold."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def numbers(facts: Mapping[str, str]) -> str:
    """A few facts in large type."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="numbers">{rows}</dl>'


def answer(title: str, record: Mapping[str, Any]) -> str:
    """One answer with its markers highlighted."""
    says = "still thinking at the limit" if record.get("thinking_open") else "refusal" if record.get("refusal") else ""
    text, position, pieces = record["text"], 0, []
    for start, end in record["markers"]:
        start, end = max(start, position), max(end, position)
        pieces += [escape(text[position:start]), f"<mark>{escape(text[start:end])}</mark>"]
        position = end
    pieces.append(escape(text[position:]))
    shown = "".join(pieces) if text.strip() else '<span class="quiet">(empty)</span>'
    heading = f"{title} · {says}" if says else title
    return f'<div><h5>{escape(heading)}</h5><div class="answer">{shown}</div></div>'


def data(name: str, value: Any) -> str:
    """JSON for the page's script; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
