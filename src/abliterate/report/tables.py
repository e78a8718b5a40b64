"""Build every table that a person sees of a run, once, as `Table` values; the terminal, the page, CSV and the card render them.

Kernels, scores and held-out figures become text here and nowhere else, so each of them reads the same wherever it is shown.
The module is long because every table but those of refined trials is here, under a heading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.objectives import KL, REFUSALS, UNANSWERED, counted, in_words, other_names
from abliterate.report.refined import refined_text
from abliterate.report.words import reading
from abliterate.types import (
    Baseline,
    Cell,
    Column,
    Kernel,
    Objective,
    Params,
    RefinedParams,
    Table,
    Trial,
    TrialParams,
    kl_text,
)

_KL = ("mean", "median", "max")
_KERNEL = ("max_coeff", "position", "min_coeff", "distance")
# The scope of a refined trial in tables, and the columns that programs get of it.
_OWN, _REFINED = "per module", ("refined_beta", "refined_steps", "refined_modules")
# The kinds of responses that are no real answer, beside refusals, and their headings.
_KINDS = {"broken": "broken", "off_topic": "off-topic"}
_UNANSWERED_KINDS = {name: f"unanswered: {heading}" for name, heading in _KINDS.items()}
_STOPPED = "≥ at least: stopped early"
_KERNEL_LEGEND = "a kernel: largest coeff @ its layer → coeff at the edge ± layers to the edge"
# Columns that the front at the end of a run and at a question leaves to `abliterate trials`.
_DETAILS = ("state", "seconds", "scope", "direction_index", "reason")
_GEOMETRY = {
    "norm_harmful": "‖harmful‖",
    "norm_harmless": "‖harmless‖",
    "norm_difference": "‖difference‖",
    "cos_means": "cos(harmful, harmless)",
    "cos_harmful_direction": "cos(harmful, d)",
    "cos_harmless_direction": "cos(harmless, d)",
}
_SEPARATION = {"silhouette": "silhouette", "probe": "probe"}
_HELDOUT_RATES = {
    "refusals": "refusals",
    "answered": "neither refused nor faulty",
    "harmless_refusals": "refusals, harmless prompts",
    "over_refusals": "refusals, harmful-looking",
}


@dataclass(frozen=True)
class SearchRecord:
    """The fields of `result.json` that tables of trials need. `baseline` is None until it has been measured."""

    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    selected: int | None
    baseline: Baseline | None
    objectives: tuple[Objective, ...] = ()

    @staticmethod
    def of(result: Result) -> SearchRecord:
        """The fields of a run's result."""
        objectives = result.objectives_or_default()
        return SearchRecord(tuple(result.trials), tuple(result.front), result.selected, result.baseline, objectives)

    @property
    def selected_trial(self) -> Trial | None:
        """The selected trial, if one has been selected."""
        return next((trial for trial in self.trials if trial.number == self.selected), None)

    @property
    def front_trials(self) -> list[Trial]:
        """The trials on the front, the best in the first objective first."""
        by_number = {trial.number: trial for trial in self.trials}
        front = [by_number[number] for number in self.front]
        if not self.objectives:
            return front
        first = self.objectives[0]
        return sorted(front, key=lambda trial: first.cost(trial.value(first.name)))

    @property
    def others(self) -> list[str]:
        """The run's scorers beside refusals and KL, objectives first."""
        return other_names({name for trial in self.trials for name in (*trial.scores, *trial.values)}, self.objectives)

    @property
    def tells_kinds(self) -> bool:
        """Whether the run's scorers tell unanswered prompts from answered prompts."""
        return any(UNANSWERED in trial.scores for trial in self.trials) or UNANSWERED in {one.name for one in self.objectives}

    @property
    def components(self) -> list[str]:
        """Every component that some trial has a kernel for."""
        return list(dict.fromkeys(name for params in self._suggested for name in params.kernels))

    @property
    def extras(self) -> list[str]:
        """Names of the further numbers that the trials have beside their kernels."""
        return list(dict.fromkeys(name for params in self._suggested for name in params.extra))

    @property
    def kernel_columns(self) -> tuple[str, ...]:
        """What programs get of each kernel: its numbers, and its shape if some trial's kernel isn't linear."""
        shaped = any(kernel.shape != "linear" for params in self._suggested for kernel in params.kernels.values())
        return (*_KERNEL, *(["shape"] if shaped else []))

    @property
    def _suggested(self) -> list[TrialParams]:
        return [trial.params for trial in self.trials if isinstance(trial.params, TrialParams)]

    @property
    def has_refined(self) -> bool:
        """Whether some trial was refined by gradient."""
        return any(isinstance(trial.params, RefinedParams) for trial in self.trials)

    @property
    def prompts(self) -> int:
        """The number of harmful prompts that were scored, 0 until the baseline has been measured."""
        return self.baseline.prompts if self.baseline else 0


