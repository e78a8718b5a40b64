"""What people see of a refined trial: how it was found, and the coeffs and directions of its modules, layer by layer.

The facts of a trial come from a run's files, which may be anybody's: one that has another form is left out or shown as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.types import Cell, Column, RefinedParams, Table, Trial, kl_text, number

# `model.layers.3.self_attn.o_proj`: the first number is the layer, and the rest is the same in every layer.
_MODULE = re.compile(r"(?:.*?\.)??(\d{1,6})\.(.+)")


# An edit is a narrow fit if the weaker one leaves more than this share of the validation prompts refused.
NARROW = 0.05


@dataclass(frozen=True)
class LayerRow:
    """The mean coeff of one component's modules in a layer, and the mean cosine of their directions to those at the start.

    The cosine is None where the trial doesn't record it.
    """

    layer: int
    component: str
    modules: int
    coeff: float
    cosine: float | None


def refined_text(params: RefinedParams) -> str:
    """`β 10, 40 steps, 24 modules, 15 % weaker: 3 of 40 refused`; what isn't recorded is left out."""
    facts = params.facts
    parts = [f"β {facts['beta']:.3g}" if "beta" in facts else "", f"{facts['steps']} steps" if "steps" in facts else ""]
    return ", ".join(filter(None, [*parts, f"{params.edited} modules", margin_text(params)]))


def margin_text(params: RefinedParams) -> str:
    """`15 % weaker: 3 of 40 refused`, the validation prompts that the edit leaves refused when its coeffs are smaller."""
    known = _margin(params)
    if known is None:
        return ""
    margin, share, prompts = known
    return f"{100 * margin:.0f} % weaker: {share * prompts:.0f} of {prompts:.0f} refused"


def wider_trial(chosen: Trial, trials: Sequence[Trial], prompts: int) -> Trial | None:
    """The trial of least KL that keeps a margin, if `chosen`, a refined trial of the same run, keeps none; else None.

    A trial keeps a margin if it is complete and the weaker edit leaves at most `NARROW` of the validation prompts refused. It
    may leave so many of the `prompts` of the evaluation set more unanswered than `chosen`.
    """
    if _keeps_margin(chosen) in (True, None):
        return None
    most = _open(chosen) + NARROW * prompts
    wide = [trial for trial in trials if trial.state == "complete" and _keeps_margin(trial) and _open(trial) <= most]
    return min(wide, key=lambda trial: (trial.kl, trial.number), default=None)


def wider_text(chosen: Trial, trials: Sequence[Trial], prompts: int, command: Callable[[Trial], str]) -> str:
    """A sentence that names `wider_trial` and the `command` that exports it; "" if there is none."""
    wide = wider_trial(chosen, trials, prompts)
    if wide is None:
        return ""
    assert isinstance(wide.params, RefinedParams)
    return (
        f"trial {chosen.number} is a narrow fit, which may refuse prompts of other kinds; trial {wide.number} keeps a margin "
        f"({margin_text(wide.params)}) at a KL of {kl_text(wide.kl)}: {command(wide)}"
    )


def _keeps_margin(trial: Trial) -> bool | None:
    """None if it isn't known."""
    known = _margin(trial.params) if isinstance(trial.params, RefinedParams) else None
    return None if known is None else known[1] <= NARROW


def _open(trial: Trial) -> int:
    return trial.unanswered if "unanswered" in trial.scores else trial.refusals


def _margin(params: RefinedParams) -> tuple[float, float, float] | None:
    """By how much the edit was made weaker, the share of validation prompts that this left refused, and their number."""
    validation = params.facts.get("validation")
    known = validation if isinstance(validation, Mapping) else {}
    margin, share, prompts = (known.get(name) for name in ("margin", "weaker", "prompts"))
    try:
        return number(margin), number(share), number(prompts)
    except (TypeError, ValueError):
        return None


