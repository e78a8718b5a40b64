"""Several runs with one command: where each lies, failures, resume, interruption, memory between runs."""

from __future__ import annotations

import json
import shutil
import signal
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import batch
from abliterate.errors import InputError
from abliterate.files import read_toml
from abliterate.model import hub, memory
from abliterate.model.loader import demo_path
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline import stages
from abliterate.settings.sources import dump_settings
from abliterate.types import RefinedParams
from support.cli import Invoke, Outcome, assert_json_lines, assert_sentence
from support.models import make_model as tiny_model
from support.models import save_model
from support.runs import quick_options

pytestmark = pytest.mark.usefixtures("lean")


def write_list(path: Path, runs: list[dict[str, Any]], **common: Any) -> Path:
    path.write_text(tomli_w.dumps({**common, "run": runs}), encoding="utf-8")
    return path


def folders(planned: list[batch.Planned]) -> list[str]:
    return [one.options["out"] for one in planned]


def summary(outcome: Outcome) -> list[dict[str, Any]]:
    events = assert_json_lines(outcome.out)
    return next(event["runs"] for event in events if event["event"] == "summary")


def test_each_run_has_a_directory_of_its_own(tmp_path: Path) -> None:
    models = ["one/model", "two/Model", "/mnt/../model/", "demo"]
    assert folders(batch.plan(models, None, {"out": "runs/all"}, "")) == [
        *("runs/all/model", "runs/all/Model-2", "runs/all/model-3", "runs/all/demo"),
    ]
    assert folders(batch.plan(["demo", "one/model"], None, {}, "")) == ["", ""]  # the default ones
    listed = write_list(tmp_path / "my list.toml", [{"model": "demo"}, {"model": "demo", "out": "../x/y"}, {"model": "a/b"}])
    assert folders(batch.plan([], listed, {}, "")) == ["runs/my-list/demo", "../x/y", "runs/my-list/b"]
    assert folders(batch.plan([], listed, {"out": "o"}, "")) == ["o/demo", "o/y", "o/b"]  # the command line wins


def test_what_wins_over_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [{"model": "demo", "seed": 2}, {"model": "a/b", "search": {"trials": 7}}]
    listed = write_list(tmp_path / "l.toml", runs, seed=1, device="cpu", search={"trials": 5, "startup_trials": 2})
    monkeypatch.setenv("ABLITERATE_MODEL", "not/this")  # a run's model is its own
    monkeypatch.setenv("ABLITERATE_SEARCH__STARTUP_TRIALS", "3")
    flags = batch.RunFlags()
    first, second = batch.plan([], listed, {"device": "auto"}, "quick")
    for one, model, seed, trials in ((first, "demo", 2, 5), (second, "a/b", 1, 7)):
        settings, _ = batch.resolve(one.options, "quick", flags, one.entry)
        assert (settings.model, settings.seed, settings.search.trials) == (model, seed, trials)
        assert (settings.search.startup_trials, settings.device) == (3, "auto")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "[[run]]"),
        ("run = 3", "[[run]]"),
        ("[run]\nmodel = 'demo'", "[[run]]"),
        ("[[run]]\nseed = 1", "Run 1"),
        ("[[run]]\nmodel = 3", "Run 1"),
        ("[[run]]\nmodel = 'a'\n[[run]]\nmodel = 'b'\nsearch.trails = 5", "(b): There is no setting search.trails"),
        ("[[run]]\nmodel = 'a'\n[[run]]\nmodel = 'a'", "out of its own"),
        ("[[run]]\nmodel = 'a'\nout = 'x'\n[[run]]\nmodel = 'b'\nout = './X'", "same directory"),
        ("[export]\npush = 'me/x'\n[[run]]\nmodel = 'a'\n[[run]]\nmodel = 'b'", "one repository"),
        ("[[run]]\nmodel = ", "not valid TOML"),
    ],
)
def test_a_list_that_means_nothing_begins_nothing(invoke: Invoke, tmp_path: Path, text: str, part: str) -> None:
    listed = tmp_path / "l.toml"
    listed.write_text(text, encoding="utf-8")
    assert_sentence(invoke("run", "--list", listed), 2, part)
    assert [path.name for path in tmp_path.iterdir()] == ["l.toml"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["demo", "demo"], "same model"),
        (["demo", "a/b", "--set", "model=c"], "--set model"),
        (["demo", "--list", "l.toml"], "--list"),
        (["demo", "a/b", "--set", "search.trails=1"], "search.trials"),
        (["demo", "a/b", "--push", "me/x"], "one repository"),
        (["--list", "nowhere.toml"], "nowhere.toml"),
        (["demo", "a/b", "--resume", "--restart"], "contradict"),
    ],
)
def test_options_that_contradict(invoke: Invoke, arguments: list[str], part: str) -> None:
    assert_sentence(invoke("run", *arguments), 2, part)


