"""Show a run's report on the terminal: the tables of the page, with bars, sparklines and a plot of characters.

Text by models and people can't reach the terminal's controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from abliterate.objectives import COUNTS, KL
from abliterate.report.data import Material, changed_first
from abliterate.report.refined import components_of, fact_pairs, layer_rows, refined_table
from abliterate.report.sections import NOTHING_HELD_OUT, OF_ANOTHER_TRIAL, in_a_sentence
from abliterate.report.tables import (
    cache_table,
    coverage_table,
    front_table,
    geometry_table,
    heldout_fault,
    heldout_table,
    importance_table,
    kernel_table,
    pair_table,
    stage_table,
)
from abliterate.terminal.tables import print_marked, printable, show_table
from abliterate.types import Baseline, Column, RefinedParams, Trial, kl_text

_WIDE, _HIGH, _BAR = 60, 15, 30
_STEPS = "·▁▂▃▄▅▆▇█"
_MARKS = {"stopped": "·", "complete": "o", "front": "★", "base": "B", "selected": "◆"}


def show(material: Material) -> None:
    """Show everything, in the page's order."""
    print(printable(in_a_sentence(material)))
    if not material.trials:
        return
    for section in (_front, _progress, _kernels, _importance, _geometry, _heldout, _answers, _cost, _coverage, _facts):
        print()
        section(material)


def _front(material: Material) -> None:
    show_table(front_table(material.search))
    if material.scored:
        print()
        print("\n".join(map(printable, front_lines(material))))


def front_lines(material: Material) -> list[str]:
    """Plot the second objective (up) against the first (right; KL by its root) in characters: by default unanswered against KL.

    A single objective is plotted over the trials' numbers. Where marks meet, the most telling mark is shown.
    """
    first, *rest = material.objectives
    base = material.search.baseline or Baseline(0, 0)
    up = rest[0] if rest else first
    points = [(base.value(first.name), base.value(up.name), "base")] if rest else []
    for trial in material.scored:
        kind = "front" if material.is_front(trial) else str(trial.state)
        shown = "selected" if trial.number == material.search.selected else kind
        points.append((trial.value(first.name) if rest else trial.number, trial.value(up.name), shown))
    return grid_lines(points, _MARKS, first.name if rest else "trial", up.name)