def layer_rows(params: RefinedParams, coverage: Mapping[str, Any]) -> list[LayerRow]:
    """A row for each layer and component; `coverage` as in `result.json`, whose paths name the components."""
    components = {group["path"]: group["component"] for group in coverage.get("groups", ())}
    cosines: Mapping[str, float] = params.facts.get("cosine", {})
    found: dict[tuple[str, int], list[tuple[float, float | None]]] = {}
    for module, coeff in params.coeffs.items():
        layer, path = _place(module)
        found.setdefault((components.get(path, path), layer), []).append((coeff, cosines.get(module)))
    return [
        LayerRow(layer, component, len(pairs), _mean([coeff for coeff, _ in pairs]) or 0.0, _mean([c for _, c in pairs]))
        for (component, layer), pairs in sorted(found.items())
    ]


def components_of(rows: Sequence[LayerRow]) -> list[str]:
    """The components of the rows, each once."""
    return list(dict.fromkeys(row.component for row in rows))


def refined_table(trial: Trial, rows: Sequence[LayerRow]) -> Table:
    """The range of λ, and the mean cosine to the start, of each component of a refined trial."""
    cells: list[tuple[Cell, ...]] = []
    for component in components_of(rows):
        own = [row for row in rows if row.component == component]
        coeffs = [row.coeff for row in own]
        cosine = _mean([row.cosine for row in own])
        cells.append((component, sum(row.modules for row in own), min(coeffs), sum(coeffs) / len(coeffs), max(coeffs), cosine))
    columns = (
        Column("component", "component", "word"),
        Column("modules", "modules"),
        *(Column(f"coeff_{name}", f"λ, {words}", digits=".3f") for name, words in _RANGE.items()),
        Column("cosine", "cosine to its start, mean", digits=".3f"),
    )
    assert isinstance(trial.params, RefinedParams)
    return Table(f"Trial {trial.number}, refined by gradient: {refined_text(trial.params)}", columns, tuple(cells))


_RANGE = {"min": "least", "mean": "mean", "max": "largest"}


def layer_table(rows: Sequence[LayerRow]) -> Table:
    """λ and the cosine by layer and component."""
    columns = (
        Column("layer", "layer"),
        Column("component", "component", "word"),
        Column("coeff", "λ", digits=".3f"),
        Column("cosine", "cosine to its start", digits=".3f"),
    )
    ordered = sorted(rows, key=lambda row: (row.layer, row.component))
    return Table("By layer", columns, tuple((row.layer, row.component, row.coeff, row.cosine) for row in ordered))


def fact_pairs(params: RefinedParams) -> list[tuple[str, str]]:
    """How a refined trial was found, as names and texts; cosines have a table of their own."""
    facts = {name: value for name, value in params.facts.items() if name != "cosine"}
    pairs = [(name, _text(value)) for name, value in facts.items() if name != "prompts"]
    return pairs + [(f"{name} prompts", text) for name, text in prompt_texts(params).items()]


def prompt_texts(params: RefinedParams) -> dict[str, str]:
    """{set: `100, sha256 …`} of the prompts that a refined trial was trained on, or each set's record as it stands."""
    prompts = params.facts.get("prompts")
    if not isinstance(prompts, Mapping):
        return {} if prompts is None else {"training": _text(prompts)}
    texts = {}
    for name, record in prompts.items():
        known = isinstance(record, Mapping) and {"count", "digest"} <= record.keys()
        texts[name] = f"{record['count']}, sha256 {record['digest']}" if known else _text(record)
    return texts


def _place(module: str) -> tuple[int, str]:
    """The layer of a module, and its path in any layer, in which further numbers (of experts) are `*`."""
    match = _MODULE.fullmatch(module)
    if match is None:
        return 0, module
    return int(match[1]), ".".join("*" if part.isdecimal() else part for part in match[2].split("."))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _text(value: Any) -> str:
    """A fact as a person reads it: of a record its names and values."""
    if isinstance(value, Mapping) and value:
        return ", ".join(f"{name} {_number(inner)}" for name, inner in value.items())
    return _number(value)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
