"""`--json`: every line of real commands against docs/json.schema.json, and the schema and its page against the code."""

from __future__ import annotations

import ast
import functools
import io
import json
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

import abliterate
from abliterate.errors import TrialError
from abliterate.evaluation import trial as evaluation
from abliterate.terminal import json_lines
from support.cli import QUICK, Finished, Invoke, filled_cache, prompt_options
from support.events import ROOT, SCHEMA, check, checked, let_models_print, strict
from support.runs import copy_run

pytestmark = pytest.mark.usefixtures("lean")
EVENTS = {name: part for name, part in SCHEMA["$defs"].items() if "allOf" in part}


@functools.cache  # not at the import, because every test process imports every test
def trees() -> list[ast.Module]:
    """The parsed sources of the package."""
    return [ast.parse(path.read_text(encoding="utf-8")) for path in Path(abliterate.__file__).parent.rglob("*.py")]


@pytest.fixture(autouse=True)
def _models_that_print(monkeypatch: pytest.MonkeyPatch) -> None:
    let_models_print(monkeypatch)


def calls(name: str) -> Iterator[ast.Call]:
    """Every call of a function or method of that name in the package."""
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and name in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
                yield node


def properties(part: Any) -> Iterator[str]:
    """The names of all fields in a part of the schema."""
    if isinstance(part, Mapping):
        yield from part.get("properties", {})
        for inner in part.values():
            yield from properties(inner)
    elif isinstance(part, list):
        for inner in part:
            yield from properties(inner)


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert {one["$ref"].rsplit("/", 1)[1].replace("%20", " ") for one in SCHEMA["anyOf"]} == set(EVENTS)


def test_the_page_is_the_schema() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "json_page.py"))["page"](SCHEMA)
    assert (ROOT / "docs" / "generated" / "json.md").read_text(encoding="utf-8") == page, "run scripts/json_page.py"
    for name in SCHEMA["$defs"]:
        assert name == "line" or f"### {name}\n" in page or f"### `{name}`\n" in page
    assert all(f"{name}?`" in page or f"{name}`" in page for name in properties(SCHEMA) if name != "event")


def test_the_code_emits_the_events_of_the_schema() -> None:
    emitted = {
        call.args[0].value for name in ("emit", "_emit") for call in calls(name) if isinstance(call.args[0], ast.Constant)
    }
    assert emitted == {part["properties"]["event"]["const"] for part in EVENTS.values()}


def test_the_code_notes_the_fields_of_the_schema() -> None:
    noted = {keyword.arg for call in calls("note") for keyword in call.keywords if keyword.arg}  # reporters pass others on
    assert noted == set(EVENTS["note"]["properties"]["fields"]["properties"])


def test_no_field_of_the_schema_is_unknown_to_the_code() -> None:
    words: set[str] = set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.keyword | ast.arg):
                words.add(node.arg or "")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
    assert set(properties(SCHEMA)) <= words


def test_a_line_is_strict_json_whatever_is_in_it() -> None:
    out = io.StringIO()
    json_lines.emit("note", out=out, text="π\u2028\x85\ud800", fields={"a": [float("nan"), {"b": float("-inf")}, 0.1]})
    (line,) = out.getvalue().splitlines()
    record = strict(line)
    assert record["text"] == "π\u2028\x85\ud800"
    assert record["fields"] == {"a": [None, {"b": None}, 0.1]}


def test_run_trials_and_export(invoke: Invoke, tmp_path: Path, prompt_files: dict[str, str]) -> None:
    options = [*prompt_options(prompt_files), *QUICK, "-n", "2", "-o", "run", "--json"]
    lines = checked(invoke("run", "demo", *options), "run and export")
    assert {line["event"] for line in lines} == {"stage", "header", "progress", "note", "trial", "result"}
    assert sum(line["event"] == "trial" for line in lines) == 2
    stored = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    check("result.json", stored)
    assert lines[-1]["result"] == stored
    shown = checked(invoke("trials", "run", "--json"), "trials")[-1]
    assert (shown["trials"], shown["front"]) == (stored["trials"], stored["front"])
    more = ["--trial", stored["front"][0], "-o", tmp_path / "out", "--json"]
    adapter = checked(invoke("export", "run", *more, "--kind", "adapter", "--verify"), "run and export")[-1]["result"]
    assert {"weights", "refusals"} <= set(adapter["export"]["verification"]["checks"])
    checked(invoke("worker", "run", "--json"), "worker")
    own = [
        part
        for name in ("harmful", "harmless", "harmful_eval", "harmless_eval")
        for part in (f"--{name.replace('_', '-')}", prompt_files[name])
    ]
    made = checked(invoke("reproduce", "run/recipe.json", *own, "-o", tmp_path / "made", "--json"), "run and export")[-1][
        "result"
    ]
    assert made["reproduction"]["outcome"] == "identical"


