"""The report's plots as Vega-Lite specifications.

Foreign text (prompts, reasons, names of scorers and components) is data here, never an expression or a field's name. Colours
keep their contrast on white and on black and are told apart without colour vision; texts take the page's colour. The module is
long because most of it is specifications, one for each plot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.objectives import COUNTS, KL, REFUSALS, UNANSWERED, counted
from abliterate.report.data import Material
from abliterate.report.draw import WIDTH
from abliterate.report.refined import LayerRow, components_of, layer_rows, refined_text
from abliterate.report.tables import kernel_text, refusals_text, spread_text, unanswered_text
from abliterate.report.words import reading
from abliterate.types import Baseline, Objective, Params, RefinedParams, Trial, TrialParams

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
    """One plot. `name`: the name of its file and its element; `description`: its alt text."""

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]


def bars(name: str, heading: str, unit: str, rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> Plot | None:
    if not rows:
        return None
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    rows = [{**row, "order": stages.index(row["stage"])} for row in rows]
    encoding: dict[str, Any] = {
        "y": {"field": "stage", "type": "nominal", "sort": by_order(), "title": None},
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
    y = quantity(field, f"{title} (logarithmic scale)" if log else title)
    if log:
        y |= {"scale": {"type": "log"}, "axis": {"format": "~g", "tickCount": 4}}
    x = {
        **quantity("layer", "layer"),
        "scale": {"domain": [first, max(last, first + 1)], "nice": False},
        "axis": {"tickMinStep": 1, "labelExpr": "datum.value < 0 ? 'emb.' : datum.label"},
    }
    stroke = {"legend": {"symbolType": "stroke", "symbolSize": 400, "symbolStrokeWidth": 2}}
    colours, dashes = (tuple(cycle[index % len(cycle)] for index in range(len(names))) for cycle in (COLOURS, DASHES))
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


def by_order() -> dict[str, str]:
    """Sort by the field `order`, because a list of foreign names would become part of an expression."""
    return {"field": "order", "op": "min", "order": "ascending"}


def look(field: str, domain: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """An encoding that gives each name of `domain` a look of its own: a colour, shape or dash."""
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(domain), "range": list(values)[: len(domain)]},
    }


def tooltip(columns: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"field": field, "title": title} for field, title in columns.items()]


KL_AXIS = {
    **quantity("kl", "mean KL of the first token, nats (log. scale above 0.001)"),
    "scale": {"type": "symlog", "constant": 0.001},
    "axis": {"values": [0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30], "format": "~g", "labelOverlap": True},
}


def front(material: Material) -> Plot | None:
    """Every scored trial: a count of prompts against KL, the second objective against the first, or a single one by trial."""
    baseline = material.search.baseline
    if not material.scored or baseline is None:
        return None
    name = counted(material.objectives)
    if not name:
        return _of_objectives(material, baseline)
    rows = [{**_point(material, trial), "height": trial.value(name)} for trial in material.scored]
    base = {"kind": "base model", "kl": 0, "height": baseline.value(name), **_base_counts(baseline)}
    # A person may have selected a trial that isn't on the front.
    steps = [base, *(row for trial, row in zip(material.scored, rows, strict=True) if material.is_front(trial))]
    steps.sort(key=lambda row: (row["kl"], -row["height"]))
    y = quantity("height", _counts_of(material)[name])
    line = {
        "data": {"values": steps},
        "mark": {"type": "line", "interpolate": "step-after", "color": BLUE, "opacity": 0.6, "strokeWidth": 1.5},
        "encoding": {"x": KL_AXIS, "y": y, "order": {"field": "kl", "type": "quantitative"}},
    }
    points = _points([*rows, base], KL_AXIS, y, _columns(material))
    count = len(material.search.front)
    text = f"{len(rows)} scored trials as points, {name} against KL; {count} of them are on the front."
    return Plot("front", f"{name.capitalize()} against KL", text, spec_of(340, layer=[line, points]))


def _base_counts(baseline: Baseline) -> dict[str, str]:
    """The base model's counts in words."""
    texts = {"count": f"{baseline.refusals}/{baseline.prompts}"}
    if baseline.unanswered is not None:
        texts["unanswered"] = f"{baseline.unanswered['count']}/{baseline.prompts}"
    return texts


def _counts_of(material: Material) -> dict[str, str]:
    prompts = f"{material.prompts} harmful prompts"
    return {REFUSALS: f"refusals of {prompts}", UNANSWERED: f"unanswered of {prompts}"}


