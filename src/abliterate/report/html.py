"""Make pieces of HTML: tables, paragraphs, and answers with their markers. Every text is escaped where it becomes HTML."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from abliterate.report.tables import pair_table
from abliterate.report.words import explanation
from abliterate.types import Column, Table

escape = html.escape


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """A sentence that stands for something missing."""
    return paragraph(text, "missing")


def term(text: str) -> str:
    """A heading, with its explanation as a hint if it needs one."""
    hint = explanation(text)
    return f'<abbr title="{escape(hint)}">{escape(text)}</abbr>' if hint else escape(text)


def condensed(content: Table) -> tuple[Table, str]:
    """The table without the columns that have the same text in every row, and a line that says these texts once.

    The first column stays, because it names the rows. Of fewer than three rows or columns only empty columns go. The base
    model's row isn't a trial, so it doesn't count where its cell is empty.
    """
    cells = content.texts
    empty = [column.key for index, column in enumerate(content.columns) if index and not any(row[index] for row in cells)]
    content = content.without(empty) if content.rows else content
    if len(content.rows) < 3 or len(content.columns) < 3:
        return content, ""
    common: dict[str, str] = {}
    for index, column in list(enumerate(content.columns))[1:]:
        texts = {
            text[index]
            for text, row in zip(content.texts, content.rows, strict=True)
            if row[index] is not None or "base" not in row
        }
        if len(texts) == 1:
            common[column.key] = f"{column.heading}: {texts.pop()}"
    line = f"The same in every row: {'; '.join(common.values())}." if common else ""
    return content.without(common), line


def table(content: Table) -> str:
    """A table that scrolls by itself, with its legends and notes below; what all its rows share is said once."""
    content, common = condensed(content)

    def kind(column: Column) -> str:
        return "" if column.kind == "number" else f' class="{column.kind}"'

    head = "".join(f'<th scope="col"{kind(column)}>{term(column.heading)}</th>' for column in content.columns)
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
    below = (paragraph(common, "quiet") if common else "") + below
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
    rows = "".join(f"<div><dt>{term(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="numbers">{rows}</dl>'


def beside(*parts: str) -> str:
    """Parts that stand beside each other where the window is wide enough; nothing where all are empty."""
    cells = "".join(f"<div>{part}</div>" for part in parts if part)
    return f'<div class="beside">{cells}</div>' if cells else ""


def glossary(words: Mapping[str, str]) -> str:
    """A list of words and their explanations."""
    return f"<dl>{''.join(f'<div><dt>{escape(word)}</dt><dd>{escape(text)}</dd></div>' for word, text in words.items())}</dl>"


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
