"""How a chat's model goes from base to edited and back: a run's trials, or an exported adapter. Nothing is loaded again."""

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
    """The trials of a run on its loaded model; `result.json` is read anew each time, since the run may be going on."""

    def __init__(self, directory: RunDirectory, editor: Editor, components: frozenset[str], trial: Trial) -> None:
        self._directory = directory
        self._editor = editor
        self._components = components
        self._trial = trial

    @property
    def trial(self) -> int | None:
        """See `Edits`."""
        return self._trial.number

    def base(self) -> None:
        """See `Edits`."""
        self._editor.clear()

    def edited(self) -> None:
        """See `Edits`."""
        self._editor.apply(self._trial.params)

    def choose(self, number: int) -> Trial:
        """See `Edits`."""
        trial = complete_trial(self.result(), number, self._directory.path)
        self._trial = checked(trial, self._components, self._directory)
        return trial

    def result(self) -> Mapping[str, Any]:
        """See `Edits`."""
        return self._directory.read_result()


class AdapterEdits:
    """An exported adapter, switched by PEFT."""

    def __init__(self, tuner: Any, trial: int | None) -> None:
        self._tuner = tuner
        self.trial = trial

    def base(self) -> None:
        """See `Edits`."""
        self._tuner.disable_adapter_layers()

    def edited(self) -> None:
        """See `Edits`."""
        self._tuner.enable_adapter_layers()

    def choose(self, number: int) -> Trial:
        """See `Edits`."""
        raise _one_trial()

    def result(self) -> Mapping[str, Any]:
        """See `Edits`."""
        raise _one_trial()


def complete_trial(result: Mapping[str, Any], number: int, path: Path) -> Trial:
    """The complete trial of that number; InputError where it failed, was stopped, or isn't there."""
    record = next((one for one in result["trials"] if one["number"] == number), None)
    see = f"choose one that abliterate trials {path} shows as complete (in a chat: /trials)"
    if record is None:
        raise InputError(f"The run in {path} has no finished trial {number}; {see}.")
    if record["state"] == "stopped":
        raise InputError(f"Trial {number} was stopped because another one is no worse in any objective; {see}.")
    if record["state"] != "complete":
        raise InputError(f"Trial {number} failed ({str(record['reason']).rstrip('.')}); {see}.")
    return Trial.from_record(record)


def first_trial(result: Mapping[str, Any], settings: Settings, path: Path) -> Trial:
    """What the run picked; of one that is still at work, what its selection rule would pick now."""
    if result["selected"] is not None:
        return complete_trial(result, result["selected"], path)
    complete = [Trial.from_record(one) for one in result["trials"] if one["state"] == "complete"]
    front = sorted((trial for trial in complete if trial.number in result["front"]), key=lambda trial: trial.kl)
    if not front:
        why = "none of its trials beats the model itself" if complete else "no trial of it has finished yet"
        how = f"name one with --trial (abliterate trials {path} shows them)" if complete else "wait for one"
        raise InputError(f"The run in {path} has nothing to chat with, because {why}; {how}, or chat with its model.")
    chosen = parse_rule(settings.search.select, settings.search.select_max_kl, objectives_from_result(result)).preview(front)
    return chosen or front[0]


def checked(trial: Trial, components: frozenset[str], directory: RunDirectory) -> Trial:
    """The trial, if it says of every component what to do; else InputError."""
    if components - set(trial.params.kernels):
        raise damaged(directory, f"trial {trial.number} lacks a kernel")
    return trial


def _one_trial() -> InputError:
    return InputError("This is an export of one trial; start with abliterate chat RUN to go from trial to trial.")


def damaged(directory: RunDirectory, what: str) -> InputError:
    """The sentence for a `result.json` that doesn't hold what it must."""
    return InputError(f"The file {directory.result} is damaged ({what}); abliterate run --resume rebuilds it.")