# -- texts


def kernel_text(kernel: Kernel) -> str:
    """`0.90 @ 8.1 → 0.20 ± 3.0`: the largest coeff at its layer, the coeff at the edge, and how many layers away that is.

    A kernel that isn't linear names its shape.
    """
    if not kernel.max_coeff:
        return "off"
    shape = "" if kernel.shape == "linear" else f" {kernel.shape}"
    return f"{kernel.max_coeff:.2f} @ {kernel.position:.1f} → {kernel.min_coeff:.2f} ± {kernel.distance:.1f}{shape}"


def refusals_text(trial: Trial, prompts: int) -> str:
    """`3/100`; `≥3/100` of a stopped trial, whose count is a lower bound; nothing of a trial without scores."""
    return _count_text(trial, REFUSALS, prompts)


def unanswered_text(trial: Trial, prompts: int) -> str:
    """The same of prompts without a real answer."""
    return _count_text(trial, UNANSWERED, prompts)


def _count_text(trial: Trial, name: str, prompts: int) -> str:
    if name not in trial.scores:
        return ""
    return f"{'≥' if trial.state == 'stopped' else ''}{trial.value(name):.0f}/{prompts}"


def spread_text(kl: Mapping[str, float]) -> str:
    """`mean 0.0412, median 0.0103, max 0.4000`."""
    return ", ".join(f"{name} {kl_text(kl[name])}" for name in _KL)


def rate_text(rate: Mapping[str, Any]) -> str:
    """`3/100 [0.6–8.5 %]`: a count with its 95 % interval, whose ends 0 and 100 are exact."""
    low, high = (f"{100 * share:.1f}" if 0 < share < 1 else f"{share:.0%}"[:-1] for share in (rate["low"], rate["high"]))
    return f"{rate['count']}/{rate['prompts']} [{low}–{high} %]"


def number_text(value: float | None) -> str:
    """Three digits behind the point of small numbers, fewer of large ones; a number that rounds to nothing has no sign."""
    if value is None:
        return "—"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 0
    return f"{value:.{digits}f}".replace("-0.000", "0.000")


def export_text(export: Mapping[str, Any]) -> str:
    """The verdict of an export's check, from its record; a check may load the export, or compare its weights alone."""
    checks = export.get("verification")
    loaded = isinstance(checks, Mapping) and "kl_from_trial" in checks
    right = "verified after reloading" if loaded else "its weights verified"
    return {True: right, False: "NOT verified", None: "not checked"}[export.get("verified")]


# -- trials


