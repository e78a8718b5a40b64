"""Write `report.html`: one self-contained page of a run directory, made without loading a model.

The page's policy forbids every request; a live page may ask its own server alone (`live.py`). With JavaScript its plots are
interactive; without it, and before, they are pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.files import write_atomically
from abliterate.report import draw
from abliterate.report.data import Material, gather
from abliterate.report.html import data, escape, missing
from abliterate.report.plots import Plot, all_plots
from abliterate.report.sections import Figure, layer_text, sections, summary

# Inline only; Vega compiles its expressions.
_POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    directory: RunDirectory, result: Result | None = None, warn: Callable[[str], None] = lambda text: None
) -> None:
    """Write the page of a run; `result`: its result, where it is at hand. `warn` gets a sentence if there are no plots.

    Raises:
        InputError: there is no run, or its `result.json` is damaged.
    """
    write_atomically(directory.report, render(gather(directory, result), warn))


def render(material: Material, warn: Callable[[str], None] = lambda text: None) -> str:
    """The page as text. All text from outside is escaped where it becomes HTML, JSON or a picture. `warn` as above."""
    return rendered(all_plots(material), lambda figure, plots: _content(material, figure, plots), warn)


def rendered(
    made: Sequence[Plot], content_with: Callable[[Figure, Mapping[str, Plot]], dict[str, Any]], warn: Callable[[str], None]
) -> str:
    """A page with these plots; `content_with` gives its content, from a function that makes a plot's figure and from the plots.

    If nothing can be drawn, it gets no plots, and `warn` the reason.
    """
    plots = {plot.name: plot for plot in made}
    stills: dict[str, str] = {}
    library = why = ""
    try:
        if plots:
            stills, library = draw.svg({name: plot.spec for name, plot in plots.items()})
    except draw.Undrawable as error:
        plots, why = {}, str(error)
        warn(why)
    content = content_with(_figures(plots, stills), plots)
    scripts = [data("plots", content["plots"]), *([data("layers", content["layers"])] if content["layers"] else [])]
    return document(content, [*scripts, *_code(library, "page.js")] if plots else [], why=why)


def content_of(material: Material) -> dict[str, Any]:
    """What a live page shows, as JSON values: title, summary, sections, plots and layers; its plots have no still pictures."""
    plots = {plot.name: plot for plot in all_plots(material)}
    return _content(material, _figures(plots, {}), plots)


def live_page(state: Mapping[str, Any], library: str, *, why: str = "") -> str:
    """The page of a run at work, which asks its own server for news and nobody else.

    `state` is `content_of` with `version`, `running` and `status`; `library` draws plots, and `why` says why there is none.
    """
    numbers = {name: state[name] for name in ("version", "running")}
    scripts = [data("plots", state["plots"]), data("layers", state["layers"] or {}), data("live-state", numbers)]
    code = [*(_code(library, "page.js") if library else []), *_code("", "live.js")]
    status = f'<p id="live-status" data-running="{str(state["running"]).lower()}">{escape(state["status"])}</p>'
    return document(state, [*scripts, *code], why=why, status=status, policy=f"{_POLICY}; connect-src 'self'")


def document(
    content: Mapping[str, Any], scripts: Sequence[str], *, why: str = "", status: str = "", policy: str = _POLICY
) -> str:
    """A whole page of `content` (title, summary and sections), with `scripts` at its end; `why`: why there are no plots."""
    title = escape(content["title"])
    parts = content["sections"]
    links = "".join(f'<li><a href="#{part["id"]}">{escape(part["heading"])}</a></li>' for part in parts)
    shown = "".join(
        f'<section id="{part["id"]}"><h2>{escape(part["heading"])}</h2><div class="body">{part["html"]}</div></section>'
        for part in parts
    )
    head = missing(why) if why else ""
    lines = "\n".join(scripts)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{_asset("page.css")}</style></head>\n'
        f'<body>{status}<header><h1>{title}</h1><div id="summary">{content["summary"]}</div>{head}</header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{shown}</main>\n{lines}</body></html>\n'
    )
    # Half of a surrogate pair is no character, and a prompt file may hold such a half.
    return page.encode("utf-8", "replace").decode("utf-8")


def _figures(plots: Mapping[str, Plot], stills: Mapping[str, str]) -> Figure:
    return lambda name: _figure(plots[name], stills.get(name, "")) if name in plots else ""


def _content(material: Material, figure: Figure, plots: Mapping[str, Plot]) -> dict[str, Any]:
    parts = sections(material, figure)
    layers = None
    if "projection" in plots:
        assert material.geometry is not None
        rows = [
            {"harmful": layer["harmful"], "harmless": layer["harmless"], "text": layer_text(material, index)}
            for index, layer in enumerate(material.geometry["projection"])
        ]
        layers = {"layers": rows, "prompts": material.geometry["prompts"]}
    return {
        "title": f"abliterate: {material.result['model'].get('id', '')}".removesuffix(": "),
        "summary": summary(material),
        "sections": [{"id": name, "heading": heading, "html": body} for name, heading, body in parts],
        "plots": {name: plot.spec for name, plot in plots.items()},
        "layers": layers,
    }


def _figure(plot: Plot, still: str) -> str:
    """With `role="img"` a screen reader reads the description and not every mark; the numbers are in the tables."""
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>"
        f'<div class="plot" id="plot-{plot.name}" role="img" aria-label="{escape(plot.description)}">'
        f'<div class="still">{still}</div></div></figure>'
    )


def _code(library: str, name: str = "") -> list[str]:
    """Script elements of a library and of one of our own files."""
    return [f"<script>{text}</script>" for text in (library, draw.in_script(_asset(name)) if name else "") if text]


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
