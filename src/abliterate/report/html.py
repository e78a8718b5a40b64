"""Pieces of HTML: tables, texts, answers with their markers. Where text becomes HTML, it is escaped.

Knows no run; what a run's records mean is `sections.py`'s.
"""

from __future__ import annotations

import html
import json
from collections.abc import Container, Mapping, Sequence
from typing import Any

escape = html.escape


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def missing(text: str) -> str:
    """A sentence that says what isn't there."""
    return paragraph(text, "missing")


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    caption: str,
    *,
    marked: Container[int] = (),
    words: Container[int] = (),
    texts: Container[int] = (),
) -> str:
    """A table that scrolls by itself; `marked` rows are the selected ones. `words` stand at the left, `texts` wrap, too."""

    def kind(place: int) -> str:
        return ' class="text"' if place in texts else ' class="word"' if place in words else ""

    cells = "".join(f'<th scope="col"{kind(place)}>{escape(cell)}</th>' for place, cell in enumerate(head))
    lines = [
        ('<tr class="selected">' if index in marked else "<tr>")
        + "".join(f"<td{kind(place)}>{escape(str(cell))}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for index, row in enumerate(rows)
    ]
    # Focusable, so that it can be scrolled by keys.
    title = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any], caption: str) -> str:
    """Names and values; nested ones by dotted names."""
    return table(("name", "value"), [(name, in_words(value)) for name, value in flat(values)], caption, texts=(1,))


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else [(f"{before}{name}", value)]
    return found


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
    """Something that is unfolded when it is wanted."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def numbers(facts: Mapping[str, str]) -> str:
    """A few facts, large."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="numbers">{rows}</dl>'


def answer(title: str, record: Mapping[str, Any]) -> str:
    """One answer with its markers highlighted."""
    says = "still thinking at the limit" if record.get("thinking_open") else "refusal" if record.get("refusal") else ""
    text, place, parts = record["text"], 0, []
    for start, end in record["markers"]:
        start, end = max(start, place), max(end, place)
        parts += [escape(text[place:start]), f"<mark>{escape(text[start:end])}</mark>"]
        place = end
    parts.append(escape(text[place:]))
    said = "".join(parts) if text.strip() else '<span class="quiet">(empty)</span>'
    heading = f"{title} · {says}" if says else title
    return f'<div><h5>{escape(heading)}</h5><div class="answer">{said}</div></div>'


def data(name: str, value: Any) -> str:
    """JSON for the page's script; no text in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
