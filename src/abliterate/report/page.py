"""Write `report.html`: one self-contained page of a run directory, made without loading a model.

The page's policy forbids every request. With JavaScript its plots are interactive; without it, and before, they are pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.files import write_atomically
from abliterate.report import draw
from abliterate.report.data import Material, gather
from abliterate.report.html import data, escape, missing
from abliterate.report.plots import Plot, all_plots
from abliterate.report.sections import layer_text, sections, summary

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
    plots = {plot.name: plot for plot in all_plots(material)}
    stills: dict[str, str] = {}
    library = why = ""
    try:
        if plots:
            stills, library = draw.svg({name: plot.spec for name, plot in plots.items()})
    except draw.Undrawable as error:
        plots, why = {}, str(error)
        warn(why)
    parts = sections(material, lambda name: _figure(plots[name], stills[name]) if name in plots else "")
    title = escape(f"abliterate: {material.result['model'].get('id', '')}")
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, heading, _ in parts)
    content = "".join(f'<section id="{name}"><h2>{escape(heading)}</h2>{body}</section>' for name, heading, body in parts)
    head = missing(why) if why else ""
    scripts = _scripts(material, plots, library)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{_asset("page.css")}</style></head>\n'
        f"<body><header><h1>{title}</h1>{summary(material)}{head}</header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{content}</main>\n{scripts}</body></html>\n'
    )
    # Half of a surrogate pair is no character, and a prompt file may hold such a half.
    return page.encode("utf-8", "replace").decode("utf-8")


def _figure(plot: Plot, still: str) -> str:
    """With `role="img"` a screen reader reads the description and not every mark; the numbers are in the tables."""
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>"
        f'<div class="plot" id="plot-{plot.name}" role="img" aria-label="{escape(plot.description)}">'
        f'<div class="still">{still}</div></div></figure>'
    )


def _scripts(material: Material, plots: Mapping[str, Plot], library: str) -> str:
    if not plots:
        return ""
    parts = [data("plots", {name: plot.spec for name, plot in plots.items()})]
    if "projection" in plots:
        assert material.geometry is not None
        layers = [
            {"harmful": layer["harmful"], "harmless": layer["harmless"], "text": layer_text(material, index)}
            for index, layer in enumerate(material.geometry["projection"])
        ]
        parts.append(data("layers", {"layers": layers, "prompts": material.geometry["prompts"]}))
    scripts = (library, draw.in_script(_asset("page.js")))
    return "\n".join([*parts, *(f"<script>{script}</script>" for script in scripts)])


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
