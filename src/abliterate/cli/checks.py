"""Tells bad input before torch is imported, which takes seconds: paths, trial numbers, names, tokens, database drivers.

The commands repeat most of these checks where they use the input, because the library has no command line. Checks that need
the model, a device or a plugin are left to them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import LOCK, RunDirectory
from abliterate.artifacts.runs import check_no_mistyped_run, check_trial_of_run, holds_run, is_run, no_run
from abliterate.errors import InputError
from abliterate.files import check_new_file, expanded
from abliterate.model.names import check_model_name
from abliterate.objectives import is_custom, split
from abliterate.plugins import GROUP
from abliterate.search.selection import parse_rule
from abliterate.settings.schema import ExportSettings, Settings
from abliterate.settings.sources import load_settings, options_of

# {setting: (its noun in sentences, the built-in names)}; the registries, which hold the same names, import torch.
BUILT_IN = {
    "directions.method": (
        "direction method",
        ("projected", "biprojected", "mean", "median", "geometric-median", "kmeans", "svd", "som"),
    ),
    "edit.mode": (
        "edit mode",
        ("auto", "full", "columns", "pre", "none", "least-squares", "key-conditional", "arbitrary-rank"),
    ),
    "export.kind": ("export kind", ("merged", "adapter", "none")),
}
UNREFINED = ("arbitrary-rank",)  # edit modes whose front can't be refined
SCORERS = ("refusals", "unanswered", "kl", "unfinished_thinking", "classifier", "endpoint", "strongreject")
_SETS = ("harmful", "harmless", "harmful_eval", "harmless_eval")
_HELDOUT = ("harmful_heldout", "harmless_heldout", "over_refusal")


def check_settings(settings: Settings, command: str, *, heldout: bool = False) -> None:
    """InputError for the first path or name in the settings that can't be meant; `command` is the one that the remedy shows.

    `heldout`: whether the command reads the held-out prompts.
    """
    check_no_mistyped_run(settings.model)
    check_model_name(settings.model, command)
    _check_files(settings, _SETS + (_HELDOUT if heldout else ()))
    if not entry_points(group=GROUP):  # a plugin may have any name
        _check_names(settings)


def check_live(*, live: bool, no_open: bool) -> None:
    """InputError for an option that has no effect without --live."""
    if no_open and not live:
        raise InputError("The option --no-open belongs to --live, which opens a browser; leave it out, or add --live.")


def check_given(command: str, given: Mapping[str, Any], config: str, assignments: Sequence[str]) -> None:
    """`check_settings` for a command that takes the settings of a run and makes none."""
    check_settings(load_settings(config, options_of(given, list(assignments))), command)


def check_run(settings: Settings, directory: RunDirectory, *, resume: bool, restart: bool) -> None:
    """InputError for bad input of `abliterate run`."""
    check_settings(settings, "run", heldout=settings.evaluation.heldout)
    # A run that has begun so, and its recipe, stay as they are.
    if not resume and settings.directions.protect and settings.directions.method == "biprojected":
        raise InputError(
            "The method biprojected takes the harmless mean of each edited layer off the directions after they were made "
            "orthogonal to capabilities, which undoes that; leave directions.protect out, or choose another "
            "--set directions.method."
        )
    _check_selection(settings, directory if resume else None)
    if settings.export.push:
        from abliterate.model.hub import check_push

        check_push(settings.export)
    if settings.search.seed_from and not (resume and directory.holds_run):
        from abliterate.pipeline.seeds import seed_trials

        seed_trials(settings.search)
    if settings.search.sampler != "tpe" or settings.search.startup != "random":
        from abliterate.search.samplers import check_packages

        check_packages(settings.search)
    if settings.search.storage:
        from abliterate.search.storage import check_driver

        check_driver(settings.search.storage)
    if not os.path.exists(directory.path / LOCK):  # else a run may be at work there, which is what a person should be told
        directory.check(resume=resume, restart=restart)


def check_run_directory(path: Path | None) -> None:
    """InputError if a directory was given that holds no run, neither its study nor its result."""
    if path is not None and not (holds_run(path) or os.path.isfile(RunDirectory(path).result)):
        raise no_run(path)


def check_export(path: Path, trial: int, kind: str, push: str) -> None:
    """InputError for bad input of `abliterate export`."""
    Result.read(RunDirectory(path)).trial(trial, path)
    if not entry_points(group=GROUP):
        _check_name("export.kind", kind)
    if push and kind != "none":
        from abliterate.model.hub import check_push

        check_push(ExportSettings(kind=kind, push=push))


def checked_gguf(gguf: Path | None, kind: str, push: str, out: Path | None, *, verify: bool) -> Path:
    """The GGUF file to edit; InputError where options of `abliterate export` don't go together with it or name no file."""
    if gguf is None:
        raise InputError("A --gguf-type is only used with --gguf FILE, the GGUF file to edit; name one, or leave it out.")
    if kind != "merged":
        raise InputError(f"An export is either --kind {kind} or made from --gguf; leave one of them out.")
    if verify:
        raise InputError("A GGUF file is checked by the definition of its edits, not on prompts; leave --verify out.")
    if push:
        raise InputError(f"A GGUF file isn't uploaded by --push; leave it out, and run hf upload {push} FILE afterwards.")
    if not gguf.is_file():
        raise InputError(f"There is no file {gguf}; name a GGUF file of the run's model with --gguf.")
    if out is not None:
        check_new_file(out)
    return gguf


