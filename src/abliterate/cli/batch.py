"""`abliterate run` of several models or of a list: one run after the other, whatever becomes of the ones before.

Owns the list's format, where each run lies, what counts as finished, and the summary. Each run is what `abliterate run`
of one model is, but that nobody is asked anything: the selection rule chooses.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory, default_path
from abliterate.cli.exit import explain, show_traceback
from abliterate.cli.run import RunFlags, carry_out, resolve
from abliterate.errors import DONE, INTERRUPTED, AbliterateError, InputError, Interrupted
from abliterate.files import read_toml, safe_name
from abliterate.model.devices import choose_device
from abliterate.model.hub import ask_again
from abliterate.model.memory import clear_device_cache
from abliterate.objectives import other_names
from abliterate.settings.schema import Settings
from abliterate.settings.sources import by_section, load_settings
from abliterate.terminal import json_lines
from abliterate.terminal.interrupts import Interrupts
from abliterate.terminal.reporters import make_reporter, show_error, show_heading
from abliterate.terminal.tables import print_table

# Settings that change neither what a run finds nor what it leaves.
_WITHOUT_EFFECT = ("out", "device", "cache_dir", "efficiency")


@dataclass(frozen=True)
class Planned:
    """One run of several: what the command line says, with the run's own `model` and `out`, and what the list says."""

    options: Mapping[str, Any]
    entry: Mapping[str, Any]

    @property
    def model(self) -> str:
        """As it was given."""
        return str(self.options["model"])


@dataclass(frozen=True)
class Outcome:
    """What became of one run. `state`: done, skipped (it was done before), failed, interrupted, not begun."""

    model: str
    state: str
    directory: str | None = None
    trial: int | None = None
    refusals: int | None = None
    refusals_before: int | None = None
    prompts: int | None = None
    kl: float | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    export: str | None = None
    verified: bool | None = None
    exit_code: int | None = None
    message: str = ""

    @staticmethod
    def of(model: str, state: str, directory: RunDirectory, result: Result) -> Outcome:
        """Of a run that has its result."""
        trial = next(trial for trial in result.trials if trial.number == result.selected)
        export, baseline = result.export, result.baseline
        assert baseline is not None
        return Outcome(
            model=model,
            state=state,
            directory=str(directory.path),
            trial=trial.number,
            refusals=trial.refusals,
            refusals_before=baseline.refusals,
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
        InputError: the list or the options mean nothing; no run has begun then. Interrupted, AbliterateError: at the end,
        where not every run is done.
    """
    planned = plan(models, listed, options, config)
    interrupts = Interrupts()
    outcomes: list[Outcome] = []
    with interrupts.listening():
        for number, one in enumerate(planned, start=1):
            outcomes.append(_run_one(one, (number, len(planned)), config, flags, interrupts))
            if outcomes[-1].state == "interrupted":
                break
            _free_memory(one, config)
    last = outcomes[-1]
    outcomes += [Outcome(one.model, "not begun") for one in planned[len(outcomes) :]]
    _show(outcomes, as_json=flags.as_json)
    done = sum(one.state in ("done", "skipped") for one in outcomes)
    if last.state == "interrupted":
        raise Interrupted(
            last.exit_code or INTERRUPTED,
            f"interrupted; {done} of {len(planned)} runs are done. Continue with the same command and --resume, which skips "
            "what is done and goes on with what was begun.",
        )
    if done < len(planned):
        raise AbliterateError(
            f"{len(planned) - done} of {len(planned)} runs failed, the summary says why; mend that and repeat the command with "
            "--resume, which skips those that are done."
        )


def plan(models: Sequence[str], listed: Path | None, options: Mapping[str, Any], config: str) -> list[Planned]:
    """The runs, each with a directory of its own; "" stands for the default one, which has the time in its name.

    Every run's settings are read now: a mistake in the last one should not be found after hours.

    Raises:
        InputError: for the first thing that is wrong.
    """
    if listed and (models or "model" in options):
        raise InputError(f"The models are those of {listed}; leave out the ones on the command line, or --list.")
    if "model" in options:
        raise InputError("Several models and --set model contradict each other; give one of them.")
    common, entries = read_list(listed) if listed else ({}, [{"model": model} for model in models])
    shared = load_settings(config, options, entry=common)
    base = shared.out or (f"runs/{safe_name(listed.stem)}" if listed else "")
    planned: list[Planned] = []
    for number, entry in enumerate(entries, start=1):
        where = f"Run {number} of {listed}" if listed else f"Model {number}"
        model, own = entry.get("model", shared.model), entry.get("out", "")
        if not (isinstance(model, str) and model and isinstance(own, str)):
            raise InputError(f"{where} needs a model, and an out that is a path if it has one; both are texts.")
        folder = own if own and not shared.out else _free_folder(base, own or model, model, planned, where) if base else ""
        planned.append(Planned({**options, "model": model, "out": folder}, by_section(common, entry)))
    _check(planned, config, listed)
    return planned


def read_list(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a list says of all its runs, and of each: settings as in a configuration file, the runs as `[[run]]` tables."""
    content = read_toml(path)
    entries = content.pop("run", None)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"The list {path} has no runs; each is a table that begins with a line [[run]] and names its model.")
    return content, entries


