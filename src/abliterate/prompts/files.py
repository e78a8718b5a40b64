"""Read prompt sets from files, and parse the names of sources: files, columns of files, and columns of data sets."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.errors import InputError
from abliterate.files import expanded, split_existing
from abliterate.prompts.columns import FORMS, is_header, shown
from abliterate.prompts.json_files import JSON, Records, read_json
from abliterate.prompts.tables import PARQUET, SEPARATED, Texts, read_parquet, read_separated
from abliterate.types import Prompt

_SLICE = r"[^:\[\]+]+(?:\[[^\[\]]*\])?"
_COLUMN = rf"(?P<split>{_SLICE}(?:\+{_SLICE})*):(?P<column>[^:]+)$"
_DATASET = re.compile(r"^(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<config>[\w.-]+))?:" + _COLUMN)
_OF_FOLDER = re.compile("^" + _COLUMN)
_TEXT = (".txt",)
_FILES = (*_TEXT, *SEPARATED, *JSON, *PARQUET)
# Files that hold tables or packed data, and would be read as lines of text that are no prompts.
_UNREAD = {
    *(".xlsx", ".xls", ".ods", ".arrow", ".feather", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm", ".pkl", ".pickle"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".sqlite", ".db", ".h5", ".npy", ".npz", ".docx", ".pdf"),
}


def _quiet(text: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, slots=True)
class FileColumn:
    """A column of a file with a table, written `file.csv:column`."""

    path: Path
    column: str


@dataclass(frozen=True, slots=True)
class FolderColumn:
    """A column of a data set in a local folder, written `/absolute/folder:split:column`; the split may carry a slice."""

    path: Path
    split: str
    column: str


@dataclass(frozen=True, slots=True)
class DatasetName:
    """A column of a Hub data set, written `name:split:column`; the split may carry a slice, as in `train[:400]`.

    `config` selects one configuration of a data set, as in `name@config:split:column`.
    """

    name: str
    split: str
    column: str
    config: str | None = None


def parse_source(source: str) -> Path | FileColumn | FolderColumn | DatasetName:
    """A prompt source as the user gives it: an existing file or its column, or a column of a data set.

    Raises:
        InputError: it is none of these.
    """
    path = expanded(source)
    if os.path.isdir(path):
        raise InputError(
            f"The prompt source {source!r} is a directory; name a file in it, or a column of its data set as "
            f"{source}:split:column."
        )
    if os.path.exists(path):
        return path
    there, rest = split_existing(source)
    if there is not None and there.is_file():
        return FileColumn(there, rest)
    if there is not None:
        match = _OF_FOLDER.match(rest)
        if match is None:
            raise InputError(f"The prompt source {source!r} names no column of the folder {there}; write {there}:split:column.")
        return FolderColumn(there, **match.groupdict())
    dataset = dataset_name(source)
    if dataset is not None:
        return dataset
    raise InputError(
        f"There is no prompt file {source!r}; give {FORMS}, for example mlabonne/harmful_behaviors:train[:400]:text."
    )


def dataset_name(source: str) -> DatasetName | None:
    """The data set column that `dataset:split:column` names; None if the source hasn't that form."""
    match = _DATASET.match(source)
    if match is None or source.lower().endswith(_FILES) or match["name"].lower().endswith(_FILES):
        return None
    return DatasetName(**match.groupdict())


