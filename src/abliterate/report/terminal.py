"""The report on the terminal: the same records as the page, as tables, bars and a plot of characters.

Knows nothing of files and models. What models and people wrote can't reach the terminal's controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from abliterate.objectives import KL, REFUSALS
from abliterate.report.data import Material
from abliterate.report.plots import kernel_text
from abliterate.report.sections import front_of, in_a_sentence, number_text
from abliterate.terminal.tables import front_title, heldout_lines, print_marked, print_table, printable
from abliterate.types import Baseline

_WIDE, _HIGH, _BAR = 60, 15, 30
_STEPS = " ▁▂▃▄▅▆▇█"
_MARKS = {"stopped": "·", "complete": "o", "front": "★", "base": "B", "selected": "◆"}


def show(material: Material) -> None:
    """Everything, in the page's order."""
    print(in_a_sentence(material))
    if not material.trials:
        return
    for part in (_front, _progress, _kernels, _importance, _geometry, _heldout, _answers, _cost, _coverage, _facts):
        print()
        part(material)


def _front(material: Material) -> None:
    rows = []
    for trial in front_of(material):
        kl = [f"{trial.scores['kl'][name]:.4f}" for name in ("mean", "median", "max")]
        chosen = "→" if trial.number == material.result["selected"] else ""
        others = [f"{trial.values[name]:.4g}" if name in trial.values else "" for name in material.others]
        rows.append((chosen, str(trial.number), f"{trial.refusals}/{material.prompts}", *kl, *others))
    head = ("", "trial", "refusals", "KL mean", "KL median", "KL max", *material.others)
    print_table(head, rows, front_title(material.result), head[1:])
    if material.scored:
        print()
        print("\n".join(front_lines(material)))