def test_one_failing_does_not_stop_the_rest(
    invoke: Invoke,
    tmp_path: Path,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(demo_path() / "model", tmp_path / "other")
    tiny = save_model(tiny_model("llama"), tmp_path / "tiny")
    few = {"response": {"max_new_tokens": 10}, "search": {"trials": 2}}
    common = quick_options(prompt_files, tmp_path / "cache", export={"kind": "none"}, **few)
    del common["model"]
    runs = [
        {"model": "/no/such/model"},
        {"model": "demo", "export": {"kind": "adapter"}},
        {"model": str(tiny)},
        {"model": "other", "out": "mine"},
    ]
    listed = write_list(tmp_path / "l.toml", runs, **common)
    real, held, alive = pipeline_run.load_calibrated, [], []

    def load(context: Any, prompts: Any, **options: Any) -> Any:
        alive.append([one() is not None for one in held])
        if context.settings.model == str(tiny):
            bench = real(context, prompts, **options)
            held.append(weakref.ref(bench.loaded.model))
            raise RuntimeError("a bug")  # with the model in the frames of its traceback
        bench = real(context, prompts, **options)
        held.append(weakref.ref(bench.loaded.model))
        return bench

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_run, "load_calibrated", load)
        freed: list[Any] = []
        clear = memory.clear_device_cache
        patch.setattr(memory, "clear_device_cache", lambda device: freed.append(device) or clear(device))
        outcome = invoke("run", "--list", listed, "--json")
    assert_sentence(Outcome(outcome.code, "", outcome.err.splitlines()[-1]), 1, "2 of 4 runs failed", "--resume")
    assert len(freed) == 4
    assert alive == [[], [False], [False, False]]  # before each model is loaded, the others are gone
    assert "run 1 of 4 (/no/such/model)" in outcome.err
    one, two, three, four = summary(outcome)
    assert (one["state"], one["exit_code"], one["directory"]) == ("failed", 2, None)
    assert (two["state"], two["exit_code"], two["verified"]) == ("done", 0, True)
    assert Path(two["export"]) == Path("runs/l/demo/model")
    assert (three["state"], "RuntimeError: a bug" in three["message"], three["exit_code"]) == ("failed", True, 1)
    assert (four["state"], four["directory"], four["export"]) == ("done", "mine", None)
    for done in (two, four):
        result = Result.read(RunDirectory(Path(done["directory"])))
        assert result.baseline is not None
        assert (done["trial"], done["refusals_before"]) == (result.selected, result.baseline.refusals)
    kinds = [event["event"] for event in assert_json_lines(outcome.out)]
    assert [kind for kind in kinds if kind in ("run", "result", "failed", "summary", "error")] == [
        *("run", "failed", "run", "result", "run", "failed", "run", "result", "summary", "error"),
    ]

    # Again with --resume: what is done is skipped, another budget is not done.
    write_list(listed, [runs[1], {**runs[3], "search": {"trials": 3}}], **common)
    with monkeypatch.context() as patch:
        began: list[str] = []
        run = pipeline_run.run
        patch.setattr(
            pipeline_run, "run", lambda settings, *args, **more: began.append(settings.model) or run(settings, *args, **more)
        )
        outcome = invoke("run", "--list", listed, "--resume", "--json")
    assert outcome.code == 0, outcome
    assert [Path(model).name for model in began] == ["other"]
    assert [one["state"] for one in summary(outcome)] == ["skipped", "done"]
    assert len(json.loads(Path("mine/result.json").read_text(encoding="utf-8"))["trials"]) == 3
    # Without it, no run is overwritten; what is shown in a pipe.
    outcome = invoke("run", "--list", listed)
    assert outcome.code == 1
    table = outcome.out[outcome.out.index("Summary") :].splitlines()
    assert len(table) == 4
    assert all("already holds a run" in line for line in table[2:])


REFINED = {"refine": {"enabled": True}, "edit": {"mode": "arbitrary-rank"}}


def as_an_older_version(directory: RunDirectory, *later: str) -> None:
    """Take settings of the search out of the file that the run stored."""
    stored = read_toml(directory.settings)
    for name in later:
        del stored["search"][name]
    directory.settings.write_text(tomli_w.dumps(stored), encoding="utf-8")