def check_recipe(path: Path) -> None:
    """InputError if `abliterate reproduce` is given a path that doesn't exist."""
    if not os.path.exists(path):
        check_no_mistyped_run(str(path), model=False)
        raise InputError(f"There is no recipe {path}; give the recipe.json of a run or an export.")


def check_chat(target: str, trial: int | None) -> None:
    """InputError for bad input of `abliterate chat`."""
    if not is_run(target):
        check_no_mistyped_run(target)
        check_model_name(target, "chat")
        check_trial_of_run(target, trial)
    elif trial is not None and (directory := RunDirectory(expanded(target))).result.is_file():
        Result.read(directory).trial(trial, directory.path)


def check_evaluate(candidate: str, given: Mapping[str, Any], config: str, assignments: Sequence[str]) -> None:
    """InputError for bad input of `abliterate evaluate`; the base is the model of the settings."""
    settings = load_settings(config, options_of(given, list(assignments)))
    check_settings(settings, "evaluate", heldout=True)
    path = expanded(candidate)
    head, _, tail = candidate.rpartition(":")
    if head and tail.isdecimal() and not os.path.exists(path):
        run = expanded(head)
        check_run_directory(run)
        Result.read(RunDirectory(run)).trial(int(tail), run)
    elif not os.path.exists(path):
        check_no_mistyped_run(candidate)
        check_model_name(candidate, "evaluate")


def _check_files(settings: Settings, sets: Sequence[str]) -> None:
    """InputError for a file that the settings name and that isn't there."""
    from abliterate.prompts.capabilities import capability_sources
    from abliterate.prompts.files import parse_source

    for name in sets:
        if source := getattr(settings.prompts, name):
            parse_source(source)
    capability_sources(settings)
    files = {"marker file": settings.evaluation.markers, "chat template": settings.load.chat_template}
    for what, file in files.items():
        if file and not os.path.isfile(expanded(file)):
            raise InputError(f"There is no {what} {file}; check the path.")


def _check_names(settings: Settings) -> None:
    """InputError for a name that is no built-in's, where no plugin is installed that could have it."""
    _check_name("directions.method", settings.directions.method)
    _check_name("edit.mode", settings.edit.mode)
    _check_name("export.kind", settings.export.kind)
    for name in (*settings.scorers, *settings.evaluation.heldout_scorers):
        # A name with a colon may be a scorer and a misspelled goal, about which the maker of scorers has a sentence.
        if name not in SCORERS and not is_custom(name) and ":" not in name:
            raise InputError(
                f"There is no scorer {name!r}; choose among {', '.join(SCORERS)}, or give path/to/file.py:ClassName."
            )


def _check_name(setting: str, name: str) -> None:
    what, names = BUILT_IN[setting]
    if name not in names:
        raise InputError(f"There is no {what} {name!r}; choose one of {', '.join(names)}.")


def _check_selection(settings: Settings, continued: RunDirectory | None) -> None:
    """InputError for a rule that can't be read, or that names a trial which the run can't come to have.

    A run that is `continued` has trials already, and repeats those that an interruption lost under new numbers.
    """
    search, refine = settings.search, settings.refine
    if not any(split(text)[0] not in SCORERS for text in search.objectives):
        parse_rule(search.select, search.select_max_kl)
    match = re.fullmatch(r"trial:(\d+)", search.select.replace(" ", "").lower())
    if match is None:
        return
    refines = refine.enabled and settings.edit.mode not in UNREFINED
    made = search.trials + (refine.n_descents if refines else 0)
    if continued is not None and continued.result.is_file():
        made += 1 + max((trial.number for trial in Result.continued(continued).trials), default=-1)
    if int(match[1]) >= made:
        last = f"0 to {made - 1}" if made else "none"
        refined = f" and {refine.n_descents} descents" if refines else ""
        raise InputError(
            f"The selection {search.select!r} names a trial that this run can't have, because {search.trials} trials{refined} "
            f"have the numbers {last}; name one of these, or give more trials with -n."
        )
