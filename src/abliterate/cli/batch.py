"""`abliterate run` with several models or a list: the runs follow one another, even after a run that failed.

This module owns the list's format, the directory of each run, the rule that a run counts as finished by, and the summary. Each
run is that of `abliterate run MODEL`, except that it never prompts: the selection rule picks the trial.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import ExportRecord, Result
from abliterate.artifacts.run_directory import RunDirectory, default_path
from abliterate.cli.exit import explain, show_traceback
from abliterate.cli.run import RunFlags, carry_out, resolve
from abliterate.errors import DONE, INTERRUPTED, AbliterateError, InputError, Interrupted
from abliterate.files import expanded, read_toml, safe_name
from abliterate.model.hub import ask_again
from abliterate.objectives import UNANSWERED, other_names
from abliterate.settings.schema import SearchSettings, Settings
from abliterate.settings.sources import by_section, load_settings, without_password
from abliterate.terminal import json_lines
from abliterate.terminal.interrupts import Interrupts
from abliterate.terminal.reporters import make_reporter, show_error, show_heading
from abliterate.terminal.tables import print_table
from abliterate.types import RefinedParams, kl_text

# Settings that change neither the result of a run nor its files.
_WITHOUT_EFFECT = ("out", "device", "cache_dir", "efficiency")


@dataclass(frozen=True)
class Planned:
    """One run of several: the options of the command line with the run's own `model` and `out`, and its entry in the list."""

    options: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The model as it was given."""
        return str(self.options["model"])


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run. `state`: done, skipped (it was done before), failed, interrupted, not begun."""

    model: str
    state: str
    directory: str | None = None
    trial: int | None = None
    refusals: int | None = None
    refusals_before: int | None = None
    unanswered: int | None = None
    prompts: int | None = None
    kl: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    export: str | None = None
    verified: bool | None = None
    exit_code: int | None = None
    message: str = ""

    @staticmethod
    def of(model: str, state: str, directory: RunDirectory, result: Result) -> Outcome:
        """The outcome of a run that has a result."""
        trial = next(trial for trial in result.trials if trial.number == result.selected)
        export, baseline = result.export, result.baseline
        if export.trial != result.selected:  # an earlier session's
            export = ExportRecord()
        assert baseline is not None
        return Outcome(
            model=model,
            state=state,
            directory=str(directory.path),
            trial=trial.number,
            refusals=trial.refusals,
            refusals_before=baseline.refusals,
            unanswered=trial.unanswered if UNANSWERED in trial.scores else None,
            prompts=baseline.prompts,
            kl=trial.kl,
            others={name: trial.values[name] for name in other_names(trial.values)},
            export=str(directory.path / export.path) if export.path else None,
            verified=export.verified,
            exit_code=DONE,
        )


def run(models: Sequence[str], listed: Path | None, options: Mapping[str, Any], config: str, flags: RunFlags) -> None:
    """`abliterate run A B …` and `abliterate run --list FILE`.

    Raises:
        InputError: the list or the options are invalid, before the first run starts. Interrupted, AbliterateError: not every
        run is done at the end.
    """
    planned = plan(models, listed, options, config)
    interrupts = Interrupts()
    outcomes: list[Outcome] = []
    with interrupts.listening():
        for number, entry in enumerate(planned, start=1):
            outcomes.append(_run_one(entry, (number, len(planned)), config, flags, interrupts))
            if outcomes[-1].state == "interrupted":
                break
            _free_memory(entry, config)
    last = outcomes[-1]
    outcomes += [Outcome(entry.model, "not begun") for entry in planned[len(outcomes) :]]
    _show(outcomes, as_json=flags.as_json)
    done = sum(outcome.state in ("done", "skipped") for outcome in outcomes)
    if last.state == "interrupted":
        raise Interrupted(
            last.exit_code or INTERRUPTED,
            f"interrupted; {done} of {len(planned)} runs are done. Continue with the same command and --resume, which skips "
            "finished runs and continues the interrupted run.",
        )
    if done < len(planned):
        raise AbliterateError(
            f"{len(planned) - done} of {len(planned)} runs failed, the summary says why; fix that and repeat the command with "
            "--resume, which skips the finished runs."
        )


