"""How an export is made again: the command lines and what they depend on, for the model card. Names no path of this machine."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from abliterate.model.loader import public_name
from abliterate.objectives import CLASSIFIER, OWN, is_own, public
from abliterate.prompts import public_source
from abliterate.settings import Settings

# Said by options of their own, or of this machine only.
_ELSEWHERE = {
    *("model", "seed", "device", "out", "cache_dir", "load.revision", "load.dtypes", "load.offload_folder"),
    *("efficiency.residual_cache_dir", "search.grace_seconds"),
    *("search.trials", "search.startup_trials", "search.storage", "search.select", "search.select_max_kl"),
    *("export.kind", "export.verify", "export.push", "export.push_private"),
}
# No part of what a trial is: what the chosen one is measured on and by at the end. Some are paths.
UNTRIED = {
    *("prompts.harmful_heldout", "prompts.harmless_heldout", "prompts.over_refusal"),
    *("evaluation.heldout_scorers", "evaluation.judge_model", "evaluation.judge_label"),
}
# Settings that may name a file: by its last part, and its content by a hash.
FILES = {
    "harmful prompts, direction": "prompts.harmful",
    "harmless prompts, direction": "prompts.harmless",
    "harmful prompts, scores": "prompts.harmful_eval",
    "harmless prompts, scores": "prompts.harmless_eval",
    "refusal markers": "evaluation.markers",
    "chat template": "load.chat_template",
}

_SECTION = """
## How to reproduce

{fence}console
{commands}
{fence}

With these files, versions, kind of device and batch sizes the search is the same, trial by trial; other batch sizes move the
last bits. Without a search, and with the hashes of files and the scores compared: `abliterate reproduce recipe.json`, with the
file beside this one.

| | |
|---|---|
{rows}
"""


def recipe(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> str:
    """The section "How to reproduce" for an export of `trial` of the run that `record` (`result.json`) is of."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in _facts(settings, record))
    shown = "\n".join(f"$ {line}" for line in commands(settings, record, kind, trial))
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return _SECTION.format(commands=shown, rows=rows, fence="`" * max(3, longest + 1))


def code(text: str) -> str:
    """Any text as code within a table of Markdown: in one line, and nothing of it means anything."""
    text = visible(" ".join(text.split())).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}" if longest else f"`{text}`"


def plain(text: str) -> str:
    """Any text within a line of Markdown, where it is shown as it is."""
    return re.sub(r"([\\`*\[\]<>|&#~])", r"\\\1", visible(" ".join(text.split())))


def visible(text: str) -> str:
    """Text with control characters, and all else that can't be seen, as they are written in Python."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def commands(settings: Settings, record: Mapping[str, Any], kind: str, trial: int) -> list[str]:
    """The command lines: a run, and the export of one of its trials, which need not be on its front."""
    model, revision = record["model"], record["model"]["revision"]
    search = settings.search
    name = public_name(settings.model)
    name = f"./{name}" if name.startswith("-") else name
    run = ["abliterate", "run", name, "--seed", str(settings.seed), "-n", str(search.trials)]
    # As the study began: 30 % of the trials it was given then.
    run += ["--startup-trials", str(record.get("startup_trials") or search.n_startup_trials), "--dtype", model["dtype"]]
    if revision:
        run += ["--set", f"load.revision={_toml(revision)}"]
    for name, value in (*changed_settings(settings), *_judge(settings)):
        shown = public_source(value) if name in FILES.values() else value
        shown = [public(one) for one in value] if name in OWN else shown
        run += ["--set", f"{name}={_toml(shown)}"]
    export = ["abliterate", "export", "run", "--trial", str(trial), "--kind", kind]
    return [" ".join(map(_quoted, line)) for line in ([*run, "--export", "none", "-o", "run"], export)]


def changed_settings(settings: Settings) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting that isn't the default, but for those that the command names itself."""
    defaults = dict(_flat(Settings.model_construct()))
    for name, value in _flat(settings):
        if name not in _ELSEWHERE | UNTRIED and value != defaults[name]:
            yield name, value


def _judge(settings: Settings) -> Iterator[tuple[str, str]]:
    """The judge's settings where trials are scored by it; of a directory its name."""
    if CLASSIFIER in settings.scorers:
        yield "evaluation.judge_model", public_source(settings.evaluation.judge_model)
        if settings.evaluation.judge_label:
            yield "evaluation.judge_label", settings.evaluation.judge_label


def _quoted(text: str) -> str:
    """An argument as a shell reads it; control characters as `$'…'` has them."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _escaped(escaped) + "'"


def _escaped(text: str) -> str:
    """What can't be printed as TOML's strings and shells take it."""
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in text)


def _flat(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section:
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _facts(settings: Settings, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model, environment = record["model"], record["environment"]
    revision = f", revision {code(model['revision'])}" if model["revision"] else ""
    yield "base", f"{plain(model['id'])}{revision}, fingerprint `{model['fingerprint']}`"
    # A run of an earlier version didn't record its prompts.
    sets = record.get("prompts", {})
    for what, name in FILES.items():
        section, option = name.split(".")
        if section == "prompts":
            found = sets.get(option)
            yield what, f"{code(found['source'])}, {found['count']}, sha256 `{found['digest']}`" if found else "not recorded"
        elif path := getattr(getattr(settings, section), option):
            yield what, f"{code(public_source(path))}, sha256 `{file_digest(path)}`"
    for name in filter(is_own, settings.scorers):
        yield "scorer", f"{code(public(name))}, sha256 `{file_digest(name.rpartition(':')[0])}`"
    if sizes := record.get("batch_sizes"):
        yield "batch sizes", ", ".join(f"{name} {size}" for name, size in sizes.items())
    versions = environment["versions"]
    yield "versions", ", ".join(f"{name} {versions[name]}" for name in ("abliterate", "torch", "transformers", "optuna"))
    yield "device", f"{environment['device']}, {model['dtype']}, quantization {model['quantization']}"


def file_digest(path: str) -> str:
    """sha256 of a file that settings name."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:  # moved since the run; the run's identity holds its content
        return "not at hand"


def _toml(value: Any) -> str:
    """A value as `--set` reads it: TOML on one line, whose strings are JSON's."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(entry) for entry in value) + "]"
    # Not escaped beyond ASCII: JSON's pairs of surrogates are no TOML.
    return _escaped(json.dumps(value, ensure_ascii=False))