def read_prompts(
    path: Path, *, column: str = "", prefix: str = "", suffix: str = "", system: str = "", note: Callable[[str], None] = _quiet
) -> tuple[Prompt, ...]:
    """The prompts of a file, whose ending says whether it is a table or text (one prompt on each line, without blank lines).

    JSON objects have `prompt` and optionally `system`, which then overrides the general system prompt. Another column that is
    read because it is the only one that can hold prompts is told to `note`.

    Raises:
        InputError: the file is unreadable, not UTF-8 or without prompts, or a part of it doesn't parse (the sentence names it).
    """
    ending = path.suffix.lower()
    if ending in _UNREAD:
        raise InputError(f"The prompt file {path} is of a kind that can't be read ({ending}); give {FORMS}.")
    prompts: Sequence[Prompt]
    if ending in (*SEPARATED, *PARQUET, *JSON):
        table = _table(path, ending, column, system)
        prompts = table.prompts if isinstance(table, Records) else [Prompt(text, system) for text in table.texts]
        if not column and table.column not in ("", "prompt"):
            note(f"The column {table.column!r} of {path.name} holds the prompts (its columns: {shown(table.names)}).")
        if isinstance(table, Texts) and "system" in table.names and table.column != "system":
            note(f"The column 'system' of {path.name} isn't read; give the prompts as .jsonl for system prompts of their own.")
    elif column:
        raise InputError(f"The prompt file {path} is text and has no column {column!r}; give {FORMS}.")
    else:
        prompts = _text_lines(path, _content(path), system)
    if not prompts:
        raise InputError(f"The prompt file {path} holds no prompts; give {FORMS}.")
    return wrap(prompts, prefix, suffix)


def wrap(prompts: Sequence[Prompt], prefix: str, suffix: str) -> tuple[Prompt, ...]:
    """Each prompt's text between `prefix` and `suffix`."""
    return tuple(Prompt(prefix + prompt.text + suffix, prompt.system) for prompt in prompts)


def public_source(source: str) -> str:
    """A source in a form that may be shared: the name of a data set, or a file's name without its folder."""
    path = expanded(source)
    # An absolute path may be gone, because settings hold where a file lay when the run began.
    if not source or not (path.is_absolute() or os.path.exists(path) or split_existing(source)[0]):
        return source
    dataset = dataset_name(path.name)
    # A folder's data set must not look like a data set of the Hub.
    return f"./{path.name}" if dataset else path.name


def digest(prompts: Sequence[Prompt]) -> str:
    """A hash of the prompts' text and order, for cache keys and recipes."""
    content = json.dumps([[prompt.text, prompt.system] for prompt in prompts], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _table(path: Path, ending: str, column: str, system: str) -> Texts | Records:
    if ending in PARQUET:
        return read_parquet(path, column)
    content = _content(path)
    if ending in SEPARATED:
        return read_separated(path, content, column)
    return read_json(path, re.sub("\r\n?", "\n", content), column, system)


def _content(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"The prompt file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"The prompt file {path} can't be read: {error.strerror}.") from error
    if "\0" in content and path.suffix.lower() not in JSON:  # JSON has its own sentence
        number = content[: content.index("\0")].count("\n") + 1
        raise InputError(f"Line {number} of {path} holds a NUL character; this doesn't look like a text file.")
    return content


def _text_lines(path: Path, content: str, system: str) -> list[Prompt]:
    # `str.splitlines()` would also cut at U+2028 and form feeds, which may stand inside a prompt.
    lines = [line.strip() for line in re.split("\r\n|\r|\n", content)]
    lines = [line for line in lines if line]
    if lines and is_header(lines[0]):
        raise InputError(
            f"The first line of {path} ({lines[0]!r}) is the header of a table and no prompt; name the file .csv, or remove "
            "that line."
        )
    if lines and (_holds_records(lines[0]) or (lines[0][0] in "[{" and _holds_records(content))):
        raise InputError(
            f"The prompt file {path} holds JSON, which its name doesn't say; name it .json, or .jsonl if by lines."
        )
    return [Prompt(line, system) for line in lines]


def _holds_records(text: str) -> bool:
    """Whether a text is a JSON object, or a list of texts or objects: either is no prompt that anybody asks."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    entries = value if isinstance(value, list) else [value]
    return bool(value) and all(
        isinstance(entry, dict) or (isinstance(value, list) and isinstance(entry, str)) for entry in entries
    )
