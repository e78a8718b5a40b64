"""What the report's plots are built of: lines over layers, bars over stages, looks, and the frame of a Vega-Lite specification.

Colours keep their contrast on white and on black and are told apart without colour vision; texts take the page's colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.report.drawing import WIDTH

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f86c9", "#d55e00", "#009e73", "#b5679f", "#8a8a8a"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4])
INK = "currentColor"
_QUIET = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
_CONFIG = {
    "background": None,
    "font": "Helvetica, Arial, Liberation Sans, sans-serif",
    "view": {"stroke": GREY, "strokeOpacity": 0.35},
    "axis": {**_QUIET, "domainColor": GREY, "tickColor": GREY, "gridColor": GREY, "gridOpacity": 0.25, "labelLimit": 240},
    "legend": {
        **_QUIET,
        "orient": "top",
        "title": None,
        "columns": 3,
        "columnPadding": 20,
        "labelLimit": 220,
        "symbolSize": 90,
    },
}


@dataclass(frozen=True)
class Plot:
    """One plot. `name`: of its file and its element; `description`: what is to be seen, for who doesn't see it."""

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]


def bars(name: str, heading: str, unit: str, rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> Plot | None:
    if not rows:
        return None
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    rows = [{**row, "place": stages.index(row["stage"])} for row in rows]
    encoding: dict[str, Any] = {
        "y": {"field": "stage", "type": "nominal", "sort": by_place(), "title": None},
        "x": quantity(unit, unit),
        "tooltip": tooltip({"stage": "stage", unit: unit}),
    }
    mark: dict[str, Any] = {"type": "bar", "color": BLUE}
    if len(groups) > 1:
        encoding |= {"yOffset": {"field": "where", "sort": list(groups)}, "color": look("where", groups, COLOURS)}
    largest = max(rows, key=lambda row: row[unit])
    text = f"Bars by stage; the largest is {largest['stage']} with {largest[unit]:g} {unit}."
    return Plot(name, heading, text, spec_of(20 * len(stages), values=rows, mark=mark, encoding=encoding))


def lines(
    rows: Sequence[Mapping[str, Any]],
    field: str,
    title: str,
    group: str,
    names: Sequence[str],
    *,
    log: bool = False,
) -> dict[str, Any]:
    """Lines over layers with a point at each; layer −1 is the embedding."""
    last = max(int(row["layer"]) for row in rows)
    first = min(int(row["layer"]) for row in rows)
    y = quantity(field, title)
    if log:
        y |= {"scale": {"type": "log"}, "axis": {"format": "~g", "tickCount": 4}}
    x = {
        **quantity("layer", "layer"),
        "scale": {"domain": [first, max(last, first + 1)], "nice": False},
        "axis": {"tickMinStep": 1, "labelExpr": "datum.value < 0 ? 'emb.' : datum.label"},
    }
    stroke = {"legend": {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 2}}
    colours, dashes = (tuple(part[place % len(part)] for place in range(len(names))) for part in (COLOURS, DASHES))
    return {
        "data": {"values": list(rows)},
        "mark": {"type": "line", "point": {"size": 28}, "interpolate": "linear"},
        "encoding": {
            "x": x,
            "y": y,
            "color": look(group, names, colours) | stroke,
            "strokeDash": look(group, names, dashes) | stroke,
            "tooltip": tooltip({group: group, "layer": "layer", field: title}),
        },
    }


def spec_of(height: Any, *, values: Sequence[Mapping[str, Any]] | None = None, **parts: Any) -> dict[str, Any]:
    data = {} if values is None else {"data": {"values": list(values)}}
    size = {"width": WIDTH, "height": height, "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "config": _CONFIG, **size, **data, **parts}


def quantity(field: str, title: str) -> dict[str, Any]:
    return {"field": field, "type": "quantitative", "title": title}


def by_place() -> dict[str, str]:
    """In the order of the field `place`: a list of foreign names would become part of an expression."""
    return {"field": "place", "op": "min", "order": "ascending"}


def look(field: str, domain: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """A look for each name."""
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(domain), "range": list(values)[: len(domain)]},
    }


def tooltip(columns: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"field": field, "title": title} for field, title in columns.items()]