def _of_objectives(material: Material, base: Baseline) -> Plot | None:
    """The plot has no line, because the front of more than two objectives is none."""
    first, *rest = material.objectives
    names = {objective.name for objective in material.objectives}
    scored = [trial for trial in material.scored if names <= {*trial.values, *({KL, *COUNTS} & {*trial.scores})}]
    if not scored:  # a damaged record: no trial has all its values
        return None
    rows = [
        {
            **_point(material, trial),
            "first": trial.value(first.name),
            "second": trial.value(rest[0].name) if rest else trial.number,
        }
        for trial in scored
    ]
    shown: list[dict[str, Any]] = [*rows]
    if rest:
        of_base = {"first": base.value(first.name), "second": base.value(rest[0].name)}
        shown.append({"kind": "base model", **_base_counts(base), **of_base})
    titles = [_title(material, objective) for objective in material.objectives]
    axis = KL_AXIS if first.name == KL else quantity("first", titles[0])
    x = {**axis, "field": "first"}
    y = quantity("second", titles[1]) if rest else {**quantity("second", "trial"), "axis": {"tickMinStep": 1}}
    points = _points(shown, x if rest else y, y if rest else x, _columns(material))
    axes = f"{rest[0].name} against {first.name}" if rest else f"{first.name} by trial"
    count = len(material.search.front)
    text = f"{len(rows)} scored trials as points, {axes}; {count} of them are on the front."
    return Plot("front", axes[0].upper() + axes[1:], text, spec_of(340, layer=[points]))


def _title(material: Material, objective: Objective) -> str:
    known = {KL: KL_AXIS["title"], **_counts_of(material)}
    return f"{known.get(objective.name, objective.name)} ({objective.goal}d)"