def _free_folder(base: str, name: str, model: str, planned: Sequence[Planned], where: str) -> str:
    """`base`/`name`, with a number where another model of the same name (of another owner) has that one."""
    taken = {_place(one): one for one in planned}
    folder = wanted = Path(base) / safe_name(name)
    number = 1
    while (other := taken.get(os.path.abspath(folder).casefold())) is not None:
        if other.model == model:
            raise InputError(
                f"{where} would lie in the same directory as another of {model}; give each of them an out of its own."
            )
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return str(folder)


def _place(one: Planned) -> str:
    # Casefolded: some file systems don't tell a from A.
    return os.path.abspath(one.options["out"]).casefold()


def _check(planned: Sequence[Planned], config: str, listed: Path | None) -> None:
    """InputError where a run's settings are wrong, or two runs would be in each other's way."""
    places: dict[str, int] = {}
    pushed: dict[str, int] = {}
    for number, one in enumerate(planned, start=1):
        try:
            settings = load_settings(config, one.options, entry=one.entry)
        except InputError as error:
            if listed is None:  # then it is the command line's, and true of all
                raise
            raise InputError(f"Run {number} of {listed} ({one.model}): {error}") from error
        # Without a directory of their own, runs of one model can't be told apart by --resume.
        place = _place(one) if one.options["out"] else f"model {one.model}"
        before = places.setdefault(place, number)
        if before != number:
            what = f"directory {one.options['out']}" if one.options["out"] else f"model {one.model}"
            raise InputError(f"Runs {before} and {number} have the same {what}; give each its own, or leave one out.")
        if settings.export.push and pushed.setdefault(settings.export.push, number) != number:
            raise InputError(
                f"Runs {pushed[settings.export.push]} and {number} would be pushed to one repository, {settings.export.push}; "
                "give each its own export.push in a --list."
            )


def _run_one(one: Planned, place: tuple[int, int], config: str, flags: RunFlags, interrupts: Interrupts) -> Outcome:
    """One run to its end, whatever that is."""
    directory: RunDirectory | None = None
    try:
        interrupts.check()
        ask_again()
        while not one.options["out"] and default_path(one.model).exists():
            time.sleep(0.1)  # until the next second gives another name
        settings, directory = resolve(one.options, config, flags, one.entry)
        _announce(one.model, place, directory, as_json=flags.as_json)
        if flags.resume and (found := _finished(settings, directory)):
            make_reporter(as_json=flags.as_json).note(f"done before, in {directory.path}", directory=str(directory.path))
            return Outcome.of(one.model, "skipped", directory, found)
        return Outcome.of(one.model, "done", directory, carry_out(settings, directory, flags, interrupts, ask=False))
    except (Interrupted, KeyboardInterrupt) as error:
        state, message = "interrupted", str(error) if directory is not None else "interrupted before it began"
        code = error.exit_code if isinstance(error, Interrupted) else INTERRUPTED
    except Exception as error:
        show_traceback()
        state, (message, code) = "failed", explain(error)
    where = str(directory.path) if directory is not None and directory.holds_run else None
    if state == "failed":
        show_error(f"run {place[0]} of {place[1]} ({one.model}): {message}")
        if flags.as_json:
            json_lines.emit("failed", model=one.model, directory=where, message=message, exit_code=code)
    return Outcome(one.model, state, where, exit_code=code, message=message)


def _finished(settings: Settings, directory: RunDirectory) -> Result | None:
    """The result of a run that has nothing left to do under these settings; None where there is something."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        result, stored = Result.read(directory), read_toml(directory.settings)
        wanted = settings.model_dump(mode="json")
        for name in _WITHOUT_EFFECT:
            wanted.pop(name), stored.pop(name, None)
        export, kind = result.export, settings.export.kind
        there = export.kind == kind and export.path and (directory.path / export.path).is_dir()
        left = kind != "none" and not there
        left = left or bool(settings.export.push and not export.pushed) or not directory.report.exists()
        if wanted == stored and len(result.trials) >= settings.search.trials and result.selected is not None and not left:
            return result
    return None


def _free_memory(one: Planned, config: str) -> None:
    """What the run held must be gone before the next model comes; its errors, which held it too, are."""
    with contextlib.suppress(InputError):
        clear_device_cache(choose_device(load_settings(config, one.options, entry=one.entry).device))


def _announce(model: str, place: tuple[int, int], directory: RunDirectory, *, as_json: bool) -> None:
    number, total = place
    if as_json:
        json_lines.emit("run", number=number, total=total, model=model, directory=str(directory.path))
    else:
        show_heading(f"run {number} of {total}: {model} → {directory.path}")


def _show(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """The summary."""
    if as_json:
        json_lines.emit("summary", runs=[asdict(one) for one in outcomes])
        return
    rows, others = [], other_names({name for one in outcomes for name in one.others})
    for number, one in enumerate(outcomes, start=1):
        scores = ["", "", ""]
        if one.kl is not None:
            scores = [str(one.trial), f"{one.refusals_before}/{one.prompts} → {one.refusals}/{one.prompts}", f"{one.kl:.4f}"]
        scores += [f"{one.others[name]:.4g}" if name in one.others else "" for name in others]
        left = one.message or one.export or one.directory or ""
        rows.append((str(number), one.model, one.state, *scores, left + (" (NOT verified)" if one.verified is False else "")))
    columns = ("run", "model", "state", "trial", "refusals", "KL", *others, "export, or why not")
    print()
    print_table(columns, rows, "Summary", right=("run", "trial", "KL", *others))
