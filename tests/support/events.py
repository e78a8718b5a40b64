"""Check `--json` lines against docs/json.schema.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from transformers import AutoConfig

from support.cli import Outcome
from support.paths import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "json.schema.json").read_text(encoding="utf-8"))


def strict(line: str) -> dict[str, Any]:
    """Parse a line as strict JSON, which has no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    assert line.isascii()
    return json.loads(line, parse_constant=refuse)


def check(part: str, record: Mapping[str, Any]) -> None:
    """Check `record` against one part of the schema."""
    schema = {"$ref": f"#/$defs/{part.replace(' ', '%20')}", "$defs": SCHEMA["$defs"]}
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in Draft202012Validator(schema).iter_errors(record)
    ]
    assert not found, (part, found)


def checked(outcome: Outcome, command: str, code: int = 0, last: str = "result") -> list[dict[str, Any]]:
    """The lines of a command; each line must match the schema, and the last line must have the right kind."""
    assert outcome.code == code, outcome
    lines = [strict(line) for line in outcome.out.splitlines()]
    for line in lines:
        check(f"result of {command}" if line["event"] == "result" else line["event"], line)
    assert [line["event"] for line in lines if line["event"] in ("result", "summary", "error")][-1] == last
    assert lines[-1]["event"] == last
    return lines


def let_models_print(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a model's config prints, as a model's own code may, which is no line of `--json`."""
    read = AutoConfig.from_pretrained

    def printing(*args: Any, **kwargs: Any) -> Any:
        print("what a model's own code prints")
        return read(*args, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", printing)
