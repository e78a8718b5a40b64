"""Show a comparison of runs: as one page like a run's report, and as a plot of characters for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle, islice
from typing import Any

from abliterate.objectives import KL
from abliterate.report.compare import Comparison, differences_table, fronts_table, runs_table, title_of, verdict
from abliterate.report.html import details, glossary, paragraph, table
from abliterate.report.page import rendered
from abliterate.report.plots import COLOURS, DASHES, KL_AXIS, Plot, look, quantity, spec_of, tooltip
from abliterate.report.sections import Figure
from abliterate.report.tables import refusals_text, unanswered_text
from abliterate.report.terminal import grid_lines
from abliterate.report.words import used_in

_SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")


def compare_page(found: Comparison, warn: Callable[[str], None] = lambda text: None) -> str:
    """The page as text. All text from outside is escaped; `warn` gets a sentence if there is no plot."""

    def content(figure: Figure, plots: Mapping[str, Plot]) -> dict[str, Any]:
        parts = [
            ("fronts", "Fronts", figure("fronts") + table(fronts_table(found))),
            ("runs", "Runs", table(runs_table(found))),
            ("settings", "What differs", table(differences_table(found))),
        ]
        doubts = [f"{run.label}: {doubt}" for run in found.runs for doubt in run.doubts]
        said = "".join(map(paragraph, [*verdict(found), *doubts]))
        words = used_in(said + "".join(html for _, _, html in parts))
        parts.append(("words", "Words used here", details("What the words of this page mean", glossary(words))))
        return {
            "title": f"abliterate: {', '.join(run.label for run in found.runs)}",
            "summary": said,
            "sections": [{"id": name, "heading": heading, "html": body} for name, heading, body in parts],
            "plots": {name: plot.spec for name, plot in plots.items()},
            "layers": None,
        }

    return rendered([fronts_plot(found)], content, warn)


def fronts_plot(found: Comparison) -> Plot:
    """A step line and points for each run, from its base model on; labels are data, because they are foreign text."""
    rows: list[dict[str, Any]] = []
    for run in found.runs:
        base, prompts = run.search.baseline, run.search.prompts
        assert base is not None
        start = {"trial": "base model", "kl": 0.0, "height": found.of_height(run, base.value(found.height))}
        points = [
            {
                "trial": str(trial.number),
                "kl": trial.kl,
                "height": found.of_height(run, trial.value(found.height)),
                "refusals": refusals_text(trial, prompts),
                "unanswered": unanswered_text(trial, prompts),
            }
            for trial in run.search.front_trials
        ]
        rows += [{"run": run.label, **point} for point in (start, *points)]
    rows.sort(key=lambda row: (row["run"], row["kl"], -row["height"]))
    names = [run.label for run in found.runs]

    def looks(values: tuple[Any, ...]) -> dict[str, Any]:
        return look("run", names, islice(cycle(values), len(names)))

    columns = {"run": "run", "trial": "trial", "kl": "KL", "unanswered": "unanswered", "refusals": "refusals"}
    both = {"x": KL_AXIS, "y": quantity("height", title_of(found, found.height)), "color": looks(COLOURS)}
    line = {
        "mark": {"type": "line", "interpolate": "step-after", "opacity": 0.7, "strokeWidth": 1.5},
        "encoding": both | {"strokeDash": looks(DASHES), "order": {"field": "kl", "type": "quantitative"}},
    }
    marks = {
        "mark": {"type": "point", "filled": True, "opacity": 0.9, "size": 80},
        "encoding": both | {"shape": looks(_SHAPES), "tooltip": tooltip(columns)},
    }
    text = f"The fronts of {len(names)} runs as step lines, {found.height} against KL."
    return Plot("fronts", f"{found.height.capitalize()} against KL", text, spec_of(380, values=rows, layer=[line, marks]))


def fronts_lines(found: Comparison) -> list[str]:
    """The same in characters: a letter for each run's trials, and `*` for base models."""
    points = []
    for run in found.runs:
        base = run.search.baseline
        assert base is not None
        points.append((0.0, found.of_height(run, base.value(found.height)), "base model"))
        points += [(trial.kl, found.of_height(run, trial.value(found.height)), run.label) for trial in run.search.front_trials]
    marks = {"base model": "*", **{run.label: run.label[0] for run in found.runs}}
    heading = f"{title_of(found, found.height)} (up) against {title_of(found, KL)} (right)"
    return [heading, *grid_lines(points, marks, KL, found.height)]
