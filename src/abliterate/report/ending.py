"""What commands say at their end: the selected trial and its export, what a run took, where its report is, and what is next."""

from __future__ import annotations

from pathlib import Path

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import as_command
from abliterate.model.names import DEMO
from abliterate.objectives import other_scores
from abliterate.report.refined import refined_text, wider_text
from abliterate.report.tables import (
    SearchRecord,
    counts_text,
    export_text,
    front_table,
    heldout_fault,
    heldout_table,
)
from abliterate.terminal.quantities import duration_text
from abliterate.types import RefinedParams, Table, kl_text

# The stages that an ending names if they take at least this share of the time.
SHARE = 0.1


def summary(result: Result, where: str, *, with_front: bool = True) -> tuple[Table | str, ...]:
    """The front, the selected trial and its export, in tables and sentences; `where` is the directory of the export."""
    search = SearchRecord.of(result)
    parts: list[Table | str] = [front_table(search)] if with_front else []
    trial, base = search.selected_trial, search.baseline
    if trial is None or base is None:
        return tuple(parts)
    others = "".join(f", {text}" for text in other_scores(trial, base.values))
    counts = counts_text(trial, base)
    how = f" (refined by gradient: {refined_text(trial.params)})" if isinstance(trial.params, RefinedParams) else ""
    parts.append(f"selected trial {trial.number}{how}: {counts}, KL {kl_text(trial.kl)}{others}")
    heldout = result.heldout
    if heldout and heldout.get("trial") == trial.number and heldout_fault(heldout) is None:
        parts.append(heldout_table(heldout, f"trial {trial.number}"))
    export = result.export
    if export.path:
        whose = "" if export.trial in (None, trial.number) else f" of trial {export.trial}"  # an earlier session's
        parts.append(f"exported ({export.kind}{whose}): {where}/{export.path}, {export_text(export.model_dump())}")
        if export.pushed:
            parts.append(f"pushed: {export.pushed}")
    return tuple(parts)


def ending(result: Result, where: str, *, front_shown: bool) -> tuple[Table | str, ...]:
    """All that a run says at its end; the front is left out if it was shown with a question."""
    found = summary(result, where, with_front=not front_shown)
    return (*found, *_wider(result, where), took_text(result), *next_lines(result, where))


def _wider(result: Result, where: str) -> list[str]:
    """A sentence that names another trial where the selected one is a narrow fit."""
    chosen = SearchRecord.of(result).selected_trial
    if chosen is None or result.baseline is None:
        return []
    text = wider_text(
        chosen, result.trials, result.baseline.prompts, lambda wide: as_command("export", where, "--trial", str(wide.number))
    )
    return [text] if text else []


def took_text(result: Result) -> str:
    """`took 3 min for 10 trials and 8 refined ones: search 1 min, refine 2 min`."""
    whole = sum(result.timings.values())
    refined = sum(isinstance(trial.params, RefinedParams) for trial in result.trials)
    counts = [f"{len(result.trials) - refined} trials"] + [f"{refined} refined ones"] * bool(refined)
    longest = sorted(result.timings.items(), key=lambda stage: -stage[1])
    named = ", ".join(f"{name} {duration_text(seconds)}" for name, seconds in longest if seconds >= SHARE * whole > 0)
    return f"took {duration_text(whole)} for {' and '.join(counts)}" + (f": {named}" if named else "")


def next_lines(result: Result, where: str) -> list[str]:
    """Where the report is, and the commands that go on from here."""
    model = result.model.id if result.model else ""
    base = model if model == DEMO or "/" in model else "BASE"  # of a local directory, its path isn't recorded
    commands = {
        as_command("chat", where): f"talk to trial {result.selected}",
        as_command("export", where, "--trial", "N"): "export another trial",
        as_command("evaluate", base, where): "try other prompts",
        as_command("report", where, "--live"): "see the report",
    }
    width = max(map(len, commands))
    lines = [f"  {command:<{width}}  {purpose}" for command, purpose in commands.items()]
    return [f"report: {RunDirectory(Path(where)).report}", "next:", *lines]
