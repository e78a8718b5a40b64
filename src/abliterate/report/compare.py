"""Compare runs: whether their scores can be compared at all, their fronts together, the best trial, and what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.objectives import COUNTS, KL, REFUSALS, UNANSWERED, counted, in_words
from abliterate.report.data import public_settings
from abliterate.report.html import in_words as as_text
from abliterate.report.tables import (
    SearchRecord,
    counts_text,
    detail_columns,
    refusals_text,
    trial_table,
    unanswered_text,
)
from abliterate.search.front import hypervolume, pareto_front
from abliterate.search.selection import parse_rule
from abliterate.types import Cell, Column, Objective, Table, Trial, kl_text

# Runs are named by letters in plots.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The rule where the runs name none, or name trials, whose numbers mean nothing in another run.
_RULE, _MAX_KL = "auto", 0.1
# Settings that say where and when a run was made, and nothing of how.
_PLACES = ("load.template_now",)
# The prompts that trials are scored on, by their names in `result.json`.
_PROMPTS = {"harmful evaluation prompts": "harmful_eval", "harmless evaluation prompts": "harmless_eval"}
_RENDERING = "rendering of a prompt"
# What scores depend on, and how runs differ in it, in words. All but the first three are parts of a run's identity. Every run
# records all of them before its first trial, so a part that no run has is of an old or a cut file and isn't known to be equal.
_RECORDED = {
    "harmful evaluation prompts": "they were scored on different harmful prompts",
    "harmless evaluation prompts": "they were scored on different harmless prompts",
    _RENDERING: "their prompts are asked differently (system prompt, template or date)",
    "tokenizer": "their tokenizers or chat templates differ",
    "set of template options": "their chat templates have other options",
    "response length or prefix": "their responses have another length limit or prefix",
    "set of thinking blocks or answer tags": "their thinking blocks are treated differently",
    "set of scorers or markers": "their scorers or refusal markers differ",
}


@dataclass(frozen=True)
class ComparedRun:
    """One run: `label` is a letter and the directory's name; `settings` are without places of this machine.

    `doubts` say what is wrong with its files, each in a sentence.
    """

    directory: RunDirectory
    label: str
    record: Mapping[str, Any]
    search: SearchRecord
    settings: Mapping[str, Any]
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """What is seen of several runs. Where `obstacles` says why their scores can't be compared, there is neither front nor best.

    `front` is the Pareto front of all runs together, as (index of the run, trial), the best in the first objective first.
    `rule` is the selection rule that names the `best` of it.
    """

    runs: tuple[ComparedRun, ...]
    obstacles: tuple[str, ...]
    rule: str
    max_kl: float
    front: tuple[tuple[int, Trial], ...]
    best: tuple[int, Trial] | None

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of all runs; of the first run where they differ."""
        return self.runs[0].search.objectives

    @property
    def height(self) -> str:
        """The count that plots show over KL: that of the objectives, or refusals where the runs have no common one."""
        names = {counted(run.search.objectives) for run in self.runs}
        return names.pop() or REFUSALS if len(names) == 1 else REFUSALS

    @property
    def in_shares(self) -> bool:
        """Whether counts are shown as shares, because the runs have different numbers of prompts."""
        return len({run.search.prompts for run in self.runs}) > 1

    def of_height(self, run: ComparedRun, count: float) -> float:
        """A count as plots show it."""
        return count / max(1, run.search.prompts) if self.in_shares else count


def compare(directories: Sequence[RunDirectory], select: str = "") -> Comparison:
    """Compare the runs in these directories; `select` is the rule that names the best, by default the runs' own or `auto`.

    Raises:
        InputError: there are too few or too many runs, one is named twice, has no scored trial or a damaged `result.json`, or
            the rule isn't one.
    """
    if not 2 <= len(directories) <= len(LETTERS):
        raise InputError(f"A comparison needs 2 to {len(LETTERS)} runs, not {len(directories)}; name their directories.")
    places = [directory.path.resolve() for directory in directories]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise InputError(f"The run {directories[index].path} is named twice; name each run once.")
    runs = tuple(_read(directory, letter) for directory, letter in zip(directories, LETTERS, strict=False))
    rule, max_kl = _rule_of(runs, select)
    obstacles = tuple(_obstacles(runs))
    if obstacles:  # then the runs may have no common objectives, so a rule of one run need not be a rule of another
        return Comparison(runs, obstacles, rule, max_kl, (), None)
    owner = {id(trial): index for index, run in enumerate(runs) for trial in run.search.trials}
    baseline, objectives = runs[0].search.baseline, runs[0].search.objectives
    assert baseline is not None
    everything = [trial for run in runs for trial in run.search.front_trials]
    front = pareto_front(everything, baseline, objectives)
    best = parse_rule(rule, max_kl, objectives).preview(front)
    found = tuple((owner[id(trial)], trial) for trial in front)
    return Comparison(runs, (), rule, max_kl, found, None if best is None else (owner[id(best)], best))


