"""Finds run directories by the names of their files, and says which one a mistyped name may mean.

It reads no file and imports nothing heavy, because shell completion calls it at every press of the tab key.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from abliterate.errors import InputError, as_command
from abliterate.files import expanded
from abliterate.model.names import DEMO, is_path

# The files of which every run has one: its study, or with a database the study's name.
JOURNAL, STUDY = "study.journal", "study.name"
SETTINGS, RESULT = "settings.toml", "result.json"
# The folder of the runs without an --out.
RUNS = Path("runs")
# Runs that a sentence names, at most.
_NAMED = 3
# How alike two names are, from 0 to 1, if one is taken for the other mistyped, though it may be a Hub id: one letter of seven
# is another, or there is one more than three.
_ALIKE = 0.85


def holds_run(path: Path) -> bool:
    """Whether a run has left its study in a directory. Other files don't count, because anybody's may have their names."""
    return any(os.path.exists(path / name) for name in (JOURNAL, STUDY))  # False for a path that is too long


def is_run(target: str) -> bool:
    """Whether what may be a run or a model is a run directory; `demo` is always the demo, even beside a folder `demo`."""
    path = expanded(target)
    files = (path / SETTINGS, path / RESULT)
    return target != DEMO and not os.path.isfile(path / "config.json") and any(map(os.path.isfile, files))


def check_trial_of_run(target: str, trial: int | None) -> None:
    """InputError if a trial is named and `target` is no run."""
    if trial is not None and not is_run(target):
        raise InputError(f"The option --trial needs a run, but {target} is no run directory; name one, or omit --trial.")


def runs_in(folder: Path) -> list[Path]:
    """The run directories in a folder, the newest first; none if the folder can't be read."""
    try:
        found = [(entry.stat().st_mtime, folder / entry.name) for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return []
    return [path for _, path in sorted(found, reverse=True) if holds_run(path) or os.path.exists(path / RESULT)]


def no_run(path: Path, *, model: bool = False) -> InputError:
    """The error for a path that was given as a run and is none. It names the run that may be meant, else the newest runs.

    `model`: whether a model on the Hub may be meant as well, so that the sentence says how to name it.
    """
    missing = f"There is no run in {path}"
    if model:
        missing += " (for a model of that name on the Hub, start the command in another directory)"
    above = next((parent for parent in path.parents if parent.name and holds_run(parent)), None)
    if above is not None:
        return InputError(f"{missing}; did you mean {above}?")
    siblings = runs_in(path.parent)
    runs = siblings + [run for run in runs_in(RUNS) if run not in siblings]
    names = [run.name for run in runs]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return InputError(f"{missing}; did you mean {runs[names.index(near[0])]}?")
    if runs:
        newest = [str(run) for run in runs[:_NAMED]]
        listed = f"runs are {', '.join(newest)}" if len(newest) > 1 else f"run is {newest[0]}"
        return InputError(f"{missing}; the newest {listed}.")
    return InputError(f"{missing}; give the directory of a run, or make one with {as_command('run')} MODEL.")


def check_no_mistyped_run(name: str, *, model: bool = True) -> None:
    """InputError if `name` is nothing here and reads like the directory of a run.

    It does if it lies in a folder that holds runs, or is the name of a run in `runs/`. `model`: whether it may be a model, too.
    A Hub id then reads like a path, so outside `runs/` it is refused only if a run beside it has nearly the same name.
    """
    path = Path(name)
    if os.path.exists(expanded(name)):
        return
    if len(path.parts) == 1:
        if holds_run(RUNS / path):
            raise no_run(path, model=model)
    elif path.parent == RUNS:
        raise no_run(path)
    elif beside := runs_in(path.parent):
        if not model or is_path(name):
            raise no_run(path)
        if any(_mistyped(path.name, run.name) for run in beside):
            raise no_run(path, model=True)


def _mistyped(name: str, run: str) -> bool:
    """Whether `name` is nearly that of a run and has its numbers, since models of one family may differ in numbers only."""
    numbers = [re.findall(r"\d+", text) for text in (name, run)]
    return numbers[0] == numbers[1] and bool(difflib.get_close_matches(name, [run], cutoff=_ALIKE))
