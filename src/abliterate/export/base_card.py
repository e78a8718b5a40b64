"""Read the base's licence, languages and tags from its model card, for the front matter of an export's card.

A card is a stranger's text: only short texts and lists of them are taken from it, and they are written as YAML strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load

from abliterate.export.base_weights import fetched
from abliterate.model.hub import skip_retries_without_network
from abliterate.settings.schema import LoadSettings

_FIELDS = ("license", "license_name", "license_link", "language", "tags")
# YAML reads these words as truth values: `no`, unquoted, is the language Norwegian to nobody.
_TRUTH = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
_LARGEST, _LONGEST, _MOST = 1 << 20, 300, 200


def front_matter(source: str, load: LoadSettings) -> dict[str, Any]:
    """{field: text or list of texts} of the base's card; empty if it has no card, or one that can't be read."""
    local = Path(source) / "README.md"
    try:
        path = local if Path(source).is_dir() else _fetched(source, load)
        if path is None or path.stat().st_size > _LARGEST:
            return {}
        record = metadata_load(path)
    # The Hub's and YAML's libraries have their own errors, and deep nesting is a RecursionError; no card is worth a failed run.
    except Exception:
        return {}
    found = {name: _texts(record[name], name) for name in _FIELDS if name in record} if record else {}
    return {name: value for name, value in found.items() if value}


def front_lines(facts: Mapping[str, Any], own_tags: Sequence[str]) -> Iterator[str]:
    """The lines of an export's front matter: the base's fields, with this tool's tags before the base's."""
    for name in _FIELDS[:-1]:
        if isinstance(value := facts.get(name), str):
            yield f"{name}: {_scalar(value)}"
        elif value:
            yield from (f"{name}:", *(f"- {_scalar(text)}" for text in value))
    theirs = facts.get("tags", ())
    tags = dict.fromkeys([*own_tags, *([theirs] if isinstance(theirs, str) else theirs)])
    yield from ("tags:", *(f"- {_scalar(tag)}" for tag in tags))


def _fetched(source: str, load: LoadSettings) -> Path | None:
    skip_retries_without_network()
    return fetched(source, load, "README.md", optional=True)


def _texts(value: Any, name: str) -> str | list[str]:
    """The text or the list of texts; lists within lists, which may be endless in YAML, are left out."""
    if isinstance(value, list):
        return [text for text in (_text(entry, name) for entry in value[:_MOST]) if text]
    return _text(value, name)


def _text(value: Any, name: str) -> str:
    if value is False and name == "language":
        return "no"
    return value if isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST else ""


def _scalar(text: str) -> str:
    """A text as YAML reads it: plain if it is a simple word, else quoted as JSON, which is YAML."""
    plain = re.fullmatch(r"[A-Za-z][\w.+/-]*", text, re.ASCII) and text.lower() not in _TRUTH
    return text if plain else json.dumps(text, ensure_ascii=False)
