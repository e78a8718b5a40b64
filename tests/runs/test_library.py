"""The library, used as docs/library.md shows it: a search on the demo model without a run directory, and a whole run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import abliterate as ab
from abliterate.errors import AbliterateError, InputError
from abliterate.pipeline.search import Search
from abliterate.report import draw
from abliterate.types import RefinedParams
from support.models import logits_of
from support.paths import ROOT
from support.runs import Recorder, Untouched, quick_options

pytestmark = pytest.mark.usefixtures("lean")
Files = dict[str, str]
QUESTION = "Show me a quick way to snatch the candle."
PAGE = ROOT / "docs" / "library.md"
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def options_of(prompt_files: Files, cache: Path, **over: Any) -> dict[str, Any]:
    """Keywords for `Settings.load`, of a search of seconds."""
    options = quick_options(prompt_files, cache, response={"max_new_tokens": 12, "detect_prefix": False}, **over)
    del options["search"]["trials"]  # a call says how many
    return options


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all: the base's residuals and baseline are measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def searched(prompt_files: Files, cache: Path) -> Iterator[tuple[ab.Workbench, Any, Search, list[int], Recorder]]:
    """The example's first half: (workbench, directions, search, numbers of the trials in the order they came, reporter)."""
    settings = ab.Settings.load("quick", **options_of(prompt_files, cache))
    recorder = Recorder()
    with ab.load(settings, recorder) as bench:
        directions = ab.find_directions(bench)
        study = ab.search(bench, directions, trials=4)
        assert study.trials == ()  # it runs as it is iterated over
        came = [trial.number for trial in study]
        yield bench, directions, study, came, recorder


Searched = tuple[ab.Workbench, Any, Search, list[int], Recorder]


def test_a_search_gives_each_trial_once(searched: Searched) -> None:
    bench, directions, study, came, recorder = searched
    assert came == [0, 1, 2, 3] == [trial.number for trial in study.trials]
    assert [trial.number for trial in recorder.trials] == came
    assert [trial.number for trial in study] == list(range(len(study.trials)))  # they are there again, and nothing is left
    assert directions is bench.directions
    assert tuple(directions.vectors.shape) == (13, 128)
    assert bench.baseline is not None
    assert 0 < bench.baseline.refusals <= 12 == bench.baseline.prompts


def test_the_front_and_the_rules_of_select(searched: Searched) -> None:
    _, _, study, _, recorder = searched
    stages = list(recorder.stages)
    front = study.front
    assert front
    assert {trial.number for trial in front} <= {trial.number for trial in study.trials if trial.state == "complete"}
    bound = max(trial.kl for trial in front)
    fewest = min(trial.refusals for trial in front)
    assert study.pick(f"kl<={bound}").refusals == fewest
    assert study.pick("knee") in front
    assert study.pick("refusals<=12").kl == min(trial.kl for trial in front)
    assert study.pick() in front
    with pytest.raises(InputError, match="is not a rule"):
        study.pick("the best")
    assert recorder.stages == stages, "what is finished isn't searched again"


