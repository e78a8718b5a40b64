"""Open a chat `Session` on a run with its trials, an exported adapter, or any model that generates.

Only the model is loaded: a chat needs neither prompts nor calibration, and edits are prepared when they are first used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result, damaged
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.artifacts.runs import check_trial_of_run, is_run
from abliterate.chat.edits import AdapterEdits, RunEdits, first_trial
from abliterate.chat.generate import Generator, Sampling
from abliterate.chat.session import Edits, Session
from abliterate.engine.responses import ResponseReader
from abliterate.errors import InputError
from abliterate.export.folder import MARKER
from abliterate.files import expanded
from abliterate.model import loader
from abliterate.model.devices import choose_device
from abliterate.model.loader import DEMO
from abliterate.model.model_files import ADAPTER, CONFIG, is_adapter, read_json
from abliterate.model.offload import home_of
from abliterate.model.peft import check_adapter, with_adapter
from abliterate.objectives import other_scores
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context
from abliterate.pipeline.export import pinned
from abliterate.pipeline.from_settings import chat_of, markup_of
from abliterate.pipeline.workbench import Workbench, open_workbench, probe_inputs
from abliterate.report.tables import counts_text
from abliterate.settings.schema import Settings
from abliterate.settings.sources import by_section, load_settings
from abliterate.settings.untrusted import code_note, unsaid, with_places_of, without
from abliterate.types import Reporter, Trial, kl_text

# The settings that a chat uses; all others would have no effect, or belong to a run's trials.
_USED = ("cache_dir", "device", "load", "prompts.system", "response.thinking_blocks", "response.answer_tags")


@dataclass(frozen=True)
class ChatTarget:
    """The options that are no settings. `trial` None: the trial that the run picked; `response_prefix` begins every answer."""

    trial: int | None = None
    response_prefix: str = ""
    sampling: Sampling = field(default_factory=Sampling)


def open_session(
    target: str, wanted: ChatTarget, given: Mapping[str, Any], reporter: Reporter
) -> tuple[Session, dict[str, str]]:
    """The session, and the fields of a header that describes it. `given`: settings from the command line.

    Raises:
        InputError: `target` is no run or model, or has no such trial. AbliterateError: the model can't be loaded.
    """
    path = expanded(target)
    _check_given(given)
    if is_run(target):
        return _open_run(RunDirectory(path), wanted, given, reporter)
    check_trial_of_run(target, wanted.trial)
    if target != DEMO and is_adapter(path):
        return _open_adapter(path, wanted, given, reporter)
    if target != DEMO and path.is_dir() and not any((path / name).is_file() for name in (CONFIG, ADAPTER)):
        raise InputError(
            f"The directory {target} holds neither a run (result.json) nor a model (config.json); name another directory."
        )
    return _open_model(load_settings("", {**given, "model": target}), wanted, reporter)


def _check_given(given: Mapping[str, Any]) -> None:
    """Raise InputError for settings that a chat doesn't use."""
    names = [
        name
        for section, value in given.items()
        for name in ([f"{section}.{leaf}" for leaf in value] if isinstance(value, Mapping) and section != "load" else [section])
    ]
    unused = [name for name in names if name not in _USED]
    if unused:
        raise InputError(
            f"A chat doesn't use {', '.join(unused)}; it takes {', '.join(_USED)}, and has the options --trial, "
            "--max-new-tokens, --response-prefix, --temperature and --seed."
        )


def _open_run(
    directory: RunDirectory, wanted: ChatTarget, given: Mapping[str, Any], reporter: Reporter
) -> tuple[Session, dict[str, str]]:
    settings = _run_settings(directory, given, reporter)
    if not directory.result.exists() and directory.holds_run:
        raise InputError(
            f"The run in {directory.path} has nothing to chat with, because none of its trials has finished yet; wait for a "
            "trial, or chat with its model."
        )
    result, path = Result.read(directory), directory.path
    if result.doubt:
        reporter.warn(result.doubt)
    trial = first_trial(result, settings, path) if wanted.trial is None else result.trial(wanted.trial, path)
    if result.model is None or result.baseline is None:
        raise damaged(directory, "it lacks the model or the baseline")
    directions, refined = stages.read_directions(directory.directions, result), RefinedStore(directory.refined)
    refined.check(trial.params)  # before a model is loaded
    load = pinned(settings.load, loader.resolve_source(settings.model), result.model.revision)
    bench = open_workbench(Context.of(settings.model_copy(update={"load": load}), reporter))
    info = bench.loaded.info
    if info.fingerprint != result.model.fingerprint:
        raise InputError(
            f"The model in {settings.model} isn't what it was when the run was made, so the run's trials don't fit it; restore "
            "the model, or make a new run."
        )
    bench.refined = refined
    bench.make_edits(directions, now=False)
    return session_on(bench, directory, trial, wanted)