def test_failed_trials_and_the_svd_representation(
    invoke: Invoke,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluate, failed = evaluation.evaluate, iter([True])

    def once_not(*args: Any) -> Any:
        print("what a plugin or a model's own code prints is no line of JSON")
        if next(failed, False):
            raise TrialError("no decomposition converged")
        return evaluate(*args)

    monkeypatch.setattr(evaluation, "evaluate", once_not)
    options = [*prompt_options(prompt_files), *QUICK, "-n", "2", "--set", "edit.representation=svd", "--json"]
    result = checked(invoke("run", "demo", *options), "run and export")[-1]["result"]
    assert result["export"]["approximation_error"]["max"] > 0
    assert (result["trials"][0]["state"], result["trials"][0]["scores"]) == ("failed", {})


def test_models_and_cache(invoke: Invoke, tmp_path: Path) -> None:
    small = ("--set", "evaluation.max_batch_size=4", "--json")
    assert list(checked(invoke("tune-batch", "demo", *small), "tune-batch")[-1]["operations"]) == [
        "residuals",
        "prefill",
        "decode",
    ]
    assert checked(invoke("inspect", "demo", *small), "inspect")[-1]["cost"]["seconds"]
    assert checked(invoke("inspect", "demo", "--no-weights", *small), "inspect")[-1]["cost"]["seconds"] is None
    store = filled_cache(tmp_path / "c")
    assert len(checked(invoke("cache", "ls", "--cache-dir", tmp_path / "c", "--json"), "cache ls")[-1]["entries"]) == 2
    verify = ("cache", "verify", "--cache-dir", tmp_path / "c", "--json")
    assert checked(invoke(*verify), "cache verify")[-1]["sound"] == 2
    damaged = next(iter(store.entries()))
    damaged.data.write_bytes(b"")
    result, _ = checked(invoke(*verify), "cache verify", code=1, last="error")
    reason = "its checksum differs from the one written"
    assert result["unusable"] == [{"kind": "residuals", "digest": damaged.digest, "reason": reason}]
    assert result["sound"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "/no/such/model"],
        ["run", "demo", "--set", "search.trails=5"],
        ["run", "demo", "--no-such-option"],
        ["run", "demo", "-n", "many"],
        ["run", "demo", "--resume", "--restart"],
        ["run", "--list", "nowhere.toml"],
        ["worker", "nowhere"],
        ["trials", "nowhere"],
        ["trials"],
        ["export", "nowhere", "--trial", "1"],
        ["inspect", "/no/such/model"],
        ["tune-batch", "/no/such/model"],
    ],
)
def test_bad_input_is_a_last_line(invoke: Invoke, arguments: list[str]) -> None:
    outcome = invoke(*arguments, "--json")
    error = checked(outcome, arguments[0], code=2, last="error")[-1]
    assert error["exit_code"] == 2
    told = " ".join(outcome.err.replace("│", " ").split())
    assert error["message"].split()[0] in told
    assert "{" not in invoke(*arguments).out  # only where it is asked for


def test_unexpected_errors_and_interruptions_are_a_last_line(
    invoke: Invoke,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    for error, code, part in (
        (RuntimeError("a bug\nof two lines"), 1, "unexpected RuntimeError: a bug"),
        (MemoryError(), 1, "memory"),
        (PermissionError(13, "Permission denied", "x"), 1, "Permission denied (x)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):

        def broken(*args: Any, error: BaseException = error, **kwargs: Any) -> Any:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("abliterate.cli.trials.show_trials", broken)
            outcome = invoke("trials", run, "--json")
        last = checked(outcome, "trials", code, last="error")[-1]
        assert last["exit_code"] == code
        assert part in last["message"]
        assert part in " ".join(outcome.err.split())
