#!/usr/bin/env python3
"""Writes docs/json.md from docs/json.schema.json, the one place where fields are described. Usage: scripts/json_page.py

`tests/cli/test_json_lines.py` fails where the page is not what this writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

DOCS = Path(__file__).parents[1] / "docs"
INTRO = """# What `--json` prints

<!-- Written by scripts/json_page.py from json.schema.json; change that file and run the script. -->

With `--json` a command prints strict JSON on standard output: one object a line, in ASCII (other characters are escaped),
flushed line by line, no NaN or infinity. Standard error is for people. `run`, `worker`, `tune-batch`, `inspect`, `trials`,
`export`, `evaluate`, `chat` and `cache ls` have the option. Every line has:

{line}

The last line says how it ended: a `result` (of several runs the `summary`), or an `error` with the exit code, also for mistyped
options, Ctrl+C and SIGTERM. Only a process that was killed, or whose standard output is closed or full, ends without one.

New events, new fields and new stages may appear in the same `format`; skip those that you don't know. What is documented here
keeps its name and meaning, or `format` changes. [json.schema.json](json.schema.json) says the same as a JSON Schema (2020-12)
that knows exactly the fields of this version; `tests/cli/test_json_lines.py` holds the output of real commands against it.

```console
$ abliterate run demo --json | jq -r 'select(.event == "trial") | .trial | [.number, .state, .scores.kl.mean] | @tsv'
$ abliterate trials runs/mine --front --sort kl --json | jq '.trials[0].number'
$ abliterate chat runs/mine --json < prompts.txt | jq -r 'select(.event == "answer") | .text'
$ abliterate run A B --json | jq -r 'select(.event == "summary") | .runs[] | [.model, .state, .export] | @tsv'
```

In the tables `[]` stands for every element of a list, `*` for every name in an object whose names aren't fixed, `?` behind a
field says that it may be absent.
"""


def page(schema: Mapping[str, Any]) -> str:
    """The page's text."""
    parts = schema["$defs"]
    events = [unquote(one["$ref"].rsplit("/", 1)[1]) for one in schema["anyOf"]]
    sections = [INTRO.replace("{line}", _table(parts["line"], parts))]
    for title, names in (
        ("Events", [name for name in events if not name.startswith("result of ")]),
        ("Results", [name for name in events if name.startswith("result of ")]),
        ("Files and parts", [name for name in parts if name not in (*events, "line")]),
    ):
        sections.append(f"## {title}\n")
        for name in names:
            heading = name if name.startswith("result of ") or name not in events else f"`{name}`"
            sections.append(f"### {heading}\n\n{parts[name]['description']}\n\n{_table(parts[name], parts)}\n")
    return "\n".join(sections)


def fields(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted path, schema) of everything in a part, those that it only refers to not followed."""
    for name, one in part.get("properties", {}).items():
        path = name if name in part.get("required", ()) or "const" in one else f"{name}?"
        if name != "event" or "const" not in one:  # the section says it
            yield path, one
            yield from ((f"{path}{below}", inner) for below, inner in _below(one))


def _below(one: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    inner, mark = one, ""
    while True:
        if isinstance(inner.get("items"), Mapping):
            inner, mark = inner["items"], f"{mark}[]"
        elif isinstance(inner.get("additionalProperties"), Mapping):
            inner, mark = inner["additionalProperties"], f"{mark}.*"
        else:
            break
    yield from ((f"{mark}.{path}", field) for path, field in fields(inner))


def _table(part: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    rows = [f"| `{path}` | {_type(one)} | {one.get('description', '')} |" for path, one in fields(part)]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _type(one: Mapping[str, Any]) -> str:
    if "$ref" in one:
        name = unquote(one["$ref"].rsplit("/", 1)[1])
        return f"[{name}](#{name.lower().replace(' ', '-').replace('.', '')})"
    if "anyOf" in one:
        return " or ".join(_type(choice) for choice in one["anyOf"])
    if "const" in one:
        return json.dumps(one["const"])
    if "enum" in one:
        return ", ".join(f"`{value}`" for value in one["enum"])
    if "type" not in one:
        return "any value"
    kinds = [one["type"]] if isinstance(one["type"], str) else one["type"]
    words = [_kind(kind, one) for kind in kinds]
    return " or ".join(words)


def _kind(kind: str, one: Mapping[str, Any]) -> str:
    if kind == "array":
        return f"list of {_type(one['items'])}"
    if kind == "object" and isinstance(one.get("additionalProperties"), Mapping):
        return f"object of {_type(one['additionalProperties'])}"
    return kind


def main() -> None:
    """Write the page."""
    schema = json.loads((DOCS / "json.schema.json").read_text(encoding="utf-8"))
    (DOCS / "json.md").write_text(page(schema), encoding="utf-8")


if __name__ == "__main__":
    main()