def front_lines(material: Material) -> list[str]:
    """The second objective (up) against the first (right; KL by its root), as characters: by default refusals against KL.

    A single objective stands over the trials' numbers. The more telling mark wins a place.
    """
    first, *rest = material.objectives
    base = Baseline.from_record(material.result["baseline"])
    up = rest[0] if rest else first
    points = [(base.value(first.name), base.value(up.name), "base")] if rest else []
    for trial in material.scored:
        kind = "front" if material.is_front(trial) else str(trial.state)
        shown = "selected" if trial.number == material.result["selected"] else kind
        points.append((trial.value(first.name) if rest else trial.number, trial.value(up.name), shown))
    across, rising = _Axis.of(first.name if rest else "trial", points, 0), _Axis.of(up.name, points, 1)
    grid = [[" "] * _WIDE for _ in range(_HIGH)]
    for x, y, kind in sorted(points, key=lambda point: list(_MARKS).index(point[2])):
        grid[round((1 - rising.place(y)) * (_HIGH - 1))][round(across.place(x) * (_WIDE - 1))] = _MARKS[kind]
    top, bottom = f"{rising.high:g}", f"{rising.low:g}"
    width = max(len(top), len(bottom))
    labels = [top, *[""] * (_HIGH - 2), bottom]
    lines = [f"{label:>{width}} │{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    start = f"{across.low:g}"
    end = f"{'KL' if across.root else across.name} {across.high:{'.3f' if across.root else 'g'}}"
    lines.append(f"{'':>{width}} └{'─' * _WIDE}")
    lines.append(f"{'':>{width}}  {start}{end:>{_WIDE - len(start)}}")
    return [*lines, "   ".join(f"{mark} {name}" for name, mark in _MARKS.items())]


@dataclass(frozen=True)
class _Axis:
    """From `low` to `high`; of KL and refusals from 0. `root`: small values get more room."""

    name: str
    low: float
    high: float
    root: bool

    @staticmethod
    def of(name: str, points: Sequence[tuple[float, float, str]], which: Literal[0, 1]) -> _Axis:
        values = [point[which] for point in points]
        low = 0.0 if name in (KL, REFUSALS) else min(values)
        least = 1.0 if name == REFUSALS else low
        return _Axis(name, low, max(least, *values) if max(values) > low else low + 1.0, name == KL)

    def place(self, value: float) -> float:
        """0 at the beginning, 1 at the end."""
        part = max(0.0, value - self.low) / (self.high - self.low)
        return part**0.5 if self.root else part


def sparkline(values: Sequence[float], top: float) -> str:
    """A value a character; 0 is empty."""
    last = len(_STEPS) - 1
    return "".join(_STEPS[max(1, min(last, round(value / top * last))) if value > 0 else 0] for value in values)


def _progress(material: Material) -> None:
    values = [row["hypervolume"] for row in material.progress]
    if not values:
        return
    shown = [values[place * len(values) // _WIDE] for place in range(_WIDE)] if len(values) > _WIDE else values
    end = material.progress[-1]
    after = f"{end['trial']} trials and {end['seconds']:.0f} s in them"
    print(f"Hypervolume over trials, up to {end['hypervolume']:.3f} after {after}")
    print(f"│{sparkline(shown, 1.0)}│")


def _kernels(material: Material) -> None:
    trial = material.selected
    if trial is None:
        print("No trial has been selected yet.")
        return
    n_layers = int(material.result["model"]["n_layers"])
    top = max((kernel.max_coeff for kernel in trial.params.kernels.values()), default=0) or 1.0
    rows = [
        (name, kernel_text(kernel), f"│{sparkline([kernel.coeff(layer) for layer in range(n_layers)], top)}│")
        for name, kernel in trial.params.kernels.items()
    ]
    scope = (
        f"direction of layer {trial.params.direction_index:.2f}" if trial.params.scope == "global" else "each layer's direction"
    )
    print_table(("component", "kernel", "by layer"), rows, f"Trial {trial.number}: {scope}")


def _importance(material: Material) -> None:
    if not material.importance:
        print(material.missing["importance"])
        return
    names = list(dict.fromkeys(name for shares in material.importance.values() for name in shares))
    top = max(share for shares in material.importance.values() for share in shares.values()) or 1.0
    cells = [
        (name, *(part for shares in material.importance.values() for part in _bar(shares.get(name, 0), top, 15)))
        for name in names
    ]
    head = [part for objective in material.importance for part in (objective, f"of {objective}")]
    print_table(("parameter", *head), cells, "Parameter importance", tuple(material.importance))


def _bar(value: float, top: float, width: int = _BAR) -> tuple[str, str]:
    return f"{value:.0%}", "█" * round(value / top * width)


def _geometry(material: Material) -> None:
    geometry = material.geometry
    if geometry is None:
        print(material.missing["geometry"])
        return
    columns: Mapping[str, str] = {
        "norm_harmful": "‖harmful‖",
        "norm_harmless": "‖harmless‖",
        "norm_difference": "‖difference‖",
        "cos_means": "cos means",
        "cos_harmful_direction": "cos harmful, d",
        "cos_harmless_direction": "cos harmless, d",
        **({"silhouette": "silhouette", "probe": "probe"} if geometry["projection"] else {}),
    }
    rows = [
        (str(row["index"] - 1) if row["index"] else "emb.", *(number_text(row.get(name)) for name in columns))
        for row in geometry["layers"]
    ]
    head = ("layer", *columns.values())
    print_table(head, rows, "Residuals by layer (d: the direction)", head)
    if geometry["reason"]:
        print(geometry["reason"])


def _heldout(material: Material) -> None:
    record = material.result.get("heldout") or {}
    if record.get("trial") != material.result["selected"] or not record:
        print("Nothing was measured on held-out prompts.")
        return
    try:
        lines = list(heldout_lines(record))
    except (AttributeError, KeyError, TypeError, ValueError):  # another version's
        lines = ["This version can't read what was measured on held-out prompts."]
    print("\n".join(map(printable, lines)))


def _answers(material: Material) -> None:
    answers = material.answers
    if answers is None:
        print(material.missing["answers"])
        return
    print(f"Answers of the base model and of trial {answers['trial']}")
    for name in ("harmful", "harmless"):
        for row in answers[name]:
            print()
            print_marked(f"{name}: ", row["prompt"], ())
            for who in ("base", "edited"):
                print_marked(f"  {who}: ", row[who]["text"], row[who]["markers"])


def _cost(material: Material) -> None:
    spent = material.stages(material.result["timings"])
    peaks = material.stages(material.result["memory"].get("stages", {}))
    longest = max(spent.values(), default=0) or 1.0
    rows = [
        (
            name,
            f"{seconds:.1f}",
            *(f"{peaks.get(name, {}).get(key, 0) / 2**30:.2f}" for key in ("peak_rss_bytes", "peak_device_bytes")),
            _bar(seconds, longest)[1],
        )
        for name, seconds in spent.items()
    ]
    head = ("stage", "seconds", "GiB in memory", "GiB on the device", "")
    print_table(head, rows, f"Time and memory: {sum(spent.values()):.1f} s", head[1:4])


def _coverage(material: Material) -> None:
    found = material.result.get("coverage")
    if not found:
        return
    rows = [
        (
            group["component"],
            group["path"],
            str(group["layers"]),
            f"{group['parameters']:,}",
            "yes" if group["edited"] else f"no: {group['left_out']}",
        )
        for group in found["groups"]
    ]
    head = ("component", "module", "layers", "parameters", "edited")
    title = f"Coverage: {found['share']:.1%} of the parameters that write to the residual stream"
    print_table(head, rows, title, ("layers", "parameters"))


def _facts(material: Material) -> None:
    environment = material.result.get("environment", {})
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    print(f"seed {material.settings.get('seed', '?')}; {versions}; {environment.get('device') or 'device unknown'}")
