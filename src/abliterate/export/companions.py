"""Copy the files that belong beside weights, byte for byte: tokenizer, templates, processor, generation config, code, licences.

No class reads them, so none writes them in its own version's form, needs a package that isn't here, or runs a model's code.
Only a chat template that the settings name replaces the base's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError, first_line
from abliterate.export.base_weights import config_file, fetched, listed_files
from abliterate.export.card import is_visible
from abliterate.export.folder import MARKER
from abliterate.export.job import ExportJob
from abliterate.files import expanded

# Weights of every format, whole or in parts (`model.onnx_data`, `a.gguf.part1of2`). Those of other formats aren't edited, so
# beside edited weights they would be another model.
_FORMATS = (
    "safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|npz|pb|tflite|mlmodel|pte|ot|pdparams|nemo|pkl|distcp|engine|llamafile"
    "|rkllm|litertlm"
)
_WEIGHTS = re.compile(rf"\.({_FORMATS})(?![a-z])|\.data-\d+-of-\d+$", re.IGNORECASE)
_WEIGHT_FOLDERS = (".mlpackage", ".mlmodelc")
# Texts whose names look like those of weights: `vocab.pt-br.json`. An index names the parts of weights.
_TEXTS, _INDEX = (".json", ".jsonl", ".txt", ".csv", ".md", ".py", ".jinja", ".yaml", ".yml", ".toml", ".model"), ".index.json"
_CARD = re.compile(r"readme([._-].*)?", re.IGNORECASE)
# Files at the top that the exporters write, or that this tool's earlier export has left.
_OWN = {"config.json", "adapter_config.json", MARKER, "recipe.json"}
# The file at the top that loading the model parses so strictly that another content would end the run before its export.
_PARSED = "tokenizer.json"
# Other usual files at the top, which nobody uses as the names of private files.
_USUAL = {
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "LICENSE"),
    *("processor_config.json", "preprocessor_config.json"),
}
# Files that a chat template may stand in, beside chat_template.jinja, which transformers prefers to them all.
_WITH_TEMPLATE = ("tokenizer_config.json", "processor_config.json", "chat_template.json")
_TEMPLATE = "chat_template.jinja"


def save_companions(job: ExportJob, folder: Path) -> None:
    """Write everything except weights and config into `folder`, and the model card."""
    for name, content in companions_of(job).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            _copy(content, path)
    (folder / "README.md").write_text(job.card, encoding="utf-8")


def changed_companions(job: ExportJob, folder: Path) -> list[str]:
    """The companions that an export lacks or has with another content, compared by hash."""
    return [name for name, content in companions_of(job).items() if _digest(folder / name) != _digest(content)]


def companions_of(job: ExportJob) -> dict[str, Path | bytes]:
    """{name: the base's file, or the content if the settings changed it}; a name has the folders it lies in, with slashes."""
    files: dict[str, Path | bytes] = dict(_base_files(job))
    if job.load.chat_template:
        template = _read_template(job.load.chat_template)
        for name in _WITH_TEMPLATE:
            path = files.get(name)
            if isinstance(path, Path) and (content := _with_template(path, template)) is not None:
                files[name] = content
        files[_TEMPLATE] = template.encode()
    return files


def is_companion(name: str) -> bool:
    """Whether a file of a model, named with its folders, is copied.

    Weights, model cards and what a repository keeps for itself aren't: hidden files, and compiled code.
    """
    path = PurePosixPath(name)
    if name in _OWN or _CARD.fullmatch(path.name) or path.is_absolute() or not is_visible(name):
        return False
    if any(part.startswith(".") or part == "__pycache__" or part.endswith(_WEIGHT_FOLDERS) for part in path.parts):
        return False
    if path.name.endswith(_INDEX):
        return False
    return path.name.endswith(_TEXTS) or not _WEIGHTS.search(path.name)


def _base_files(job: ExportJob) -> dict[str, Path]:
    source = Path(job.source)
    if source.is_dir():
        return {name: source / name for name in sorted(_names_below(source)) if is_companion(name)}
    found = {name: fetched(job.source, job.load, name) for name in sorted(_listed(job)) if is_companion(name)}
    return {name: path for name, path in found.items() if path is not None}


def _listed(job: ExportJob) -> Iterable[str]:
    """The files of a Hub model; without the network, those that an earlier download has left here."""
    names = listed_files(job.source, job.load)
    if names is not None:
        return names
    return _names_below(config_file(job.source, job.load).parent)


def _names_below(folder: Path) -> Iterator[str]:
    """The names of all files of a directory and its folders, except those of runs and exports that were put there."""
    for place, folders, files in os.walk(folder):  # links to folders, which may lead anywhere, aren't followed
        here = Path(place)
        folders[:] = [name for name in folders if not name.startswith(".") and not _is_ours(here / name)]
        for name in files:
            if (here / name).is_file() and _may_be_read(here / name, folder):
                yield (here / name).relative_to(folder).as_posix()


def _may_be_read(path: Path, folder: Path) -> bool:
    """Whether a file of a model may get into an export: a link in a stranger's directory may lead to any private file.

    Links within the directory and into the Hub's cache are followed. So are, at the top, the link of the file that is parsed at
    load, and links of usual files to a file of the same name or into the cache of a Hub model, as in a directory of links.
    """
    if not path.is_symlink():
        return True
    target, top = path.resolve(), folder.resolve()
    blobs = top.parent.parent / "blobs" if top.parent.name == "snapshots" else top
    if target.is_relative_to(top) or target.is_relative_to(blobs):
        return True
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    usual = path.name in _USUAL and (target.name == path.name or in_cache)
    return path.parent == folder and (usual or path.name == _PARSED)


def _is_ours(folder: Path) -> bool:
    return (folder / MARKER).exists() or RunDirectory(folder).holds_run


def _read_template(name: str) -> str:
    try:
        return expanded(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The chat template {name} can't be read any more ({first_line(error)}); put it back.") from error


def _with_template(path: Path, template: str) -> bytes | None:
    """The JSON file with another chat template; None if it has no template."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(record, dict) or "chat_template" not in record:
        return None
    record["chat_template"] = _instead(record["chat_template"], template)
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def _instead(old: Any, template: str) -> Any:
    """The template, or the list of named templates with this one as the default."""
    if not isinstance(old, list):
        return template
    others = [entry for entry in old if not (isinstance(entry, Mapping) and entry.get("name") == "default")]
    return [{"name": "default", "template": template}, *others]


def _copy(source: Path, target: Path) -> None:
    try:
        file = source.open("rb")
    except OSError as error:
        raise InputError(
            f"The model's file {source} can't be read ({error.strerror}); make it readable, or remove it."
        ) from error
    with file, target.open("wb") as copy:
        shutil.copyfileobj(file, copy)


def _digest(content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    try:
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