def plan(models: Sequence[str], listed: Path | None, options: Mapping[str, Any], config: str) -> list[Planned]:
    """The runs, each with a directory of its own; "" stands for the default directory, which has the time in its name.

    The settings of every run are checked now, so that a mistake in the last run does not show up after hours.

    Raises:
        InputError: the first mistake that was found.
    """
    if listed and (models or "model" in options):
        raise InputError(f"The models come from {listed}; leave out the models on the command line, or --list.")
    if "model" in options:
        raise InputError("Several models and --set model contradict each other; give either.")
    common, entries = read_list(listed) if listed else ({}, [{"model": model} for model in models])
    shared = load_settings(config, options, entry=common)
    base = shared.out or (f"runs/{safe_name(listed.stem)}" if listed else "")
    planned: list[Planned] = []
    for number, entry in enumerate(entries, start=1):
        where = f"Run {number} of {listed}" if listed else f"Model {number}"
        model, own = entry.get("model", shared.model), entry.get("out", "")
        if not (isinstance(model, str) and model and isinstance(own, str)):
            raise InputError(f"{where} has no valid model or out; give model as a string, and out, if any, as a path.")
        own = str(expanded(own)) if own else ""
        folder = own if own and not shared.out else _free_folder(base, own or model, model, planned, where) if base else ""
        planned.append(Planned({**options, "model": model, "out": folder}, by_section(common, entry)))
    _check(planned, config, listed)
    return planned