def _read(directory: RunDirectory, letter: str) -> ComparedRun:
    result = Result.so_far(directory)
    search = SearchRecord.of(result)
    if search.baseline is None or not search.baseline.prompts or all(trial.state == "failed" for trial in search.trials):
        raise InputError(f"The run in {directory.path} has no scored trial yet; wait for one, or leave it out.")
    missing: dict[str, str] = {}
    settings = public_settings(directory, missing)
    doubts = tuple(filter(None, (result.doubt, *missing.values())))
    return ComparedRun(directory, f"{letter}: {directory.path.resolve().name}", result.to_record(), search, settings, doubts)


def _rule_of(runs: Sequence[ComparedRun], select: str) -> tuple[str, float]:
    """The rule, and the largest KL that `auto` prefers."""
    limits = [run.settings.get("search.select_max_kl") for run in runs]
    max_kl = limits[0] if isinstance(limits[0], int | float) and limits == limits[:1] * len(runs) else _MAX_KL
    own = {str(run.settings.get("search.select", _RULE)) for run in runs}
    rule = select or (own.pop() if len(own) == 1 else _RULE)
    if rule.replace(" ", "").lower().startswith("trial:"):
        if select:
            raise InputError(
                f"The rule {select} names a trial of one run; give a rule for all, such as auto, knee or kl<=0.05."
            )
        rule = _RULE
    return rule, float(max_kl)


def _recorded(run: ComparedRun, part: str) -> str | None:
    """The hash that the run records of a part of `_RECORDED`; None if it records none."""
    if part in _PROMPTS:
        return run.record["prompts"].get(_PROMPTS[part], {}).get("digest")
    return run.record.get("rendering") if part == _RENDERING else (run.record.get("identity") or {}).get(part)


def _obstacles(runs: Sequence[ComparedRun]) -> list[str]:
    """Why the scores of the runs can't be compared, as parts of a sentence."""

    def differ(value: Any) -> bool:
        return len({repr(value(run)) for run in runs}) > 1

    found = []
    if differ(lambda run: [run.record["model"].get(name) for name in ("fingerprint", "dtype", "quantization")]):
        found.append("their base models differ, and a KL is measured against the run's own base")
    unknown = []
    for part, words in _RECORDED.items():
        values = [_recorded(run, part) for run in runs]
        if all(value is None for value in values):
            unknown.append(part)
        elif len(set(values)) > 1:
            found.append(words)
    if unknown:
        found.append(
            f"their result.json files, which are old or were cut, don't record whether these agree: {', '.join(unknown)}"
        )
    if differ(lambda run: [(one.name, one.goal) for one in run.search.objectives]):
        named = "; ".join(f"{run.label[0]}: {in_words(run.search.objectives)}" for run in runs)
        found.append(f"their objectives differ ({named})")
    return found


# -- sentences and tables


def verdict(found: Comparison) -> list[str]:
    """The result of a comparison in a few sentences."""
    if found.obstacles:
        return [
            f"The scores of these runs can't be compared: {'; '.join(found.obstacles)}.",
            "So no best trial is named. The fronts are shown in one plot, but a point that lies lower isn't therefore better.",
        ]
    if found.best is None:
        return [f"No trial satisfies the rule {found.rule!r}."]
    index, trial = found.best
    run, base = found.runs[index], found.runs[index].search.baseline
    assert base is not None
    scores = f"{counts_text(trial, base)}, KL {kl_text(trial.kl)}"
    said = f"Best by the rule {found.rule}: trial {trial.number} of {run.label}; {scores}."
    per_run = ", ".join(
        f"{sum(owner == place for owner, _ in found.front)} of {run.label}" for place, run in enumerate(found.runs)
    )
    return [said, _explained(found), f"Trials that no trial of any of these runs beats: {per_run}."]


def _explained(found: Comparison) -> str:
    """What a named rule does."""
    knee = "the knee, the trial farthest below the straight line between the front's two ends"
    if found.rule.lower() == "knee":
        return f"The rule takes {knee}."
    if found.rule.lower() == "auto":
        return f"The rule takes the best in the main objective among trials with a KL up to {found.max_kl:g}, else {knee}."
    return "The rule is applied to the front of all runs together."


