"""Switch a chat's loaded model between base and edited: to any trial of a run, or to an exported adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.model.editor import Editor
from abliterate.objectives import objectives_from_result
from abliterate.search.selection import parse_rule
from abliterate.settings.schema import Settings
from abliterate.types import Trial


class RunEdits:
    """The trials of a run as `Edits`; `result.json` is read anew each time, because the run may still be at work."""

    def __init__(self, directory: RunDirectory, editor: Editor, components: frozenset[str], trial: Trial) -> None:
        self._directory = directory
        self._editor = editor
        self._components = components
        self._trial = trial

    @property
    def trial(self) -> int | None:
        return self._trial.number

    def base(self) -> None:
        self._editor.clear()

    def edited(self) -> None:
        self._editor.apply(self._trial.params)

    def choose(self, number: int) -> Trial:
        trial = complete_trial(self.result(), number, self._directory.path)
        self._trial = checked(trial, self._components, self._directory)
        return trial

    def result(self) -> Mapping[str, Any]:
        return self._directory.read_result()


class AdapterEdits:
    """An exported adapter as `Edits`, switched by PEFT."""

    def __init__(self, tuner: Any, trial: int | None) -> None:
        self._tuner = tuner
        self.trial = trial

    def base(self) -> None:
        self._tuner.disable_adapter_layers()

    def edited(self) -> None:
        self._tuner.enable_adapter_layers()

    def choose(self, number: int) -> Trial:
        raise _one_trial()

    def result(self) -> Mapping[str, Any]:
        raise _one_trial()


def complete_trial(result: Mapping[str, Any], number: int, path: Path) -> Trial:
    """The complete trial of that number; InputError if it failed, was pruned, or doesn't exist."""
    record = next((record for record in result["trials"] if record["number"] == number), None)
    remedy = f"choose a trial that abliterate trials {path} shows as complete (in a chat: /trials)"
    if record is None:
        raise InputError(f"The run in {path} has no finished trial {number}; {remedy}.")
    if record["state"] == "stopped":
        raise InputError(f"Trial {number} was stopped because another trial is no worse in any objective; {remedy}.")
    if record["state"] != "complete":
        raise InputError(f"Trial {number} failed ({str(record['reason']).rstrip('.')}); {remedy}.")
    return Trial.from_record(record)


def first_trial(result: Mapping[str, Any], settings: Settings, path: Path) -> Trial:
    """The trial that the run picked, or for a run at work the trial that its selection rule would pick now."""
    if result["selected"] is not None:
        return complete_trial(result, result["selected"], path)
    complete = [Trial.from_record(record) for record in result["trials"] if record["state"] == "complete"]
    front = sorted((trial for trial in complete if trial.number in result["front"]), key=lambda trial: trial.kl)
    if not front:
        cause = "none of its trials beats the model itself" if complete else "none of its trials has finished yet"
        remedy = f"name a trial with --trial (abliterate trials {path} shows them)" if complete else "wait for a trial"
        raise InputError(f"The run in {path} has nothing to chat with, because {cause}; {remedy}, or chat with its model.")
    chosen = parse_rule(settings.search.select, settings.search.select_max_kl, objectives_from_result(result)).preview(front)
    return chosen or front[0]


def checked(trial: Trial, components: frozenset[str], directory: RunDirectory) -> Trial:
    """The trial, if it has a kernel for every component; else InputError."""
    if components - set(trial.params.kernels):
        raise damaged(directory, f"trial {trial.number} lacks a kernel")
    return trial


def _one_trial() -> InputError:
    return InputError("This is an export of one trial; start with abliterate chat RUN to switch between trials.")


def damaged(directory: RunDirectory, what: str) -> InputError:
    """The error for a `result.json` with missing or wrong content."""
    return InputError(f"The file {directory.result} is damaged ({what}); abliterate run --resume rebuilds it.")
