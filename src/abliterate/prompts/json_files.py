"""Read prompts from JSON: lines that are objects, or one array of strings or objects."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.errors import InputError
from abliterate.files import HALF_CHARACTER
from abliterate.prompts.columns import FORMS, USUAL, choose_column
from abliterate.types import Prompt

JSON = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Records:
    """The prompts of a JSON file, the name of their field, and the names of all fields (none for an array of strings)."""

    prompts: tuple[Prompt, ...]
    column: str
    names: tuple[str, ...]


def read_json(path: Path, content: str, column: str, system: str) -> Records:
    """The prompts of a JSON file, from the field that is given, else from `prompt`, else from the only one that fits.

    Objects may have a `system`, which then overrides the general system prompt.

    Raises:
        InputError: the file isn't JSON, or an entry has no text there; the sentence gives its number.
    """
    entries = _array(path, content) if content.lstrip().startswith("[") else None
    if entries is None:
        entries = _lines(path, content)
        if len(entries) == 1 and not column and _holds_no_text(entries[0][1]):
            raise _one_object(path)
    elif not column and all(isinstance(value, str) for _, value in entries):
        return Records(tuple(Prompt(_whole(path, place, value, ""), system) for place, value in entries), "", ())
    objects = [value for _, value in entries if isinstance(value, dict)]
    names = tuple(dict.fromkeys(name for value in objects for name in value))
    if column or (names and USUAL[0] not in names):
        chosen = names[choose_column(path, names, column, lambda index: [value.get(names[index]) for value in objects])]
    else:
        chosen = USUAL[0]
    return Records(tuple(_prompt(path, place, value, chosen, system) for place, value in entries), chosen, names)


def _array(path: Path, content: str) -> list[tuple[str, Any]] | None:
    """The items of a file that is one array; None if its lines are JSON of their own."""
    try:
        items = json.loads(content)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() != ".json":
            return None
        raise InputError(
            f"The prompt file {path} is not JSON ({_reason(error)}); it must be an array of strings or objects."
        ) from error
    return [(f"Item {number}", item) for number, item in enumerate(items, 1)]


def _lines(path: Path, content: str) -> list[tuple[str, Any]]:
    entries = []
    # `str.splitlines()` would also cut at U+2028 and form feeds, which may stand inside a prompt.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entries.append((f"Line {number}", json.loads(line.strip())))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError, too
            if not entries and _is_json(content):
                raise _one_object(path) from error
            raise InputError(
                f'Line {number} of {path} is not JSON ({_reason(error)}); each line must be an object like {{"prompt": "…"}}.'
            ) from error
    return entries


def _holds_no_text(value: Any) -> bool:
    """Whether a JSON value is an object of lists and objects, such as a whole data set on one line."""
    return (
        isinstance(value, dict)
        and USUAL[0] not in value
        and bool(value)
        and all(isinstance(part, dict | list) for part in value.values())
    )


def _one_object(path: Path) -> InputError:
    return InputError(f"The prompt file {path} is one JSON object and no list of prompts; give {FORMS}.")


def _prompt(path: Path, place: str, record: Any, name: str, system: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get(name), str) or not record[name].strip():
        raise InputError(f'{place} of {path} has no text under "{name}"; write {{"{name}": "…"}}.')
    own_system = record.get("system", system)
    if not isinstance(own_system, str):
        raise InputError(f'{place} of {path} has a "system" that is not text; make it a string.')
    return Prompt(_whole(path, place, record[name], own_system), own_system)


def _whole(path: Path, place: str, text: str, system: str) -> str:
    """The text; InputError if it is blank, or if it or its system prompt holds half a character."""
    if not text.strip():
        raise InputError(f"{place} of {path} is blank; write a prompt, or remove it.")
    if HALF_CHARACTER.search(text + system):
        raise InputError(
            f"{place} of {path} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; remove it."
        )
    return text


def _is_json(content: str) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))
