#!/usr/bin/env python3
"""Write docs/json.md from docs/json.schema.json, the one place where fields are described. Usage: scripts/json_page.py

`tests/test_json_events.py` fails if the page is not the output of this script.
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
flushed line by line, without NaN or infinity. Standard error is for people. `run`, `worker`, `tune-batch`, `inspect`,
`trials`, `export`, `evaluate`, `reproduce`, `chat` and `cache ls` have the option. Every line has:

{line}

The last line tells how the command ended: a `result` (for several runs the `summary`), or an `error` with the exit code, also
after mistyped options, Ctrl+C and SIGTERM. Only a process that was killed, or whose standard output is closed or full, ends
without such a line.

New events, new fields and new stages may appear in the same `format`; skip unknown ones. Every field that is documented here
keeps its name and meaning as long as `format` stays the same. [json.schema.json](json.schema.json) describes the same as a JSON
Schema (2020-12) with exactly the fields of this version; `tests/test_json_events.py` checks the output of real commands by it.

```console
$ abliterate run demo --json | jq -r 'select(.event == "trial") | .trial | [.number, .state, .scores.kl.mean] | @tsv'
$ abliterate trials runs/mine --front --sort kl --json | jq '.trials[0].number'
$ abliterate chat runs/mine --json < prompts.txt | jq -r 'select(.event == "answer") | .text'
$ abliterate run A B --json | jq -r 'select(.event == "summary") | .runs[] | [.model, .state, .export] | @tsv'
```

In the tables `[]` stands for every element of a list, and `*` for every name in an object whose names aren't fixed. A field
with `?` behind it may be absent.
"""


def page(schema: Mapping[str, Any]) -> str:
    """The text of the page."""
    definitions = schema["$defs"]
    events = [unquote(reference["$ref"].rsplit("/", 1)[1]) for reference in schema["anyOf"]]
    sections = [INTRO.replace("{line}", _table(definitions["line"]))]
    for title, names in (
        ("Events", [name for name in events if not name.startswith("result of ")]),
        ("Results", [name for name in events if name.startswith("result of ")]),
        ("Files and parts", [name for name in definitions if name not in (*events, "line")]),
    ):
        sections.append(f"## {title}\n")
        for name in names:
            heading = name if name.startswith("result of ") or name not in events else f"`{name}`"
            sections.append(f"### {heading}\n\n{definitions[name]['description']}\n\n{_table(definitions[name])}\n")
    return "\n".join(sections)


def fields(definition: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(dotted path, schema) of every field in a definition; references are not followed."""
    for name, field in definition.get("properties", {}).items():
        path = name if name in definition.get("required", ()) or "const" in field else f"{name}?"
        if name != "event" or "const" not in field:  # the heading of the section names the event
            yield path, field
            yield from ((f"{path}{below}", inner) for below, inner in _below(field))


def _below(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    inner, mark = schema, ""
    while True:
        if isinstance(inner.get("items"), Mapping):
            inner, mark = inner["items"], f"{mark}[]"
        elif isinstance(inner.get("additionalProperties"), Mapping):
            inner, mark = inner["additionalProperties"], f"{mark}.*"
        else:
            break
    yield from ((f"{mark}.{path}", field) for path, field in fields(inner))


def _table(definition: Mapping[str, Any]) -> str:
    rows = [f"| `{path}` | {_type(field)} | {field.get('description', '')} |" for path, field in fields(definition)]
    return "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = unquote(schema["$ref"].rsplit("/", 1)[1])
        return f"[{name}](#{name.lower().replace(' ', '-').replace('.', '')})"
    if "anyOf" in schema:
        return " or ".join(_type(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "type" not in schema:
        return "any value"
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    words = [_kind(kind, schema) for kind in kinds]
    return " or ".join(words)


def _kind(kind: str, schema: Mapping[str, Any]) -> str:
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"object of {_type(schema['additionalProperties'])}"
    return kind


def main() -> None:
    """Write the page."""
    schema = json.loads((DOCS / "json.schema.json").read_text(encoding="utf-8"))
    (DOCS / "json.md").write_text(page(schema), encoding="utf-8")


if __name__ == "__main__":
    main()