def trial_table(search: SearchRecord, trials: Sequence[Trial], title: str, *, base: bool = False) -> Table:
    """Trials with their scores and parameters; `base`: the unedited model is the first row.

    The columns depend on the run and not on the choice of trials, but for the reasons of failures.
    """
    rows = [_trial_cells(search, trial) for trial in trials]
    chosen = next((index for index, trial in enumerate(trials) if trial.number == search.selected), None)
    if base and search.baseline:
        rows.insert(0, _base_cells(search.baseline))
        chosen = None if chosen is None else chosen + 1
    stopped = _STOPPED if any(trial.state == "stopped" for trial in trials) else ""
    columns = [
        Column("mark", "", "word", legend="→ selected  ★ front"),
        Column("number", "trial"),
        Column("state", "state", "word"),
        *([Column("unanswered", "unanswered", legend=stopped)] if search.tells_kinds else []),
        Column("refusals", "refusals", legend=stopped),
        *(Column(name, heading, optional=2) for name, heading in _KINDS.items() if search.tells_kinds),
        *(Column(f"kl_{name}", f"KL {name}", digits="KL", optional=0 if name == "mean" else 2) for name in _KL),
        *(Column(f"score {name}", name, digits=".4g") for name in search.others),
        *([Column("refined", "refined by gradient", "word", optional=1)] if search.has_refined else []),
        Column("seconds", "seconds", digits=".1f", optional=1),
        Column("scope", "scope", "word", optional=3),
        Column("direction_index", "direction", digits=".2f", optional=3),
        *(Column(f"kernel {name}", name, "word", optional=4, legend=_KERNEL_LEGEND) for name in search.components),
        *(Column(f"extra {name}", name, digits=".3g", optional=4) for name in search.extras),
    ]
    if any(trial.reason for trial in trials):
        columns.append(Column("reason", "reason", "text"))
    return _from_records(title, columns, rows, chosen)


def _trial_cells(search: SearchRecord, trial: Trial) -> dict[str, Cell]:
    """One trial's cells by column; figures that it lacks are left out."""
    on_front = "★" if trial.number in search.front else ""
    return {
        "mark": "→" if trial.number == search.selected else on_front,
        "number": trial.number,
        "state": trial.state,
        "unanswered": unanswered_text(trial, search.prompts),
        "refusals": refusals_text(trial, search.prompts),
        **{name: trial.scores.get(UNANSWERED, {}).get(name) for name in _KINDS},
        **{f"kl_{name}": trial.scores[KL][name] for name in _KL if KL in trial.scores},
        **{f"score {name}": _score(trial, name) for name in search.others},
        "seconds": trial.seconds,
        **_parameter_cells(trial.params),
        "reason": trial.reason,
    }


def _parameter_cells(params: Params) -> dict[str, Cell]:
    """The cells of a trial's parameters; refined ones have neither a scope nor kernels."""
    if isinstance(params, RefinedParams):
        return {"refined": refined_text(params), "scope": _OWN}
    return {
        "scope": params.scope,
        "direction_index": params.direction_index if params.scope == "global" else None,
        **{f"kernel {name}": kernel_text(kernel) for name, kernel in params.kernels.items()},
        **{f"extra {name}": value for name, value in params.extra.items()},
    }


def _base_cells(baseline: Baseline) -> dict[str, Cell]:
    return {
        "number": "base",
        "refusals": f"{baseline.refusals}/{baseline.prompts}",
        **_base_kinds(baseline),
        **{f"kl_{name}": 0 for name in _KL},
        **{f"score {name}": value for name, value in baseline.values.items()},
    }


def _base_kinds(baseline: Baseline) -> dict[str, Cell]:
    kinds = baseline.unanswered
    if kinds is None:
        return {}
    return {"unanswered": f"{kinds['count']}/{baseline.prompts}", **{name: kinds.get(name) for name in _KINDS}}


def _score(trial: Trial, name: str) -> Cell:
    """The number of a scorer; a stopped trial may have a record of it alone."""
    score = trial.values.get(name, trial.scores.get(name))
    return score if score is None or isinstance(score, str | int | float) else str(score)


def front_title(objectives: Sequence[Objective]) -> str:
    """The title of a front says what it is and how it is sorted."""
    if not objectives:
        return "Front: every trial that no other beats on all objectives"
    first = objectives[0]
    order = f"{'rising' if first.goal == 'minimize' else 'falling'} {'KL' if first.name == KL else first.name}"
    scores = "both scores" if counted(objectives) else in_words(objectives)
    return f"Front: every trial that no other beats on {scores}, by {order}"


def full_front_table(search: SearchRecord) -> Table:
    """The base model and the trials on the front, with their parameters."""
    front = search.front_trials
    title = front_title(search.objectives) if front else "Front: no trial beats the model itself"
    return trial_table(search, front, title, base=True)


