"""A `result.json` from anybody, without its checksum: it is refused in one sentence, or every command can work with it."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.edits import first_trial
from abliterate.cli.trials import TrialFilter
from abliterate.errors import InputError
from abliterate.export.recipe import NO_EXPORT, recipe_record
from abliterate.files import DIGEST
from abliterate.pipeline.export import card
from abliterate.pipeline.export_trial import _NEEDED
from abliterate.report import terminal
from abliterate.report.data import gather
from abliterate.report.ending import ending
from abliterate.report.page import render
from abliterate.report.tables import SearchRecord, exact_trial_table
from abliterate.settings.schema import Settings
from support.cli import Invoke, assert_sentence
from support.refined import refined_trial
from support.runs import copy_run

Finished = tuple[Path, dict[str, Any], Settings]
Place = tuple[str | int, ...]
WRONG: list[Any] = [None, "x", -1, 1e308, 10**30, True, [], {}, ["x"], {"x": {"x": [0]}}]


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Every place in a record; of a list only the first entry's."""
    if before:
        yield before
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*before, name))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*before, 0))


def changed(record: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(record))
    inner = copy
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return copy


def use(directory: RunDirectory, settings: Settings) -> str:
    """Everything that commands do with a result before they load a model; returns why the result is refused, or ""."""
    try:
        result = Result.read(directory)
        with contextlib.redirect_stdout(io.StringIO()):
            material = gather(directory)
            render(material)
            terminal.show(material)
        search = SearchRecord.of(result)
        exact_trial_table(search, TrialFilter(sort="kl").of(search.trials, search.front, search.objectives))
        ending(result, "run", front_shown=False)
        trial = first_trial(result, settings, directory.path)
        if result.model is not None and result.baseline is not None:
            card(settings, result, "demo", trial, {})
        if all(getattr(result, name) is not None for name in _NEEDED):
            recipe_record(settings, result.to_record(), trial, NO_EXPORT)
        json.dumps(result.to_record(), allow_nan=False)
    except InputError as error:
        return str(error)
    return ""


def test_no_wrong_value_is_unexpected(finished: Finished, measured: Finished, tmp_path: Path) -> None:
    """Whatever stands at whatever place: a sentence that names the place, or a result that all commands can use."""
    settings = finished[2]
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    record = measured[1]
    record = {**record, "trials": record["trials"][-1:] + record["trials"][:-1]}
    run.result.write_text(json.dumps(record), encoding="utf-8")
    assert use(run, settings) == ""
    tried = [place for place in places(record) if place[0] not in ("heldout", "coverage")]
    tried += [place for place in places(record) if place[0] in ("heldout", "coverage")][::4]
    assert len(tried) > 100
    refused, unexpected = 0, []
    for number, place in enumerate(tried):
        for value in WRONG[number % 5 :: 5]:
            run.result.write_text(json.dumps(changed(record, place, value)), encoding="utf-8")
            try:
                why = use(run, settings)
            except Exception as error:
                unexpected.append(f"{place} = {value!r}: {type(error).__name__}: {error}")
                continue
            assert "\n" not in why
            refused += bool(why)
    assert unexpected == []
    assert refused > 200


def test_no_wrong_value_of_a_refined_trial_is_unexpected(finished: Finished, tmp_path: Path) -> None:
    run, settings = RunDirectory(tmp_path / "run"), finished[2]
    run.path.mkdir()
    trial = refined_trial(4).to_record()
    params, name = trial["params"], "model.layers.3.mlp.down_proj"
    params |= {"coeffs": {name: 1.0}, "facts": params["facts"] | {"cosine": {name: 0.5}}}
    record = {key: value for key, value in finished[1].items() if key != DIGEST}
    record |= {"trials": [trial], "front": [4], "selected": 4}
    run.result.write_text(json.dumps(record), encoding="utf-8")
    assert use(run, settings) == ""
    refused = 0
    for number, place in enumerate([*places(params), ("kind",)]):
        for value in WRONG[number % 2 :: 2]:
            run.result.write_text(json.dumps(changed(record, ("trials", 0, "params", *place), value)), encoding="utf-8")
            why = use(run, settings)
            assert "\n" not in why
            refused += bool(why)
    assert refused > 30