def grid_lines(points: Sequence[tuple[float, float, str]], marks: Mapping[str, str], x: str, y: str) -> list[str]:
    """Plot (x, y, kind) in characters, with axes of these names; where marks meet, the later of `marks` is shown."""
    across, rising = _Axis.of(x, points, 0), _Axis.of(y, points, 1)
    grid = [[" "] * _WIDE for _ in range(_HIGH)]
    for right, up, kind in sorted(points, key=lambda point: list(marks).index(point[2])):
        grid[round((1 - rising.share(up)) * (_HIGH - 1))][round(across.share(right) * (_WIDE - 1))] = marks[kind]
    top, bottom = f"{rising.high:g}", f"{rising.low:g}"
    width = max(len(top), len(bottom))
    labels = [top, *[""] * (_HIGH - 2), bottom]
    lines = [f"{label:>{width}} │{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    start = f"{across.low:g}"
    end = f"{'KL, square-root scale,' if across.root else across.name} "
    end += kl_text(across.high) if across.root else f"{across.high:g}"
    lines.append(f"{'':>{width}} └{'─' * _WIDE}")
    lines.append(f"{'':>{width}}  {start}{end:>{_WIDE - len(start)}}")
    return [*lines, "   ".join(f"{mark} {name.removeprefix(f'{mark}: ')}" for name, mark in marks.items())]


@dataclass(frozen=True)
class _Axis:
    """An axis from `low` to `high`, which begins at 0 for KL and counts. `root`: small values get more space."""

    name: str
    low: float
    high: float
    root: bool

    @staticmethod
    def of(name: str, points: Sequence[tuple[float, float, str]], which: Literal[0, 1]) -> _Axis:
        values = [point[which] for point in points]
        low = 0.0 if name in (KL, *COUNTS) else min(values)
        least = 1.0 if name in COUNTS else low
        return _Axis(name, low, max(least, *values) if max(values) > low else low + 1.0, name == KL)

    def share(self, value: float) -> float:
        """How far along the axis a value is: 0 at the beginning, 1 at the end."""
        share = max(0.0, value - self.low) / (self.high - self.low)
        return share**0.5 if self.root else share


def sparkline(values: Sequence[float], top: float) -> str:
    """One character a value; 0 is a dot, because tables join spaces."""
    last = len(_STEPS) - 1
    return "".join(_STEPS[max(1, min(last, round(value / top * last))) if value > 0 else 0] for value in values)


def _progress(material: Material) -> None:
    values = [row["hypervolume"] for row in material.progress]
    if not values:
        return
    shown = [values[step * len(values) // _WIDE] for step in range(_WIDE)] if len(values) > _WIDE else values
    end = material.progress[-1]
    after = f"{end['trial']} trials and {end['seconds']:.0f} s in them"
    print(f"Hypervolume (share of results that the front beats) over trials, up to {end['hypervolume']:.4f} after {after}")
    print(f"│{sparkline(shown, 1.0)}│")


def _kernels(material: Material) -> None:
    trial = material.selected
    if trial is None:
        print("No trial has been selected yet.")
        return
    if isinstance(trial.params, RefinedParams):
        _refined(material, trial, trial.params)
        return
    kernels = trial.params.kernels.values()
    top = max((kernel.max_coeff for kernel in kernels), default=0) or 1.0
    lines = [f"│{sparkline([kernel.coeff(layer) for layer in range(material.n_layers)], top)}│" for kernel in kernels]
    show_table(kernel_table(trial, material.edit_mode).with_column(Column("layers", "by layer", "word"), lines))


def _refined(material: Material, trial: Trial, params: RefinedParams) -> None:
    rows = layer_rows(params, material.coverage)
    top = max((row.coeff for row in rows), default=0) or 1.0
    lines = []
    for component in components_of(rows):
        coeffs = {row.layer: row.coeff for row in rows if row.component == component}
        lines.append(f"│{sparkline([coeffs.get(layer, 0.0) for layer in range(material.n_layers)], top)}│")
    show_table(refined_table(trial, rows).with_column(Column("layers", "by layer", "word"), lines))
    print()
    show_table(pair_table("How it was found", fact_pairs(params)))


def _importance(material: Material) -> None:
    if not material.importance:
        print(printable(material.missing["importance"]))
        return
    table = importance_table(material.importance)
    top = max(share for shares in material.importance.values() for share in shares.values()) or 1.0
    for objective, shares in material.importance.items():
        bars = [_bar(shares.get(str(row[0]), 0), top, 15) for row in table.rows]
        table = table.with_column(Column(f"bar {objective}", f"of {objective}", "word"), bars)
    show_table(table)


def _bar(value: float, top: float, width: int = _BAR) -> str:
    return "█" * round(value / top * width)


def _geometry(material: Material) -> None:
    if material.geometry is None:
        print(printable(material.missing["geometry"]))
        return
    show_table(geometry_table(material.geometry))
    if material.geometry["reason"]:
        print(printable(material.geometry["reason"]))


def _heldout(material: Material) -> None:
    record = material.heldout
    if not record or record.get("trial") != material.search.selected:
        print(printable(material.missing.get("heldout", OF_ANOTHER_TRIAL if record else NOTHING_HELD_OUT)))
        return
    if heldout_fault(record) is not None:
        print("This version can't read the figures on held-out prompts.")
        return
    show_table(heldout_table(record, f"trial {record['trial']}"))


def _answers(material: Material) -> None:
    answers = material.answers
    if answers is None:
        print(printable(material.missing["answers"]))
        return
    print(f"Answers of the base model and of trial {answers['trial']}")
    for name in ("harmful", "harmless"):
        for row in changed_first(answers[name]):
            print()
            print_marked(f"{name}: ", row["prompt"], ())
            for model in ("base", "edited"):
                print_marked(f"  {model}: ", row[model]["text"], row[model]["markers"])


def _cost(material: Material) -> None:
    seconds = material.stage_seconds
    longest = max(seconds.values(), default=0) or 1.0
    bars = [_bar(spent, longest) for spent in seconds.values()]
    show_table(stage_table(seconds, material.stage_memory).with_column(Column("bar", "", "word"), [*bars, None]))
    if material.caches:
        print()
        show_table(cache_table(material.caches))


def _coverage(material: Material) -> None:
    if not material.coverage:
        return
    table, untold = coverage_table(material.coverage), material.coverage.get("untold")
    share = f"what share can be edited is unknown ({untold})" if untold else ""
    share = share or f"{material.coverage['share']:.1%} of its parameters can be edited"
    show_table(replace(table, title=f"{table.title}: {share}"))


def _facts(material: Material) -> None:
    environment = material.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    seed, device = material.settings.get("seed", "?"), environment.get("device") or "device unknown"
    print(printable(f"seed {seed}; {versions}; {device}"))