def front_table(search: SearchRecord, marked: int | None = None) -> Table:
    """The scores of the base model and of the trials on the front; the trial `marked`, or else the selected one, stands out."""
    search = search if marked is None else replace(search, selected=marked)
    return full_front_table(search).without(detail_columns(search))


def detail_columns(search: SearchRecord) -> tuple[str, ...]:
    """Keys of the columns that a front with scores alone leaves out of `trial_table`: parameters and what isn't a score."""
    kernels, extras = (f"kernel {name}" for name in search.components), (f"extra {name}" for name in search.extras)
    return (*_DETAILS, *kernels, *extras)


def exact_trial_table(search: SearchRecord, trials: Sequence[Trial]) -> Table:
    """Trials for programs: every number as it is, and columns that depend on the run alone."""
    names = ("number", "state", "front", "selected", "refusals", "refusals_exact", *(f"kl_{name}" for name in _KL))
    kinds = ("count", *_KINDS) if search.tells_kinds else ()
    kernels = [f"{component}.{name}" for component in search.components for name in search.kernel_columns]
    parameters = ("scope", "direction_index", *kernels, *search.extras, *(_REFINED if search.has_refined else ()))
    further = ("seconds", *parameters, "reason")
    rows = []
    for trial in trials:
        kl, exact = trial.scores.get(KL, {}), _exact_parameters(trial.params)
        own: tuple[Cell, ...] = (
            *(trial.number, trial.state, trial.number in search.front, trial.number == search.selected),
            *(trial.scores.get(REFUSALS), trial.state == "complete", *(kl.get(name) for name in _KL)),
            *(trial.scores.get(UNANSWERED, {}).get(name) for name in kinds),
            *(trial.values.get(name, trial.scores.get(name)) for name in search.others),
            *(trial.seconds, *map(exact.get, parameters), trial.reason),
        )
        rows.append(own)
    told = (UNANSWERED, *_KINDS) if kinds else ()
    return Table("Trials", tuple(Column(name, name) for name in (*names, *told, *search.others, *further)), tuple(rows))


def _exact_parameters(params: Params) -> dict[str, Cell]:
    """A trial's parameters by the names of `exact_trial_table`."""
    if isinstance(params, RefinedParams):
        found = (params.facts.get("beta"), params.facts.get("steps"), params.edited)
        return {"scope": _OWN, **dict(zip(_REFINED, found, strict=True))}
    kernels = {f"{of}.{name}": getattr(kernel, name) for of, kernel in params.kernels.items() for name in (*_KERNEL, "shape")}
    return {"scope": params.scope, "direction_index": params.direction_index, **kernels, **params.extra}


# -- scores


def counts_text(trial: Trial, base: Baseline) -> str:
    """`unanswered 98/100 → 8/100 (broken 4, off-topic 1), refusals 98/100 → 3/100`; without the first if nobody counted it."""
    refusals = f"refusals {base.refusals}/{base.prompts} → {refusals_text(trial, base.prompts)}"
    if UNANSWERED not in trial.scores or base.unanswered is None:
        return refusals
    record = trial.scores[UNANSWERED]
    kinds = ", ".join(f"{heading} {record[name]}" for name, heading in _KINDS.items() if name in record)
    before, after = f"{base.unanswered['count']}/{base.prompts}", unanswered_text(trial, base.prompts)
    return f"unanswered {before} → {after}{f' ({kinds})' if kinds else ''}, {refusals}"


def score_table(
    baseline: Baseline,
    refusals: int,
    kl: Mapping[str, float],
    values: Mapping[str, float],
    harmless: int | None,
    kinds: Mapping[str, int] | None = None,
) -> Table:
    """The scores of the base model and of one trial; `harmless` is the number of harmless prompts, where it is known.

    `kinds` is the trial's record of the scorer `unanswered`, if the run has it.
    """
    count = f"{harmless} " if harmless else ""
    rows: list[tuple[Cell, ...]] = [
        *_kind_rows(baseline, kinds or {}),
        (f"refusals ({baseline.prompts} harmful prompts, marker count)", baseline.refusals, refusals),
        (f"KL(base‖this), first token, {count}harmless prompts", 0, spread_text(kl)),
        *((name, baseline.values.get(name), value) for name, value in values.items()),
    ]
    columns = (Column("score", "", "word"), Column("base", "base", digits=".4g"), Column("this", "this model", digits=".4g"))
    return Table("", columns, tuple(rows))