NAMED = {
    "a direction beyond the model": (("trials", 0, "params", "direction_index"), 1e308, "trials.0"),
    "a direction just beyond the model": (("trials", 0, "params", "direction_index"), 12.5, "beyond 11"),
    "ten million layers": (("model", "n_layers"), 10**7, "model.n_layers"),
    "a coeff that overflows": (("trials", 0, "params", "kernels", "mlp.down_proj", "max_coeff"), 1e300, "trials.0"),
    "a kernel of no width": (("trials", 0, "params", "kernels", "mlp.down_proj", "distance"), 0, "no distance"),
    "a coeff in words": (("trials", 0, "params", "kernels", "mlp.down_proj", "min_coeff"), "strong", "is no number"),
    "a scope in words": (("trials", 0, "params", "scope"), "everywhere", "no scope"),
    "more refusals than prompts": (("trials", 0, "scores", "refusals"), 10**6, "more refusals than prompts"),
    "a baseline beyond its prompts": (("baseline", "refusals"), 10**6, "more refusals than prompts"),
    "half a refusal": (("baseline", "refusals"), 2.5, "baseline"),
    "a front of texts": (("front",), ["best"], "front.0"),
    "seconds before the start": (("timings", "load"), -5, "timings.load"),
    "a share of 4000 percent": (("coverage", "share"), 40, "coverage"),
    "an objective for the worse": (("objectives",), [{"name": "kl", "goal": "worsen"}], "objectives.0"),
    "an objective that nobody scored": (("objectives",), [{"name": "truth", "goal": "maximize"}], "no score truth"),
}


@pytest.mark.parametrize("name", NAMED)
def test_impossible_figures_are_refused(name: str, finished: Finished, tmp_path: Path, invoke: Invoke) -> None:
    place, value, words = NAMED[name]
    run = copy_run(finished[0], tmp_path / "run")
    record = changed(finished[1], place, value)
    (run / "result.json").write_text(json.dumps(record), encoding="utf-8")
    before = {path.name for path in run.iterdir()}
    started = time.monotonic()
    for command in (["report", run], ["trials", run], ["export", run, "--trial", record["trials"][0]["number"]], ["chat", run]):
        assert_sentence(invoke(*command), 2, "result.json is damaged", words)
    assert_sentence(invoke("evaluate", "demo", run), 2, words)
    assert time.monotonic() - started < 10
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_a_number_that_is_none_is_refused(text: str, finished: Finished, tmp_path: Path, invoke: Invoke) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    content = json.dumps(changed(finished[1], ("later",), 0.125))
    (run / "result.json").write_text(content.replace("0.125", text), encoding="utf-8")
    assert_sentence(invoke("trials", run), 2, f"{text} is no number")


def test_a_file_without_a_checksum_is_told_so(finished: Finished, tmp_path: Path, invoke: Invoke) -> None:
    path, first, _ = finished
    run = copy_run(path, tmp_path / "run")
    for command in (["trials", run], ["trials", run, "--json"], ["report", run]):
        assert "no checksum" not in invoke(*command).err
    record = {name: value for name, value in first.items() if name != DIGEST}
    (run / "result.json").write_text(json.dumps(record), encoding="utf-8")
    export = ["export", run, "--trial", first["selected"], "--kind", "adapter", "-o", tmp_path / "export"]
    for command in (["trials", run], ["trials", run, "--json"], ["trials", run, "--csv"], ["report", run], export):
        outcome = invoke(*command)
        assert outcome.code == 0
        assert "has no checksum" in " ".join((outcome.err + outcome.out).split()), command
        if "--json" in command:
            assert json.loads(outcome.out)["event"] == "result"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(("", "is empty"), ("# nothing\n", "is empty"), ("seed = 3\n", "names no model and no edit mode")),
        ('model = "demo"\n[edit]\nrank = 3\n', "names no edit mode"),
        ('model = "demo"\n[edit]\nmode = "auto"\n', "names no edit mode"),
    ],
)
def test_settings_that_no_run_wrote_are_a_sentence(
    content: str, words: str, finished: Finished, tmp_path: Path, invoke: Invoke
) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    (run / "settings.toml").write_text(content, encoding="utf-8")
    for command in (
        ["run", "--resume", "-o", run],
        ["run", "demo", "--resume", "-o", run],
        ["worker", run],
        ["chat", run],
        ["evaluate", "demo", run],
        ["export", run, "--trial", finished[1]["selected"], "-o", tmp_path / "export"],
    ):
        assert_sentence(invoke(*command), 2, "settings.toml", words, "put it back")
    outcome = invoke("report", run)
    assert outcome.code == 0, outcome
    if words == "is empty":
        assert "settings.toml is empty" in outcome.err