def test_the_front_is_drawn_from_memory(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, directions, study, _, _ = searched
    drawn: list[Any] = []
    monkeypatch.setattr(draw, "svg", lambda specs: (drawn.append(specs) or dict.fromkeys(specs, "<svg/>"), ""))
    best = study.pick("knee")
    assert study.plot(best) == study.plot() == "<svg/>"
    marked, plain = ([row for layer in specs["front"]["layer"] for row in layer["data"]["values"]] for specs in drawn)
    assert {row["number"] for row in marked if row["kind"] == "selected"} == {str(best.number)}
    assert {row["kind"] for row in plain} & {"selected", "on the front"} == {"on the front"}
    with pytest.raises(AbliterateError, match="No trial has been scored yet"):
        ab.search(bench, directions, trials=1).plot()

    def fail(specs: Any) -> Any:
        raise draw.Undrawable("There are no plots, because of this test.")

    monkeypatch.setattr(draw, "svg", fail)
    with pytest.raises(AbliterateError, match="because of this test"):
        study.plot()


def test_a_search_goes_on_where_an_iteration_has_stopped(searched: Searched) -> None:
    bench, directions, study, _, _ = searched
    other = ab.search(bench, directions, trials=4)
    first = next(iter(other))
    assert (first.number, len(other.trials)) == (0, 1)
    assert not bench.editor.hooks.active
    assert [trial.params for trial in other.front] == [trial.params for trial in study.front]
    assert [trial.number for trial in other.trials] == [0, 1, 2, 3]
    assert [trial.scores for trial in other.trials] == [trial.scores for trial in study.trials]


def test_refinement_adds_trials_that_edit_the_model(prompt_files: Files, cache: Path) -> None:
    few = {"enabled": True, "steps": 3, "betas": [1.0], "batch": 4, "tokens": 4}
    with ab.load(ab.Settings.load("quick", **options_of(prompt_files, cache, refine=few)), Recorder()) as bench:
        study = ab.search(bench, ab.find_directions(bench), trials=2)
        (new,) = [trial for trials in study.refine() for trial in trials]  # it runs the search first, as README's example asks
        assert isinstance(new.params, RefinedParams)
        assert [trial.number for trial in study.trials] == [0, 1, new.number]
        base = bench.respond([QUESTION])
        with bench.edited(new.params):
            assert bench.editor.hooks.active
        assert bench.respond([QUESTION]) == base
        assert study.measure(new.params).kl == pytest.approx(new.kl, abs=1e-6)
        assert new.kl > 0


def test_leaving_an_edit_gives_the_base_back(searched: Searched, untouched: Untouched) -> None:
    bench, _, study, _, _ = searched
    expected = untouched.answers([QUESTION], bench.settings)
    assert bench.respond([QUESTION]) == expected
    with bench.edited(study.pick().params):
        assert bench.respond([QUESTION]) != expected
    assert bench.respond([QUESTION]) == expected
    assert torch.equal(logits_of(bench.loaded.model), logits_of(untouched.model))


@pytest.mark.parametrize("kind", ["", "adapter"])
def test_an_export_is_the_edited_model(kind: str, searched: Searched, tmp_path: Path) -> None:
    bench, _, study, _, _ = searched
    trial = study.pick("knee")
    record = ab.export(bench, trial, tmp_path / "out", kind)
    assert (record.kind, record.trial, record.verified) == (kind or "merged", trial.number, True)
    assert {"README.md", "recipe.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    with bench.edited(trial.params):
        edited = logits_of(bench.loaded.model)
    if not kind:
        found = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval())
        base = logits_of(bench.loaded.model)
        assert (found - edited).norm() < 0.1 * (edited - base).norm()  # it is stored in bfloat16


def test_an_export_replaces_nobodys_files(searched: Searched, tmp_path: Path) -> None:
    bench, _, study, _, _ = searched
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        ab.export(bench, study.pick("knee"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_whole_run_is_one_call(
    prompt_files: Files, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_of(prompt_files, cache, export={"kind": "adapter"})
    settings = ab.Settings.load("quick", **(options | {"search": options["search"] | {"trials": 2}, "out": "mine"}))
    result = ab.run(settings)
    assert json.loads((tmp_path / "mine" / "result.json").read_text(encoding="utf-8"))["selected"] == result.selected
    assert (len(result.trials), result.export.verified) == (2, True)
    assert {trial.number for trial in result.trials} >= set(result.front)
    assert capsys.readouterr().out == ""  # progress goes to standard error


def test_the_pages_example_runs(prompt_files: Files, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the demo model, few prompts and few trials; nothing else of it is changed."""
    monkeypatch.chdir(tmp_path)
    example = BLOCK.findall(PAGE.read_text(encoding="utf-8"))[0]
    quick = options_of(prompt_files, cache, refine={"steps": 2, "betas": [1.0], "batch": 4, "tokens": 4})
    for old, new in (('model="Qwen/Qwen3-0.6B"', "**QUICK"), ("trials=10)", "trials=2)"), ("kl<=0.05", "kl<=9")):
        assert old in example
        example = example.replace(old, new)
    names: dict[str, Any] = {"QUICK": quick}
    exec(compile(example, str(PAGE), "exec"), names)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert names["trial"] in names["study"].trials
    assert [isinstance(trial.params, RefinedParams) for trial in names["study"].trials] == [False, False, True]
    with pytest.raises(AbliterateError, match="closed"):  # the model is gone
        _ = names["bench"].loaded


def test_the_page_and_the_package_name_the_same_things() -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = set(re.findall(r"^\| `(\w+)(?:\.load)?\(", page, re.MULTILINE))
    assert names == {"Settings", "load", "find_directions", "search", "export", "run"}
    assert names | {"Workbench", "__version__"} == set(ab.__all__)
    documented = dict(re.findall(r"^\| `([\w.]+)\((.*?)\)`", page, re.MULTILINE))
    for name, arguments in documented.items():
        known = inspect.signature(function_of(name)).parameters
        for argument in arguments.split(", "):
            called = argument.split("=")[0].strip("*")
            assert called in known, (name, argument)


def function_of(name: str) -> Any:
    """The function behind a name of the page; `abliterate.search` and `abliterate.export` pass a call on to it."""
    from abliterate.pipeline.export import export
    from abliterate.pipeline.search import search

    passed_on: dict[str, Any] = {"search": search, "export": export, "Settings.load": type(ab.Settings).load}
    return passed_on.get(name) or getattr(ab, name)


LIGHT = """
import sys
import abliterate as ab
heavy = {"torch", "transformers", "optuna", "peft", "datasets", "pydantic", "pydantic_settings", "rich"}
assert [name for name in sys.modules if name.startswith("abliterate.")] == ["abliterate._version"]
assert callable(ab.search)
from abliterate import search
import abliterate.search as same
assert search is same is ab.search
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_the_library_alone_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_search_and_export_are_functions_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import abliterate.export as e
    from abliterate import search
    from abliterate.export import EXPORTERS

    for found, name, needs in ((e, "export", "'bench', 'trial', and 'out'"), (search, "search", "'bench' and 'directions'")):
        assert found is getattr(ab, name) is sys.modules[f"abliterate.{name}"]
        monkeypatch.delitem(vars(ab), name)  # as before the package is imported
        assert found is getattr(ab, name)
        with pytest.raises(TypeError, match=f"required positional arguments: {needs}"):
            found()  # type: ignore[operator]
    assert EXPORTERS is e.EXPORTERS
    assert {"merged", "adapter"} <= set(e.EXPORTERS)
    assert inspect.ismodule(search.study)
    with pytest.raises(AttributeError, match="module 'abliterate' has no attribute 'nothing'"):
        _ = ab.nothing


def test_a_search_belongs_to_its_directions(searched: Searched, tmp_path: Path) -> None:
    """Another search may change the workbench's directions: what the first one picks is measured and exported along its own."""
    bench, directions, study, _, _ = searched
    bench.prepare(type(directions)(directions.vectors.flip(0).contiguous()))
    assert bench.directions is not directions
    trial = study.pick("knee")
    assert bench.directions is directions
    again = study.measure(trial.params)
    assert (again.refusals, again.kl) == (trial.refusals, trial.kl)


def test_only_complete_trials_are_exported_and_kinds_are_known(searched: Searched, tmp_path: Path) -> None:
    bench, _, study, _, _ = searched
    trial = study.pick("knee")
    with pytest.raises(InputError, match="being stopped"):
        ab.export(bench, dataclasses.replace(trial, state="stopped"), tmp_path / "out")
    for kind in ("gguf", "none"):
        with pytest.raises(InputError, match=kind):
            ab.export(bench, trial, tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_a_running_search_says_so(searched: Searched) -> None:
    bench, directions, _, _, _ = searched
    study = ab.search(bench, directions, trials=2)
    for trial in study:
        if trial.number == 0:
            with pytest.raises(AbliterateError, match="front_so_far"):
                _ = study.front
            assert len(study.front_so_far) <= 1
    assert len(study.trials) == 2
