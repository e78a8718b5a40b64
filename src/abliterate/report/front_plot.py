"""The plot of the front as a Vega-Lite specification. Knows neither HTML nor how a specification is drawn.

Foreign text (names of scorers and components) is data here, never an expression or a field's name; a title is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.objectives import DEFAULT, KL, REFUSALS
from abliterate.report.marks import BLUE, GREEN, GREY, ORANGE, PURPLE, Plot, look, quantity, spec_of, tooltip
from abliterate.report.material import Material
from abliterate.types import Baseline, Kernel, Objective, Trial

_KL_AXIS = {
    **quantity("kl", "mean KL of the first token, nats"),
    "scale": {"type": "symlog", "constant": 0.01},
    "axis": {"values": [0, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30], "format": "~g", "labelOverlap": True},
}


def front(material: Material) -> Plot | None:
    """Every scored trial: refusals against KL, or the second objective against the first, or a single one by trial."""
    if not material.scored:
        return None
    if material.objectives != DEFAULT:
        return _of_objectives(material)
    rows = [_point(material, trial) for trial in material.scored]
    base = {"kind": "base model", "kl": 0, "refusals": material.result["baseline"]["refusals"], "told": "as it is"}
    steps = [base, *(row for row in rows if row["order"] > 1)]
    steps.sort(key=lambda row: (row["kl"], -row["refusals"]))
    y = quantity("refusals", f"refusals of {material.prompts} harmful prompts")
    line = {
        "data": {"values": steps},
        "mark": {"type": "line", "interpolate": "step-after", "color": BLUE, "opacity": 0.6, "strokeWidth": 1.5},
        "encoding": {"x": _KL_AXIS, "y": y, "order": {"field": "kl", "type": "quantitative"}},
    }
    points = _points([*rows, base], _KL_AXIS, y, _columns(material))
    count = len(material.result["front"])
    text = f"{len(rows)} scored trials as points, refusals against KL; {count} of them are on the front."
    return Plot("front", "Refusals against KL", text, spec_of(340, layer=[line, points]))


def _of_objectives(material: Material) -> Plot | None:
    """Without a line: with more than two objectives the front is none."""
    first, *rest = material.objectives
    base = Baseline.from_record(material.result["baseline"])
    scored = [
        trial for trial in material.scored if all(one.name in (*trial.values, "kl", "refusals") for one in material.objectives)
    ]
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
        shown.append({"kind": "base model", "told": "as it is", **of_base})
    titles = [_title(material, one) for one in material.objectives]
    axis = _KL_AXIS if first.name == KL else quantity("first", titles[0])
    x = {**axis, "field": "first"}
    y = quantity("second", titles[1]) if rest else {**quantity("second", "trial"), "axis": {"tickMinStep": 1}}
    points = _points(shown, x if rest else y, y if rest else x, _columns(material))
    what = f"{rest[0].name} against {first.name}" if rest else f"{first.name} by trial"
    count = len(material.result["front"])
    text = f"{len(rows)} scored trials as points, {what}; {count} of them are on the front."
    return Plot("front", what[0].upper() + what[1:], text, spec_of(340, layer=[points]))


def _title(material: Material, objective: Objective) -> str:
    known = {KL: "mean KL of the first token, nats", REFUSALS: f"refusals of {material.prompts} harmful prompts"}
    return f"{known.get(objective.name, objective.name)} ({objective.goal}d)"


def _points(
    rows: list[dict[str, Any]], x: Mapping[str, Any], y: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, Any]:
    """A layer of the rows as points, which gives each its size."""
    kinds = {
        "selected": (ORANGE, "diamond", 300),
        "on the front": (BLUE, "circle", 80),
        "complete": (GREEN, "square", 40),
        "stopped: at least so many": (GREY, "triangle-up", 40),
        "base model": (PURPLE, "cross", 120),
    }
    met = {row["kind"] for row in rows}
    shown = {kind: look for kind, look in kinds.items() if kind in met}
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
    chosen = trial.number == material.result["selected"]
    bound = "≥ " if trial.state == "stopped" else ""
    return {
        "kind": "selected" if chosen else kind,
        "order": 3 if chosen else 2 if is_front else 1,
        "kl": kl["mean"],
        "refusals": trial.refusals,
        "number": str(trial.number),
        "told": f"{bound}{trial.refusals} of {material.prompts}",
        "kls": f"{kl['mean']:.4f} / {kl['median']:.4f} / {kl['max']:.4f}",
        "scope": trial.params.scope,
        "direction": f"{trial.params.direction_index:.2f}" if trial.params.scope == "global" else "each layer's own",
        **{f"kernel{place}": f"{name}: {kernel_text(one)}" for place, (name, one) in enumerate(trial.params.kernels.items())},
        "seconds": f"{trial.seconds:.1f}",
        # Named by place: a scorer's name is foreign text.
        **{f"other{place}": _other(trial, name) for place, name in enumerate(material.others)},
    }


def kernel_text(kernel: Kernel) -> str:
    """A kernel in a few words."""
    if not kernel.max_coeff:
        return "off"
    return f"{kernel.max_coeff:.2f} at layer {kernel.position:.1f}, {kernel.min_coeff:.2f} at ± {kernel.distance:.1f}"


def _columns(material: Material) -> dict[str, str]:
    count = max((len(trial.params.kernels) for trial in material.trials), default=0)
    kernels = {f"kernel{place}": f"kernel {place + 1}" for place in range(count)}
    start = {"number": "trial", "kind": "what", "told": "refusals", "kls": "KL mean / median / max"}
    start |= {f"other{place}": f"scorer {place + 1}" for place in range(len(material.others))}
    return start | {"scope": "scope", "direction": "direction"} | kernels | {"seconds": "seconds"}


def _other(trial: Trial, name: str) -> str:
    return f"{name}: {trial.values[name]:.4g}" if name in trial.values else ""