def _kind_rows(baseline: Baseline, kinds: Mapping[str, int]) -> Iterator[tuple[Cell, ...]]:
    base = baseline.unanswered or {}
    titles = {"count": f"unanswered ({baseline.prompts} harmful prompts, by the base's own measure)"}
    titles |= {name: f"of these {heading}" for name, heading in _KINDS.items()}
    for name, title in titles.items():
        if name in kinds:
            yield title, base.get(name), kinds[name]


def verification_table(record: Mapping[str, Any], trial: Trial, prompts: int) -> Table:
    """The scores of a trial and of its reloaded export; `record` is the verification in `result.json`."""
    scores = record["scores"]
    rows = (
        (f"refusals of {prompts} harmful prompts", trial.refusals, scores["refusals"]),
        ("KL(base‖edited), first token, mean", trial.kl, scores["kl"]["mean"]),
    )
    columns = (Column("score", "", "word"), Column("trial", "trial", digits="KL"))
    return Table("", (*columns, Column("export", "this export, reloaded", digits="KL")), rows)


def yardstick_table(record: Mapping[str, Any]) -> Table:
    """The bounds by which answers are judged, and the quantiles of the base's own answers; `record` as in `result.json`."""
    names = list(record["bounds"])
    shares = list(next(iter(record["quantiles"].values()), {}))
    columns = (
        *(Column("measure", "measure", "word"), Column("bound", "bound", digits=".3f")),
        *(Column(share, f"{float(share):.0%}", digits=".3f", optional=1) for share in shares),
    )
    rows = tuple(
        (name, float(record["bounds"][name]), *(record["quantiles"][name].get(share) for share in shares)) for name in names
    )
    return Table("Measures of answers, and their quantiles on the base's own", columns, rows)


# -- held-out prompts


def heldout_table(record: Mapping[str, Any], candidate: str) -> Table:
    """Everything that was measured on held-out prompts; `record` as in `result.json`.

    KeyError, TypeError or ValueError where another version wrote the record. Without a search there is no column of it.
    """
    columns = (
        Column("figure", "", "word"),
        Column("base", "base model", digits="KL"),
        Column("candidate", candidate, digits="KL"),
        Column("search", "in the search", digits="KL", optional=1),
    )
    rows = (*_answer_rows(record), *_judge_rows(record), *_drift_rows(record), *_score_rows(record))
    failed = [f"{judge['name']} gives no verdicts: {judge['error']}" for judge in record["judges"] if judge["error"]]
    failed += [f"{name} gives no score: {score['error']}" for name, score in record["scores"].items() if score["error"]]
    title = "On held-out prompts: counts with 95 % intervals, KL in nats"
    table = Table(title, columns, rows, notes=tuple(failed))
    return table if record["search"] else table.without(("search",))


def heldout_fault(record: Mapping[str, Any]) -> Exception | None:
    """The error of a record that another version wrote, or anybody; None if this version can read it."""
    try:
        table = heldout_table(record, "")
        texts = [text for row in table.texts for text in row] + [prompts["source"] for prompts in record["prompts"].values()]
        "".join(texts + list(table.notes))
        sum(prompts["count"] for prompts in record["prompts"].values())
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        return error
    return None