def read_list(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings that a list gives all its runs, and those of each `[[run]]` table; both as in a configuration file."""
    content = read_toml(path)
    entries = content.pop("run", None)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"The list {path} has no runs; write each as a table that begins with [[run]] and names its model.")
    return content, entries


def _free_folder(base: str, name: str, model: str, planned: Sequence[Planned], where: str) -> str:
    """`base`/`name`, with a number appended if a model of the same name (by another owner) has that folder already."""
    taken = {_path_key(run): run for run in planned}
    folder = preferred = Path(base) / safe_name(name)
    number = 1
    while (other := taken.get(os.path.abspath(folder).casefold())) is not None:
        if other.model == model:
            raise InputError(
                f"{where} would share a directory with another run of {model}; give each of the two an out of its own."
            )
        number += 1
        folder = preferred.with_name(f"{preferred.name}-{number}")
    return str(folder)


def _path_key(planned: Planned) -> str:
    # Casefolded, because some file systems don't distinguish a from A.
    return os.path.abspath(planned.options["out"]).casefold()


def _check(planned: Sequence[Planned], config: str, listed: Path | None) -> None:
    """InputError if the settings of a run are invalid or two runs collide."""
    first_with: dict[str, int] = {}
    pushed: dict[str, int] = {}
    for number, run in enumerate(planned, start=1):
        try:
            settings = load_settings(config, run.options, entry=run.entry)
        except InputError as error:
            if listed is None:  # the mistake is on the command line then, and concerns every run
                raise
            raise InputError(f"Run {number} of {listed} ({run.model}): {error}") from error
        # --resume finds a run without a directory of its own by its model alone.
        key = _path_key(run) if run.options["out"] else f"model {run.model}"
        before = first_with.setdefault(key, number)
        if before != number:
            shared = f"directory {run.options['out']}" if run.options["out"] else f"model {run.model}"
            raise InputError(f"Runs {before} and {number} have the same {shared}; give each its own, or leave one out.")
        if settings.export.push and pushed.setdefault(settings.export.push, number) != number:
            raise InputError(
                f"Runs {pushed[settings.export.push]} and {number} would be pushed to one repository, {settings.export.push}; "
                "give each its own export.push in a --list."
            )


def _run_one(planned: Planned, position: tuple[int, int], config: str, flags: RunFlags, interrupts: Interrupts) -> Outcome:
    """Carry out one run and return its outcome, whether it succeeds, fails or is interrupted."""
    directory: RunDirectory | None = None
    try:
        interrupts.check()
        ask_again()
        while not planned.options["out"] and default_path(planned.model).exists():
            time.sleep(0.1)  # until the next second gives another name
        settings, directory = resolve(planned.options, config, flags, planned.entry)
        _announce(planned.model, position, directory, as_json=flags.as_json)
        if flags.resume and (result := _finished(settings, directory)):
            make_reporter(as_json=flags.as_json).note(f"done before, in {directory.path}", directory=str(directory.path))
            return Outcome.of(planned.model, "skipped", directory, result)
        return Outcome.of(planned.model, "done", directory, carry_out(settings, directory, flags, interrupts, ask=False))
    except (Interrupted, KeyboardInterrupt) as error:
        state, message = "interrupted", str(error) if directory is not None else "interrupted before it began"
        code = (error if isinstance(error, Interrupted) else Interrupted.by(error, "")).exit_code
    except Exception as error:
        show_traceback()
        state, (message, code) = "failed", explain(error)
    where = str(directory.path) if directory is not None and directory.holds_run else None
    if state == "failed":
        show_error(f"run {position[0]} of {position[1]} ({planned.model}): {message}")
        if flags.as_json:
            json_lines.emit("failed", model=planned.model, directory=where, message=message, exit_code=code)
    return Outcome(planned.model, state, where, exit_code=code, message=message)


def _finished(settings: Settings, directory: RunDirectory) -> Result | None:
    """The result of a run that has nothing left to do under these settings; None if work is left."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        result = Result.read(directory)
        is_complete = settings.export.kind == "none" or _is_exported(settings, directory, result)
        is_complete = is_complete and result.selected is not None and _has_ended(directory)
        searched = sum(not isinstance(trial.params, RefinedParams) for trial in result.trials)
        if searched >= settings.search.trials and is_complete and _is_of(settings, read_toml(directory.settings)):
            return result
    return None


def _is_exported(settings: Settings, directory: RunDirectory, result: Result) -> bool:
    """Whether the selected trial's export is there as asked; an earlier session may have left another trial's."""
    export, wanted = result.export, settings.export
    is_there = export.kind == wanted.kind and export.path and (directory.path / export.path).is_dir()
    return bool(is_there and export.trial == result.selected and (export.pushed or not wanted.push))


def _has_ended(directory: RunDirectory) -> bool:
    """Whether the last session has come to its end: it writes the settings first and the report last."""
    begun, ended = directory.settings, directory.report
    return begun.exists() and ended.exists() and ended.stat().st_mtime_ns >= begun.stat().st_mtime_ns


def _is_of(settings: Settings, stored: Mapping[str, Any]) -> bool:
    """Whether a run that stored these settings is the run that `settings` ask for."""
    # An earlier version's file lacks settings that came later, which are at their defaults then.
    before = by_section(Settings.model_construct().model_dump(mode="json"), stored)
    settings = settings.model_copy(update={"search": _as_stored(settings.search)})

    def differs(requested: Settings) -> bool:
        given = requested.model_dump(mode="json")
        return any(given[name] != before[name] for name in given if name not in _WITHOUT_EFFECT) or bool(before.keys() - given)

    if not differs(settings):
        return True
    from abliterate.pipeline.preflight import as_refinable, with_edit_mode  # imports torch, so only where it may matter

    return not differs(as_refinable(with_edit_mode(settings), lambda text: None))


def _as_stored(search: SearchSettings) -> SearchSettings:
    """As `settings.toml` has them: without the password of a database."""
    return search.model_copy(update={"storage": without_password(search.storage)})


def _free_memory(planned: Planned, config: str) -> None:
    """Free the memory of the run before the next model is loaded; the errors that held it are gone by now."""
    if "torch" not in sys.modules:  # the run failed before a model was loaded
        return
    from abliterate.model import memory
    from abliterate.model.devices import choose_device

    with contextlib.suppress(InputError):
        memory.clear_device_cache(choose_device(load_settings(config, planned.options, entry=planned.entry).device))


def _announce(model: str, position: tuple[int, int], directory: RunDirectory, *, as_json: bool) -> None:
    number, total = position
    if as_json:
        json_lines.emit("run", number=number, total=total, model=model, directory=str(directory.path))
    else:
        show_heading(f"run {number} of {total}: {model} → {directory.path}")


def _show(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """Print the summary."""
    if as_json:
        json_lines.emit("summary", runs=[asdict(outcome) for outcome in outcomes])
        return
    rows, others = [], other_names({name for outcome in outcomes for name in outcome.others})
    for number, outcome in enumerate(outcomes, start=1):
        scores = ["", "", "", ""]
        if outcome.kl is not None:
            refusals = f"{outcome.refusals_before}/{outcome.prompts} → {outcome.refusals}/{outcome.prompts}"
            unanswered = "" if outcome.unanswered is None else f"{outcome.unanswered}/{outcome.prompts}"
            scores = [str(outcome.trial), unanswered, refusals, kl_text(outcome.kl)]
        scores += [f"{outcome.others[name]:.4g}" if name in outcome.others else "" for name in others]
        remark = outcome.message or outcome.export or outcome.directory or ""
        remark += " (NOT verified)" if outcome.verified is False else ""
        rows.append((str(number), outcome.model, outcome.state, *scores, remark))
    columns = ("run", "model", "state", "trial", "unanswered", "refusals", "KL", *others, "export, or why not")
    print()
    print_table(columns, rows, "Summary", right=("run", "trial", "KL", *others))