def test_what_is_done_is_known_by_what_is_asked(finished: tuple[Path, dict[str, Any], Any], tmp_path: Path) -> None:
    path, result, settings = finished
    directory = RunDirectory(shutil.copytree(path, tmp_path / "run"))
    found = batch._finished(settings, directory)
    assert found is not None
    assert found.to_record() == {name: part for name, part in result.items() if name != "sha256"}
    assert batch._finished(settings.model_copy(update={"device": "cpu", "out": "elsewhere"}), directory)
    for change in (
        {"seed": 5},
        {"search": settings.search.model_copy(update={"select": "knee"})},
        {"export": settings.export.model_copy(update={"kind": "adapter"})},
    ):
        assert batch._finished(settings.model_copy(update=change), directory) is None
    refine, edit = (getattr(settings, name).model_copy(update=change) for name, change in REFINED.items())
    assert batch._finished(settings.model_copy(update={"refine": refine}), directory) is None
    as_an_older_version(directory, "kernel", "seed_from")
    directory.report.touch()
    assert batch._finished(settings, directory)
    directory.settings.write_text(dump_settings(settings.model_copy(update={"edit": edit})), encoding="utf-8")
    assert batch._finished(settings.model_copy(update={"edit": edit, "refine": refine}), directory) is None, "it has just begun"
    directory.report.touch()
    assert batch._finished(settings.model_copy(update={"edit": edit, "refine": refine}), directory)  # which it can't be
    assert batch._finished(settings, directory) is None
    directory.settings.write_text(dump_settings(settings), encoding="utf-8")
    directory.report.touch()
    done = Result.read(directory)
    trial = done.trials[0]
    learned = replace(trial, number=len(done.trials), params=RefinedParams({"m": 1.0}, "refined/0.safetensors", "0" * 64, {}))
    for change in (  # what an interrupted second session leaves
        {"export": done.export.model_copy(update={"trial": trial.number + 100})},
        {"selected": None},
        {"trials": [*done.trials[:-1], learned]},
    ):
        done.model_copy(update=change).write(directory)
        assert batch._finished(settings, directory) is None, change
    done.write(directory)
    assert batch._finished(settings, directory)
    shutil.rmtree(directory.export)
    assert batch._finished(settings, directory) is None
    directory.settings.unlink()
    assert batch._finished(settings, directory) is None
    directory.result.unlink()
    assert batch._finished(settings, directory) is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_all_with_a_summary(
    invoke: Invoke,
    tmp_path: Path,
    prompt_files: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    common = quick_options(prompt_files, tmp_path / "cache", export={"kind": "none"}, search={"trials": 4})
    runs = [{"model": "/no/such/model"}, {"model": "demo"}, {"model": "demo", "out": "never"}]
    listed = write_list(tmp_path / "l.toml", runs, **{name: part for name, part in common.items() if name != "model"})
    evaluate = stages.evaluate

    def and_signal(*args: Any) -> Any:
        trial = evaluate(*args)
        signal.raise_signal(number)
        return trial

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", and_signal)
        outcome = invoke("run", "--list", listed, "--json")
    assert_sentence(Outcome(outcome.code, "", outcome.err.splitlines()[-1]), code, "0 of 3 runs are done", "--resume")
    assert [one["state"] for one in summary(outcome)] == ["failed", "interrupted", "not begun"]
    assert (summary(outcome)[1]["exit_code"], summary(outcome)[1]["directory"]) == (code, "runs/l/demo")
    assert assert_json_lines(outcome.out)[-1]["event"] == "error"
    assert len(Result.read(RunDirectory(Path("runs/l/demo"))).trials) == 1  # what was finished is kept
    assert not (tmp_path / "never").exists()


def test_a_network_that_was_away_for_one_run_is_asked_for_again(
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there, offline = iter([False, True, False]), []

    def carry_out(*args: Any, ask: bool) -> Any:
        hub.skip_retries_without_network()
        offline.append(hub.constants.HF_HUB_OFFLINE)
        raise InputError("That's enough.")

    monkeypatch.setattr(batch, "carry_out", carry_out)
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: next(there))
    monkeypatch.setattr(hub, "_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    invoke("run", "a/b", "c/d", "e/f")
    hub.ask_again()
    assert offline == [True, False, True]


def test_nothing_is_asked_at_a_terminal(
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def carry_out(*args: Any, ask: bool) -> Any:
        asked.append(ask)
        raise InputError("That's enough.")

    monkeypatch.setattr(batch, "carry_out", carry_out)
    assert invoke("run", "demo", "a/b").code == 1
    assert asked == [False, False]