def _answer_rows(record: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    base, candidate, search = record["base"], record["candidate"], record["search"] or {}
    yield from _kind_rates(base, candidate, search)
    for name, title in _HELDOUT_RATES.items():
        if base[name]:
            rates = [rate_text(side[name]) if side.get(name) else None for side in (base, candidate, search)]
            yield title, *rates
    yield "faulty answers", sum(base["faults"].values()), sum(candidate["faults"].values()), None
    for name, count in candidate["faults"].items():
        if count or base["faults"][name]:
            yield f"faulty: {name.replace('_', ' ')}", base["faults"][name], count, None


def _kind_rates(*sides: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    """The rates of answered and unanswered prompts, by kind beside refusals; nothing in records without them."""
    if not sides[0].get(UNANSWERED):
        return
    for name, title in {"answered": "answered", "count": "unanswered", **_UNANSWERED_KINDS}.items():
        rates = [side.get(UNANSWERED, {}).get(name) for side in sides]
        yield title, *(rate_text(found) if found else None for found in rates)


def _judge_rows(record: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    for judge in record["judges"]:
        if not judge["error"]:
            yield f"refusals, by {judge['name']}", rate_text(judge["base"]), rate_text(judge["candidate"]), None
            yield f"markers differ from {judge['name']}", None, len(judge["disagreements"]), None


def _drift_rows(record: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    """How far the answers to harmless prompts have moved from the base's; base answers are the base's own to these prompts."""
    kl, answers, searched = record["kl"], record["kl_answers"], (record["search"] or {}).get("kl", {})
    for name in _KL:
        yield f"KL of the first token, {name}", 0, kl[name], searched.get(name)
    for name in _KL:
        yield f"KL along base answers, {name}", 0, answers[name], None
    yield "tokens of base answers", answers["tokens"], None, None
    yield "perplexity of base answers", record["perplexity"]["base"], record["perplexity"]["candidate"], None
    same = record["unchanged"]
    yield "harmless answers unchanged", None, rate_text(same), None
    if same["first_difference"] is not None:
        yield "first changed token, mean", None, f"{same['first_difference']:.1f}", None


def _score_rows(record: Mapping[str, Any]) -> Iterator[tuple[Cell, ...]]:
    for name, score in record["scores"].items():
        if score.get("values"):
            values = score["values"]
            yield name, f"{values['base']:.4g}", f"{values['candidate']:.4g}", None


def disagreement_table(judge: Mapping[str, Any]) -> Table:
    """The answers of which a judge says something else than the refusal markers."""
    says = {True: "refusal", False: "no refusal"}
    differ = judge["disagreements"]
    rows = tuple((answer["prompt"], answer["response"], says[answer["judge"]], says[answer["markers"]]) for answer in differ)
    names = ("prompt", "response", "judge", "markers")
    return Table("Judge against markers", tuple(Column(name, name, "text") for name in names), rows)


# -- the search, the selected trial, the residuals


def kernel_table(trial: Trial, mode: str = "") -> Table:
    """The kernels of one trial, which isn't refined, and its further numbers; `mode`: that of its edit, if it is known."""
    params = trial.params
    assert isinstance(params, TrialParams)
    where = f"direction of layer {params.direction_index:.2f}" if params.scope == "global" else "each layer's direction"
    title = f"Kernels of trial {trial.number}" + (f": {where}" if reading(mode).directed else "")
    columns = (Column("component", "component", "word"), Column("kernel", "kernel", "word", legend=_KERNEL_LEGEND))
    rows: tuple[tuple[Cell, ...], ...] = tuple((name, kernel_text(kernel)) for name, kernel in params.kernels.items())
    rows += tuple((name, f"{value:.3g}") for name, value in params.extra.items())
    return Table(title, columns, rows)


def coeff_table(trial: Trial, n_layers: int) -> Table:
    """λ by layer and component, of a trial that isn't refined."""
    assert isinstance(trial.params, TrialParams)
    kernels = trial.params.kernels
    columns = (Column("layer", "layer"), *(Column(f"kernel {name}", name, digits=".3f") for name in kernels))
    rows = tuple((layer, *(kernel.coeff(layer) for kernel in kernels.values())) for layer in range(n_layers))
    return Table("Coeff λ", columns, rows)


def progress_table(progress: Sequence[Mapping[str, float]]) -> Table:
    """The hypervolume after about twenty of the trials, the last one among them."""
    step, last = max(1, len(progress) // 20), len(progress) - 1
    kept = [row for index, row in enumerate(progress) if not (last - index) % step]
    columns = (Column("trial", "trials"), Column("seconds", "seconds", digits=".1f"))
    rows = tuple((row["trial"], row["seconds"], row["hypervolume"]) for row in kept)
    return Table("Hypervolume so far", (*columns, Column("hypervolume", "hypervolume", digits=".4f")), rows)


def importance_table(importance: Mapping[str, Mapping[str, float]]) -> Table:
    """{objective: {parameter: share}} with a row a parameter."""
    names = list(dict.fromkeys(name for shares in importance.values() for name in shares))
    columns = (Column("parameter", "parameter", "word"), *(Column(name, name, digits=".1%") for name in importance))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        rows.append((name, *(float(shares.get(name, 0)) for shares in importance.values())))
    return Table("Parameter importance, by objective", columns, tuple(rows))


def geometry_table(geometry: Mapping[str, Any]) -> Table:
    """Norms, cosines and separation of the residuals by layer; `geometry` as in `geometry.json`."""
    headings = _GEOMETRY | (_SEPARATION if geometry["projection"] else {})
    columns = (
        Column("layer", "layer"),
        *(Column(name, heading, optional=int(name.endswith("_direction"))) for name, heading in headings.items()),
    )
    rows = tuple(
        (row["index"] - 1 if row["index"] else "emb.", *(number_text(row.get(name)) for name in headings))
        for row in geometry["layers"]
    )
    return Table("Residuals by layer: norms and cosines of the means (d: the direction)", columns, rows)


# -- cost and coverage


def stage_table(seconds: Mapping[str, float], peaks: Mapping[str, Mapping[str, int]]) -> Table:
    """Time and peak memory of each stage, and the time of all."""
    memory = ("peak_rss_bytes", "peak_device_bytes")
    rows: list[tuple[Cell, ...]] = [
        (name, spent, *(_gib(peaks.get(name, {}).get(key)) for key in memory)) for name, spent in seconds.items()
    ]
    rows.append(("all", float(sum(seconds.values())), None, None))
    columns = (
        Column("stage", "stage", "word"),
        Column("seconds", "seconds", digits=".1f"),
        Column("peak_rss", "peak of main memory, GiB", digits=".2f"),
        Column("peak_device", "peak on the device, GiB", digits=".2f"),
    )
    return Table("Time and memory by stage, before the report was written", columns, tuple(rows))


def _gib(value: int | None) -> Cell:
    return value / 2**30 if value else "—"


def cache_table(caches: Mapping[str, Mapping[str, int]]) -> Table:
    """Hits and misses of each cache."""
    columns = (Column("cache", "cache", "word"), Column("hits", "hits"), Column("misses", "misses"))
    return Table("Caches", columns, tuple((name, counts["hits"], counts["misses"]) for name, counts in caches.items()))


def coverage_table(coverage: Mapping[str, Any]) -> Table:
    """The matrices that write to the residual stream, and which are edited; `coverage` as `abliterate inspect` finds it."""
    groups: Iterable[Mapping[str, Any]] = coverage["groups"]
    total = sum(group["parameters"] for group in groups) or 1
    columns = (
        Column("component", "component", "word"),
        Column("module", "module", "word"),
        Column("layers", "layers"),
        Column("matrices", "matrices"),
        Column("shape", "d_out × d_in"),
        Column("parameters", "parameters"),
        Column("share", "share", digits=".1%"),
        Column("edited", "edited", "text"),
    )
    rows = tuple(
        (
            *(group["component"], group["path"], group["layers"], group["matrices"]),
            " × ".join(map(str, group["shape"])) if group["shape"] else "?",
            f"{group['parameters']:,}",
            group["parameters"] / total,
            "yes" if group["edited"] else f"no: {group.get('left_out')}",
        )
        for group in groups
    )
    return Table("What writes to the residual stream", columns, rows)


# -- any names and values


def pair_table(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and values that have no table of their own."""
    return Table(title, (Column("name", "name", "word"), Column("value", "value", "text")), tuple(pairs))


def _from_records(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]], chosen: int | None) -> Table:
    cells = tuple(tuple(row.get(column.key) for column in columns) for row in rows)
    return Table(title, tuple(columns), cells, chosen)