def session_on(bench: Workbench, directory: RunDirectory, trial: Trial, wanted: ChatTarget) -> tuple[Session, dict[str, str]]:
    """A session with a trial of the run in `directory`, whose model and edits `bench` has, and the fields of a header."""
    baseline = Result.read(directory).baseline
    if baseline is None:
        raise damaged(directory, "it lacks the baseline")
    info = bench.loaded.info
    others = "".join(f", {text}" for text in other_scores(trial, baseline.values))
    fields = {
        "model": f"{info.id} ({info.family}, {info.dtype}, {info.device})",
        "trial": f"{trial.number}: {counts_text(trial, baseline)}, KL {kl_text(trial.kl)}{others}",
    }
    edits, path = RunEdits(directory, bench, trial), str(directory.path)
    return _session(bench.settings, wanted, bench.loaded.model, bench.loaded.tokenizer, edits, path, fields)


def _open_model(settings: Settings, wanted: ChatTarget, reporter: Reporter) -> tuple[Session, dict[str, str]]:
    """Any model that generates, whether or not it can be edited."""
    source = loader.resolve_source(settings.model)
    model, tokenizer, fields = _load(settings, source, reporter)
    return _session(settings, wanted, model, tokenizer, None, None, fields | _export_field(Path(source)))


def _open_adapter(
    path: Path, wanted: ChatTarget, given: Mapping[str, Any], reporter: Reporter
) -> tuple[Session, dict[str, str]]:
    """A base model with the adapter in `path`, which belongs to the run whose directory it lies in, if any."""
    check_adapter(path)
    # The run's settings say where the base is; the adapter has only the base's name.
    run, stored = RunDirectory(path.resolve().parent), read_json(str(path), ADAPTER)
    if is_run(str(run.path)):
        settings = _run_settings(run, given, reporter)
    else:
        base = stored.get("base_model_name_or_path")
        if not isinstance(base, str):
            raise InputError(f"The adapter in {path} can't be used, because its {ADAPTER} names no base; export it again.")
        settings = load_settings("", {**given, "model": base})
    # The commit that the adapter was made on, since the Hub's `main` may have moved.
    source, revision = loader.resolve_source(settings.model), stored.get("revision")
    if isinstance(revision, str) and not settings.load.revision:
        settings = settings.model_copy(update={"load": pinned(settings.load, source, revision)})
    model, _, fields = _load(settings, source, reporter)
    tokenizer = loader.load_tokenizer(str(path), settings.load.model_copy(update={"revision": ""}))
    tuned = with_adapter(model, path)
    edits = AdapterEdits(tuned.base_model, _trial_in(path))
    return _session(settings, wanted, tuned.get_base_model(), tokenizer, edits, None, fields | _export_field(path))


def _load(settings: Settings, source: str, reporter: Reporter) -> tuple[Any, PreTrainedTokenizerBase, dict[str, str]]:
    reporter.stage("load", loader.public_name(settings.model))
    device = choose_device(settings.device)
    _, tokenizer, model, dtype = loader.open_model(source, settings.load, device, probe_inputs(settings), reporter.warn)
    name = f"{loader.public_name(settings.model)} ({str(dtype).removeprefix('torch.')}, {device})"
    return model, tokenizer, {"model": name}


def _session(
    settings: Settings,
    wanted: ChatTarget,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    edits: Edits | None,
    run: str | None,
    fields: dict[str, str],
) -> tuple[Session, dict[str, str]]:
    embeddings = model.get_input_embeddings()
    device = home_of(embeddings, embeddings.weight)
    chat = chat_of(settings, tokenizer, device, wanted.response_prefix)
    voice = Generator(model, chat, ResponseReader(tokenizer, markup_of(settings, tokenizer)), wanted.sampling)
    system = settings.prompts.system
    shown = {**fields, "system prompt": system or "none"}
    if note := voice.form_note(system):
        shown["template"] = note
    name = loader.public_name(settings.model)
    return Session(voice, edits, system, name, Path(run).resolve().name if run else None), shown


def _run_settings(directory: RunDirectory, given: Mapping[str, Any], reporter: Reporter) -> Settings:
    """The run's own settings, whatever the environment says, with the settings that are given for this chat."""
    stored = directory.stored_settings()
    own = {name: value for name, value in stored.items() if name not in ("cache_dir", "device", "efficiency", "out")}
    mine = load_settings("", given)
    left_out = unsaid(own, mine, directory.path)
    settings = load_settings(str(directory.settings), by_section(without(own, left_out), given))
    settings = with_places_of(mine, settings)
    if note := code_note(left_out):
        reporter.warn(note)
    return settings


def _trial_in(path: Path) -> int | None:
    """The trial of an export, if abliterate made the export and its record names the trial."""
    try:
        trial = json.loads((path / MARKER).read_text(encoding="utf-8")).get("trial")
    except (OSError, ValueError, AttributeError):
        return None
    return trial if isinstance(trial, int) else None


def _export_field(path: Path) -> dict[str, str]:
    trial = _trial_in(path)
    if not (path / MARKER).is_file():
        return {}
    return {"export": "of abliterate" + (f", trial {trial}" if trial is not None else "")}