def runs_table(found: Comparison) -> Table:
    """A row a run: its model, its trials, its front, and its selected trial."""
    with_volume = all(counted(run.search.objectives) for run in found.runs)
    columns = (
        Column("run", "run", "word"),
        Column("model", "model", "word", optional=2),
        Column("trials", "trials"),
        Column("on_front", "on its front", optional=1),
        *([Column("hypervolume", "hypervolume", digits=".4f", optional=1)] if with_volume else []),
        Column("selected", "selected"),
        Column("unanswered", "unanswered"),
        Column("refusals", "refusals"),
        Column("kl", "KL mean", digits="KL"),
    )
    rows = []
    for run in found.runs:
        search, chosen = run.search, run.search.selected_trial
        assert search.baseline is not None
        volume = [hypervolume(search.front_trials, search.baseline, search.objectives)] if with_volume else []
        cells: tuple[Cell, ...] = ("none yet", "", "", None)
        if chosen is not None:
            counts = unanswered_text(chosen, search.prompts), refusals_text(chosen, search.prompts)
            cells = (f"trial {chosen.number}", *counts, chosen.kl)
        rows.append((run.label, run.record["model"].get("id", ""), len(search.trials), len(search.front), *volume, *cells))
    return Table("Runs, and the trial that each has selected", columns, tuple(rows))


def fronts_table(found: Comparison) -> Table:
    """The fronts of all runs in one table: sorted together where the scores can be compared, else run by run."""
    parts = [
        trial_table(run.search, run.search.front_trials, "").without(("mark", *detail_columns(run.search)))
        for run in found.runs
    ]
    known: dict[str, Column] = {column.key: column for part in parts for column in part.columns}
    marks = {(index, trial.number): "★" for index, trial in found.front}
    if found.best is not None:
        marks[found.best[0], found.best[1].number] = "→"
    rows: list[tuple[float, tuple[Cell, ...], bool]] = []
    for index, (run, part) in enumerate(zip(found.runs, parts, strict=True)):
        keys = [column.key for column in part.columns]
        for trial, row in zip(run.search.front_trials, part.rows, strict=True):
            cells, mark = dict(zip(keys, row, strict=True)), marks.get((index, trial.number), "")
            first = run.search.objectives[0]
            place = float(index) if found.obstacles else first.cost(trial.value(first.name))
            rows.append((place, (mark, run.label, *(cells.get(key) for key in known)), mark == "→"))
    rows.sort(key=lambda row: row[0])  # stable, so a run's trials keep their order
    chosen = next((place for place, row in enumerate(rows) if row[2]), None)
    legend = "" if found.obstacles else "→ best by the rule  ★ no trial of any of these runs beats it"
    columns = (Column("mark", "", "word", legend=legend), Column("run", "run", "word"), *known.values())
    return Table("The fronts of all runs", columns, tuple(row for _, row, _ in rows), chosen)


def differences(found: Comparison) -> dict[str, list[Any]]:
    """{setting, version or device: its value in each run} of all that isn't the same in every run."""
    facts = [
        {name: value for name, value in run.settings.items() if name not in _PLACES}
        | {f"version of {name}": value for name, value in run.record["environment"].get("versions", {}).items()}
        | {"device (as used)": run.record["environment"].get("device")}
        for run in found.runs
    ]
    names = dict.fromkeys(name for own in facts for name in own)
    values = {name: [own.get(name) for own in facts] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def differences_table(found: Comparison) -> Table:
    """The same as a table with a column a run."""
    columns = (Column("name", "setting", "word"), *(Column(run.label, run.label, "text") for run in found.runs))
    rows = tuple((name, *map(as_text, values)) for name, values in differences(found).items())
    notes = () if rows or not all(run.settings for run in found.runs) else ("All settings are the same.",)
    return Table("What differs between the runs", columns, rows, notes=notes)


def title_of(found: Comparison, name: str) -> str:
    """The title of an axis that shows KL or a count."""
    if name == KL:
        return "mean KL of the first token, nats"
    words = {UNANSWERED: "unanswered", REFUSALS: "refusals"}[name if name in COUNTS else REFUSALS]
    return (
        f"share of harmful prompts, {words}"
        if found.in_shares
        else f"{words} of {found.runs[0].search.prompts} harmful prompts"
    )