def _points(
    rows: list[dict[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    """A layer of points, one a row; it adds each point's size to its row."""
    kinds = {
        "selected": (ORANGE, "diamond", 300),
        "on the front": (BLUE, "circle", 80),
        "complete": (GREEN, "square", 40),
        "stopped: at least so many": (GREY, "triangle-up", 40),
        "base model": (PURPLE, "cross", 120),
    }
    present = {row["kind"] for row in rows}
    shown = {kind: look for kind, look in kinds.items() if kind in present}
    names, (colours, shapes, sizes) = list(shown), zip(*shown.values(), strict=True)
    for row in rows:
        row["size"] = sizes[names.index(row["kind"])]
    return {
        "data": {"values": rows},
        "mark": {"type": "point", "filled": True, "opacity": 0.85},
        "encoding": {
            "x": x,
            "y": y,
            "color": look("kind", names, colours),
            "shape": look("kind", names, shapes),
            "size": {"field": "size", "type": "quantitative", "scale": None, "legend": None},
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": tooltip(columns),
        },
    }


def _point(material: Material, trial: Trial) -> dict[str, Any]:
    kl, is_front = trial.scores["kl"], material.is_front(trial)
    kind = "on the front" if is_front else "stopped: at least so many" if trial.state == "stopped" else "complete"
    chosen = trial.number == material.search.selected
    return {
        "kind": "selected" if chosen else kind,
        "order": 3 if chosen else 2 if is_front else 1,
        "kl": kl["mean"],
        "number": str(trial.number),
        "unanswered": unanswered_text(trial, material.prompts),
        "count": refusals_text(trial, material.prompts),
        "kls": spread_text(kl),
        **_of_parameters(trial.params),
        "seconds": f"{trial.seconds:.1f}",
        # Named by number, because a scorer's name is foreign text.
        **{f"other{index}": _other(trial, name) for index, name in enumerate(material.others)},
    }


def _of_parameters(params: Params) -> dict[str, str]:
    """What a point's tooltip says of its trial's parameters; what has a name is numbered, because names are foreign text."""
    if isinstance(params, RefinedParams):
        return {"scope": f"refined by gradient: {refined_text(params)}", "direction": "each module's own"}
    kernels = [f"{name}: {kernel_text(kernel)}" for name, kernel in params.kernels.items()]
    where = f"{params.direction_index:.2f}" if params.scope == "global" else "each layer's own"
    numbered = {f"kernel{index}": text for index, text in enumerate(kernels)}
    further = {f"extra{index}": f"{name}: {value:.3g}" for index, (name, value) in enumerate(params.extra.items())}
    return {"scope": params.scope, "direction": where, **numbered, **further}


def _columns(material: Material) -> dict[str, str]:
    kernels = {f"kernel{index}": f"kernel {index + 1}" for index in range(len(material.search.components))}
    extras = {f"extra{index}": f"number {index + 1}" for index in range(len(material.search.extras))}
    counts = {"unanswered": "unanswered"} if material.search.tells_kinds else {}
    start = {"number": "trial", "kind": "kind", **counts, "count": "refusals", "kls": "KL"}
    start |= {f"other{index}": f"scorer {index + 1}" for index in range(len(material.others))}
    return start | {"scope": "scope", "direction": "direction"} | kernels | extras | {"seconds": "seconds"}


def _other(trial: Trial, name: str) -> str:
    return f"{name}: {trial.values[name]:.4g}" if name in trial.values else ""


def all_plots(material: Material) -> list[Plot]:
    """Every plot for which there is something to show."""
    makers = (
        *(front, progress, progress_in_time, kernels, strengths, turns, importance),
        *(norms, cosines, separation, projection, times, memory),
    )
    return [plot for plot in (make(material) for make in makers) if plot is not None]


def progress(material: Material) -> Plot | None:
    """Hypervolume over trials."""
    return _progress(material, "progress", "trial", "trials", "Hypervolume over trials")


def progress_in_time(material: Material) -> Plot | None:
    """Hypervolume over the trials' seconds."""
    return _progress(material, "progress-in-time", "seconds", "seconds in trials, added up", "Hypervolume over time")


def _progress(material: Material, name: str, over: str, title: str, heading: str) -> Plot | None:
    if not material.progress:
        return None
    encoding = {
        "x": quantity(over, title),
        "y": quantity("hypervolume", "hypervolume (share; more is better)"),
        "tooltip": tooltip({"trial": "trials", "seconds": "seconds", "hypervolume": "hypervolume"}),
    }
    mark = {"type": "line", "interpolate": "step-after", "color": BLUE, "point": {"size": 18, "color": BLUE}}
    text = f"A line that rises to {material.progress[-1]['hypervolume']:.4f} after {len(material.progress)} trials."
    return Plot(name, heading, text, spec_of(220, values=list(material.progress), mark=mark, encoding=encoding))


def kernels(material: Material) -> Plot | None:
    """Coeff over layers, of the selected trial, unless it is refined."""
    trial = material.selected
    params = trial.params if trial else None
    if trial is None or not isinstance(params, TrialParams) or not params.kernels:
        return None
    rows = [
        {"layer": layer, "coeff": round(kernel.coeff(layer), 6), "component": name, "edited": kernel.coeff(layer) != 0}
        for name, kernel in params.kernels.items()
        for layer in range(material.n_layers)
    ]
    names = list(params.kernels)
    said = reading(material.edit_mode)
    layers: list[dict[str, Any]] = [lines(rows, "coeff", f"coeff λ ({said.short})", "component", names)]
    if params.scope == "global" and said.directed:
        marked = {"layer": params.direction_index, "what": "the direction is that of this layer"}
        rule = {"type": "rule", "color": INK, "opacity": 0.6, "strokeDash": [3, 3]}
        x = {"field": "layer", "type": "quantitative"}
        tip = tooltip({"what": "dashed line", "layer": "layer"})
        layers.append({"data": {"values": [marked]}, "mark": rule, "encoding": {"x": x, "tooltip": tip}})
    text = f"Coeff by layer for {len(names)} components of trial {trial.number}."
    return Plot("kernels", f"Kernels of trial {trial.number}", text, spec_of(240, layer=layers))


def strengths(material: Material) -> Plot | None:
    """Coeff over layers, of a selected trial that is refined."""
    return _of_refined(material, "strengths", "coeff λ", "Coeffs of trial {}, learned by gradient", lambda row: row.coeff)


def turns(material: Material) -> Plot | None:
    """How far the directions of a selected trial that is refined have turned from those it started with."""
    heading = "Directions of trial {}, against those at the start"
    return _of_refined(material, "turns", "cosine to its start", heading, lambda row: row.cosine)


def _of_refined(
    material: Material, name: str, title: str, heading: str, value_of: Callable[[LayerRow], float | None]
) -> Plot | None:
    """Lines over layers, one a component; None unless a refined trial is selected that has such values."""
    trial = material.selected
    if trial is None or not isinstance(trial.params, RefinedParams):
        return None
    found = [(row, value_of(row)) for row in layer_rows(trial.params, material.coverage)]
    rows = [
        {"layer": row.layer, "value": round(value, 6), "component": row.component} for row, value in found if value is not None
    ]
    if not rows:
        return None
    spec = spec_of(240, **lines(rows, "value", title, "component", components_of([row for row, _ in found])))
    return Plot(name, heading.format(trial.number), f"Lines over layers, one a component: {title}.", spec)


def importance(material: Material) -> Plot | None:
    """Share of each parameter, by objective."""
    if not material.importance:
        return None
    objectives = list(material.importance)
    names = list(dict.fromkeys(name for shares in material.importance.values() for name in shares))
    names.sort(key=lambda name: -sum(shares.get(name, 0) for shares in material.importance.values()))
    rows = [
        {"parameter": name, "share": round(share, 4), "objective": objective, "order": names.index(name)}
        for objective, shares in material.importance.items()
        for name, share in shares.items()
    ]
    encoding = {
        "y": {"field": "parameter", "type": "nominal", "sort": by_order(), "title": None},
        "yOffset": {"field": "objective", "sort": objectives},
        "x": {**quantity("share", "share of the importance"), "axis": {"format": "%"}},
        "color": look("objective", objectives, COLOURS),
        "tooltip": tooltip({"parameter": "parameter", "objective": "of", "share": "share"}),
    }
    text = "Bars: how much of the difference between the best trials and all of them each parameter explains."
    return Plot(
        "importance",
        "Parameter importance",
        text,
        spec_of(13 * len(rows), values=rows, mark={"type": "bar"}, encoding=encoding),
    )


def norms(material: Material) -> Plot | None:
    """Norms of both means and of their difference, by layer."""
    series = {"norm_harmful": "harmful mean", "norm_harmless": "harmless mean", "norm_difference": "their difference"}
    return _by_layer(material, "norms", "Norms by layer", "norm", series, log=True)


def cosines(material: Material) -> Plot | None:
    """Cosines of means and directions, by layer."""
    series = {
        "cos_means": "harmful and harmless mean",
        "cos_harmful_direction": "harmful mean and direction",
        "cos_harmless_direction": "harmless mean and direction",
    }
    return _by_layer(material, "cosines", "Cosines by layer", "cosine", series)


def separation(material: Material) -> Plot | None:
    """How far the sets are apart, by layer."""
    series = {"probe": "accuracy of a linear probe", "silhouette": "silhouette"}
    return _by_layer(material, "separation", "Separation by layer", "accuracy, silhouette", series)


def _by_layer(
    material: Material, name: str, heading: str, title: str, series: Mapping[str, str], *, log: bool = False
) -> Plot | None:
    if material.geometry is None:
        return None
    rows = [
        {"layer": row["index"] - 1, title: row[key], "series": label}
        for key, label in series.items()
        for row in material.geometry["layers"]
        if row.get(key) is not None and not (log and row[key] <= 0)
    ]
    if not rows:
        return None
    spec = spec_of(220, **lines(rows, title, title, "series", list(series.values()), log=log))
    return Plot(name, heading, f"Lines over layers: {', '.join(series.values())}.", spec)


def projection(material: Material) -> Plot | None:
    """Both prompt sets on two principal axes, at one layer; a slider of the page changes the layer."""
    if material.geometry is None or not material.geometry["projection"]:
        return None
    index = best_layer(material)
    encoding = {
        "x": {**quantity("x", "first principal axis"), "scale": {"zero": False}},
        "y": {**quantity("y", "second principal axis"), "scale": {"zero": False}},
        "color": look("set", ("harmful", "harmless"), (ORANGE, BLUE)),
        "shape": look("set", ("harmful", "harmless"), ("triangle-up", "circle")),
        "tooltip": tooltip({"set": "set", "prompt": "prompt"}),
    }
    text = f"Points: residuals of harmful and harmless prompts, {layer_name(index)}, on their two principal axes."
    spec = spec_of(
        340,
        data={"name": "points", "values": projected(material.geometry, index)},
        mark={"type": "point", "filled": True, "opacity": 0.7, "size": 45},
        encoding=encoding,
    )
    return Plot("projection", "Harmful and harmless residuals", text, spec)


def projected(geometry: Mapping[str, Any], index: int) -> list[dict[str, Any]]:
    """The points of one residual index; `page.js` builds the same rows."""
    return [
        {"x": point[0], "y": point[1], "set": name, "prompt": prompt}
        for name in ("harmful", "harmless")
        for point, prompt in zip(geometry["projection"][index][name], geometry["prompts"][name], strict=True)
    ]


def best_layer(material: Material) -> int:
    """The residual index at which the sets are the farthest apart."""
    assert material.geometry is not None
    return max(material.geometry["layers"], key=lambda row: (row.get("silhouette") or -1.0, row["index"]))["index"]


def layer_name(index: int) -> str:
    """A residual index in words."""
    return f"after layer {index - 1}" if index else "at the embedding"


def times(material: Material) -> Plot | None:
    """Seconds by stage."""
    rows = [{"stage": name, "seconds": round(seconds, 2)} for name, seconds in material.stage_seconds.items()]
    return bars("times", "Time by stage", "seconds", rows, ["seconds"])


def memory(material: Material) -> Plot | None:
    """Peak memory by stage, of the process and of its device."""
    kinds = {"peak_rss_bytes": "main memory", "peak_device_bytes": "device"}
    rows = [
        {"stage": name, "GiB": round(peaks.get(key, 0) / 2**30, 3), "where": where}
        for name, peaks in material.stage_memory.items()
        for key, where in kinds.items()
    ]
    used = [where for where in kinds.values() if any(row["GiB"] for row in rows if row["where"] == where)]
    return bars("memory", "Peak memory by stage", "GiB", [row for row in rows if row["where"] in used], used)
