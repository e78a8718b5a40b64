"""The report's plots as Vega-Lite specifications, from the material. Knows neither HTML nor how a specification is drawn.

Foreign text (prompts, reasons, names of components) is data here, never an expression or a field's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.report.front_plot import front
from abliterate.report.marks import (
    BLUE,
    COLOURS,
    INK,
    ORANGE,
    Plot,
    bars,
    by_place,
    lines,
    look,
    quantity,
    spec_of,
    tooltip,
)
from abliterate.report.material import Material


def all_plots(material: Material) -> list[Plot]:
    """Every plot for which there is something to show."""
    makers = (front, progress, progress_in_time, kernels, importance, norms, cosines, separation, projection, times, memory)
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
        "y": quantity("hypervolume", "hypervolume"),
        "tooltip": tooltip({"trial": "trials", "seconds": "seconds", "hypervolume": "hypervolume"}),
    }
    mark = {"type": "line", "interpolate": "step-after", "color": BLUE, "point": {"size": 18, "color": BLUE}}
    text = f"A line that rises to {material.progress[-1]['hypervolume']:.3f} after {len(material.progress)} trials."
    return Plot(name, heading, text, spec_of(220, values=list(material.progress), mark=mark, encoding=encoding))


def kernels(material: Material) -> Plot | None:
    """Coeff over layers, of the selected trial."""
    trial = material.selected
    if trial is None or not trial.params.kernels:
        return None
    n_layers = int(material.result["model"]["n_layers"])
    rows = [
        {"layer": layer, "coeff": round(kernel.coeff(layer), 6), "component": name, "edited": kernel.coeff(layer) != 0}
        for name, kernel in trial.params.kernels.items()
        for layer in range(n_layers)
    ]
    names = list(trial.params.kernels)
    drawn = lines(rows, "coeff", "coeff λ", "component", names)
    layers: list[dict[str, Any]] = [drawn]
    if trial.params.scope == "global":
        place = {"layer": trial.params.direction_index, "what": "the direction is that of this layer"}
        rule = {"type": "rule", "color": INK, "opacity": 0.6, "strokeDash": [3, 3]}
        x = {"field": "layer", "type": "quantitative"}
        tip = tooltip({"what": "dashed line", "layer": "layer"})
        layers.append({"data": {"values": [place]}, "mark": rule, "encoding": {"x": x, "tooltip": tip}})
    text = f"Coeff by layer for {len(names)} components of trial {trial.number}."
    return Plot("kernels", f"Kernels of trial {trial.number}", text, spec_of(240, layer=layers))


def importance(material: Material) -> Plot | None:
    """Share of each parameter, by objective."""
    if not material.importance:
        return None
    objectives = list(material.importance)
    names = list(dict.fromkeys(name for shares in material.importance.values() for name in shares))
    names.sort(key=lambda name: -sum(shares.get(name, 0) for shares in material.importance.values()))
    rows = [
        {"parameter": name, "share": round(share, 4), "objective": objective, "place": names.index(name)}
        for objective, shares in material.importance.items()
        for name, share in shares.items()
    ]
    encoding = {
        "y": {"field": "parameter", "type": "nominal", "sort": by_place(), "title": None},
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
    """Both sets on two principal axes, of one layer; the page changes the layer."""
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
    """The points of one residual index; `page.js` does the same."""
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
    spent = material.stages(material.result["timings"])
    rows = [{"stage": name, "seconds": round(value, 2)} for name, value in spent.items()]
    return bars("times", "Time by stage", "seconds", rows, ["seconds"])


def memory(material: Material) -> Plot | None:
    """Peak memory by stage, of the process and of its device."""
    places = {"peak_rss_bytes": "main memory", "peak_device_bytes": "device"}
    rows = [
        {"stage": name, "GiB": round(peaks.get(key, 0) / 2**30, 3), "where": place}
        for name, peaks in material.stages(material.result["memory"].get("stages", {})).items()
        for key, place in places.items()
    ]
    used = [place for place in places.values() if any(row["GiB"] for row in rows if row["where"] == place)]
    return bars("memory", "Peak memory by stage", "GiB", [row for row in rows if row["where"] in used], used)
