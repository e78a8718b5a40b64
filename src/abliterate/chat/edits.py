"""Switch a chat's loaded model between base and edited: to any trial of a run, or to an exported adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result, damaged, no_complete_trial
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError, as_command
from abliterate.pipeline.workbench import Workbench
from abliterate.search.selection import parse_rule
from abliterate.settings.schema import Settings
from abliterate.types import Trial


class RunEdits:
    """The trials of a run as `Edits`; `result.json` is read anew each time, because the run may still be at work."""

    def __init__(self, directory: RunDirectory, bench: Workbench, trial: Trial) -> None:
        self._directory = directory
        self._bench = bench
        self._trial = self._checked(trial)

    @property
    def trial(self) -> int | None:
        return self._trial.number

    def base(self) -> AbstractContextManager[None]:
        return self._bench.base()

    def edited(self) -> AbstractContextManager[None]:
        return self._bench.edited(self._trial.params)

    def choose(self, number: int) -> Trial:
        self._trial = self._checked(self.result().trial(number, self._directory.path))
        return self._trial

    def result(self) -> Result:
        return Result.read(self._directory)

    def _checked(self, trial: Trial) -> Trial:
        """The trial, if its parameters are of this model, and are all there; else InputError."""
        if fault := self._bench.fault(trial.params):
            raise damaged(self._directory, f"trial {trial.number} {fault}")
        self._bench.refined.check(trial.params)
        return trial


class AdapterEdits:
    """An exported adapter as `Edits`, switched by PEFT."""

    def __init__(self, tuner: Any, trial: int | None) -> None:
        self._tuner = tuner
        self.trial = trial

    @contextmanager
    def base(self) -> Iterator[None]:
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    @contextmanager
    def edited(self) -> Iterator[None]:
        yield

    def choose(self, number: int) -> Trial:
        raise _one_trial()

    def result(self) -> Result:
        raise _one_trial()


def first_trial(result: Result, settings: Settings, path: Path) -> Trial:
    """The trial that the run selected; of a run that is still at work, the one that its selection rule would pick now."""
    if result.selected is not None:
        return result.trial(result.selected, path)
    complete = [trial for trial in result.trials if trial.state == "complete"]
    front = sorted((trial for trial in complete if trial.number in result.front), key=lambda trial: trial.kl)
    if not front:
        shown = as_command("trials", path)
        why = f"none of its trials beats the model itself; name one with --trial ({shown} shows them)"
        if not complete:
            why = no_complete_trial(result, path, settings.search.trials)
        raise InputError(f"The run in {path} has nothing to chat with, because {why}, or chat with its model.")
    rule = parse_rule(settings.search.select, settings.search.select_max_kl, result.objectives_or_default())
    return rule.preview(front) or front[0]


def _one_trial() -> InputError:
    return InputError("This is an export of one trial; start with abliterate chat RUN to go from trial to trial.")
