"""Read prompt sets from text files and JSON-lines files, and parse data set names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import InputError
from abliterate.types import Prompt

_DATASET = re.compile(
    r"^(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?"
    r":(?P<split>[^:\[\]]+(?:\[[^\[\]]*\])?):(?P<column>[^:]+)$"
)
_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A column of a Hub data set, written `name:split:column`; the split may carry a slice, as in `train[:400]`.

    `config` selects one configuration of a data set, as in `name@config:split:column`.
    """

    name: str
    split: str
    column: str
    config: str | None = None


def parse_source(source: str) -> Path | DatasetName:
    """A prompt source as the user gives it: an existing file, or `dataset:split:column`.

    Raises:
        InputError: it is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"The prompt source {source!r} is a directory; name a text or JSONL file in it.")
    if path.exists():
        return path
    dataset = dataset_name(source)
    if dataset is not None:
        return dataset
    raise InputError(
        f"There is no prompt file {source!r}; give the path of a text or JSONL file, or a data set as "
        "name:split:column, for example mlabonne/harmful_behaviors:train[:400]:text."
    )


def dataset_name(source: str) -> DatasetName | None:
    """The data set column that `dataset:split:column` names; None if the source hasn't that form."""
    match = _DATASET.match(source)
    return DatasetName(**match.groupdict()) if match and not source.lower().endswith((".txt", ".jsonl", ".json")) else None


def read_prompts(path: Path, *, prefix: str = "", suffix: str = "", system: str = "") -> tuple[Prompt, ...]:
    """The prompts of a text file (one a line, without blank lines) or of a JSONL file (recognized by its ending).

    JSONL lines are objects with `prompt` and optionally `system`, which then overrides the general system prompt.

    Raises:
        InputError: the file is unreadable, not UTF-8 or without prompts, or a line doesn't parse (it is named by its number).
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"The prompt file {path} can't be read: {error.strerror}.") from error
    # `str.splitlines()` would also cut at U+2028 and form feeds, which may stand inside a prompt.
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1)]
    parse = _parse_json_line if path.suffix.lower() in (".jsonl", ".json") else _parse_text_line
    prompts = [parse(path, number, line, system) for number, line in lines if line]
    if not prompts:
        raise InputError(f"The prompt file {path} holds no prompts; put one on each line.")
    return wrap(prompts, prefix, suffix)


def wrap(prompts: Sequence[Prompt], prefix: str, suffix: str) -> tuple[Prompt, ...]:
    """Each prompt's text between `prefix` and `suffix`."""
    return tuple(Prompt(prefix + prompt.text + suffix, prompt.system) for prompt in prompts)


def public_source(source: str) -> str:
    """A source in a form that may be shared: the name of a data set, or a file's name without its folder."""
    path = Path(source).expanduser()
    # An absolute path may be gone, because settings hold where a file lay when the run began.
    return path.name if source and (path.is_absolute() or path.exists()) else source


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' text and order, for cache keys and recipes."""
    content = json.dumps([[prompt.text, prompt.system] for prompt in prompts], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _parse_text_line(path: Path, number: int, line: str, system: str) -> Prompt:
    if "\0" in line:
        raise InputError(f"Line {number} of {path} holds a NUL character; this doesn't look like a text file.")
    return Prompt(line, system)


def _parse_json_line(path: Path, number: int, line: str, system: str) -> Prompt:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))
        raise InputError(
            f'Line {number} of {path} is not JSON ({reason}); each line must be an object like {{"prompt": "…"}}.'
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise InputError(f'Line {number} of {path} has no text under "prompt"; write {{"prompt": "…"}}.')
    own_system = record.get("system", system)
    if not isinstance(own_system, str):
        raise InputError(f'Line {number} of {path} has a "system" that is not text; make it a string.')
    if _HALVES.search(record["prompt"] + own_system):
        raise InputError(
            f"Line {number} of {path} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it."
        )
    return Prompt(record["prompt"], own_system)
