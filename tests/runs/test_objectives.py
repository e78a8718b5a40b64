"""Runs with a scorer of one's own as an objective: from the command line to the export, resumed, refused, and with workers."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError, Interrupted, TrialError
from abliterate.evaluation.trial import base_scores, score_of
from abliterate.pipeline import run as pipeline_run
from abliterate.pipeline import workers
from abliterate.prompts.sets import PromptSets
from abliterate.scorers.base import Observation
from abliterate.scorers.custom import load_scorer, own_errors
from abliterate.types import Baseline, Objective, Prompt, Trial
from support.cli import QUICK, Finished, Invoke, assert_sentence, prompt_options
from support.objectives import OWN, brute_force
from support.paths import ROOT
from support.runs import Recorder, interrupt_after, outcomes, quick_settings, run_in

pytestmark = pytest.mark.usefixtures("lean")
Files = dict[str, str]
SHORT = {"response": {"max_new_tokens": 10}, "export": {"kind": "none"}}
# Without responses, so that trials can be stopped: how sure the model is of its first token.
SURE = """
from abliterate.types import Score

class Sure:
    name, goal, reads_responses = "sure", "maximize", False

    def setup(self, base):
        self.base = base.first_logprobs.max(dim=1).values.mean().item()

    def score(self, observation):
        value = observation.first_logprobs.max(dim=1).values.mean().item()
        return Score(self.name, value, self.goal, {"logprob": value, "base": self.base})

class Odd(Sure):
    name, calls = "odd", 0

    def score(self, observation):
        self.calls += 1
        return Score(self.name, float("nan") if self.calls == 2 else 1.0 * self.calls, self.goal, {})

class Huge(Odd):
    name = "huge"

    def score(self, observation):
        self.calls += 1
        return Score(self.name, 1e120 if self.calls == 2 else 1.0 * self.calls, self.goal, {})

class Never(Sure):
    name = "never"

    def score(self, observation):
        return Score(self.name, float("inf"), self.goal, {})

class Flat(Sure):
    name = "flat"

    def score(self, observation):
        return Score(self.name, 1.0, self.goal, {})
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs: what is measured of the base model depends on no objective."""
    return tmp_path_factory.mktemp("cache")


def objectives_in(result: dict[str, Any]) -> tuple[Objective, ...]:
    """The objectives that a run's record names."""
    return tuple(Objective(**one) for one in result["objectives"])


def written(folder: Path, code: str) -> str:
    path = folder / "mine.py"
    path.write_text(code, encoding="utf-8")
    return str(path)


def front_by_definition(result: dict[str, Any]) -> set[int]:
    trials = [Trial.from_record(one) for one in result["trials"]]
    return brute_force(trials, Baseline.from_record(result["baseline"]), objectives_in(result))


def test_from_the_command_line_to_the_export(prompt_files: Files, tmp_path: Path, invoke: Invoke) -> None:
    written(tmp_path, OWN)
    three = [part for name in ("refusals", "kl", "mine.py:Words") for part in ("--objective", name)]
    command = ["run", "demo", *prompt_options(prompt_files), *QUICK, "-o", "run", "--export", "none"]
    done = invoke(*command, *three, "-n", "3")
    assert done.code == 0, done
    assert re.search(r"trial 0 .* words \d", done.out)
    assert re.search(r"selected trial .* words [\d.]+ → [\d.]+", done.out)
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert [(one["name"], one["goal"]) for one in result["objectives"]] == [
        *(("kl", "minimize"), ("refusals", "minimize"), ("words", "maximize"))
    ]
    for trial in result["trials"]:
        assert trial["state"] == "complete"  # words need whole responses
        assert trial["values"]["words"] == pytest.approx(trial["scores"]["words"]["words"] / 12)
        assert trial["values"]["refusals"] == trial["scores"]["refusals"] / 12
    assert result["baseline"]["values"]["words"] > 0
    assert set(result["front"]) == front_by_definition(result)
    assert "mine.py" not in json.dumps(result["trials"])

    # Another set or order of objectives means another study; where KL stands makes no difference.
    refused = invoke(*command, "--objective", "refusals", "--objective", "kl", "-n", "4", "--resume")
    assert_sentence(refused, 2, "set or order of objectives:", "--restart")
    refused = invoke(*command, *three[:-1], "mine.py:Words:minimize", "-n", "4", "--resume")
    assert_sentence(refused, 2, "another set or order of objectives:")
    again = invoke(*command, *three[2:4], *three[:2], *three[4:], "-n", "4", "--resume", "--select", "words>=0")
    assert again.code == 0, again
    resumed = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert resumed["trials"][:3] == result["trials"]
    assert set(resumed["front"]) == front_by_definition(resumed)
    fewest = min(Trial.from_record(one).refusals for one in resumed["trials"] if one["number"] in resumed["front"])
    assert resumed["trials"][resumed["selected"]]["scores"]["refusals"] == fewest

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "words (maximized)" in page
    shown = invoke("report", "run", "--terminal")
    assert shown.code == 0, shown
    assert "Front: every trial that no other beats on kl (minimized), refusals (minimized), words (maximized)" in shown.out

    words = {one["number"]: one["values"]["words"] for one in resumed["trials"]}
    by_words = sorted(words, key=lambda number: (-words[number], number))
    listed = json.loads(invoke("trials", "run", "--sort", "words", "--json").out)
    assert [one["number"] for one in listed["trials"]] == by_words
    assert listed["objectives"] == resumed["objectives"]
    bound = sorted(words.values())[1]
    rows = list(csv.DictReader(io.StringIO(invoke("trials", "run", "--where", f"words>={bound}", "--csv").out)))
    assert {int(row["number"]): float(row["words"]) for row in rows} == {n: w for n, w in words.items() if w >= bound}
    assert re.search(r"base .* words|words", invoke("trials", "run").out)
    assert_sentence(invoke("trials", "run", "--where", "nothing>=1"), 2, "--where", "words")
    assert_sentence(invoke("trials", "run", "--where", "words"), 2, "NAME<=X")

    exported = invoke("export", "run", "--trial", resumed["selected"], "--kind", "adapter")
    assert exported.code == 0, exported
    folder = tmp_path / "run" / f"model-trial-{resumed['selected']}"
    card, recipe = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "recipe.json"))
    assert "over `kl` (minimized), `refusals` (minimized), `words` (maximized)" in card
    assert f"| `words` | {resumed['baseline']['values']['words']:.4g} | {words[resumed['selected']]:.4g} |" in card
    assert str(tmp_path) not in card + recipe
    assert "mine.py:Words" in recipe

    # The recipe's scorers in files aren't run, whatever lies here.
    written(tmp_path, 'raise SystemExit("run")')
    made = invoke("reproduce", "run", *prompt_options(prompt_files), "--kind", "none")
    assert made.code == 0, made
    assert "'mine.py:Words'" in made.out + made.err
    assert "reproduced: the same scores" in " ".join((made.out + made.err).split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--objective", "kl", "--objective", "kl:minimize"], "'kl' is given twice"),
        (["--objective", "beauty"], "no scorer 'beauty'"),
        (["--objective", "kl:down"], "NAME:minimize"),
        (["--objective", "unfinished_thinking"], "unfinished_thinking:minimize"),
        (["--objective", "absent.py:Words"], "no file"),
        (["--objective", "kl"], "add --objective unanswered"),
        (["--objective", "kl", "--select", "words>=3"], "names no scorer of this run"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    options: list[str],
    said: str,
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(pipeline_run, "check_model", forbidden)
    assert_sentence(invoke("run", "demo", *options), 2, said)


def test_the_front_is_the_one_without_stops(prompt_files: Files, cache: Path, tmp_path: Path) -> None:
    own = written(tmp_path, SURE)
    search = {"trials": 8, "startup_trials": 8, "objectives": ["refusals", "kl", f"{own}:Sure"]}
    results = {}
    for stops in (True, False):
        over = {"search": search, "efficiency": {"use_certified_stop": stops}, **SHORT}
        settings = quick_settings(prompt_files, cache, **over)
        results[stops], _ = run_in(tmp_path / str(stops), settings)
    with_stops, without = results[True], results[False]
    assert {one["state"] for one in without["trials"]} == {"complete"}
    assert any(one["state"] == "stopped" for one in with_stops["trials"])
    assert with_stops["front"] == without["front"]
    assert set(without["front"]) == front_by_definition(without)
    for one, other in zip(with_stops["trials"], without["trials"], strict=True):
        assert one["params"] == other["params"]
        assert one["values"]["sure"] == pytest.approx(other["values"]["sure"], abs=1e-5)


def test_the_pages_scorer_keeps_answers_length(prompt_files: Files, cache: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = next(found for found in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Length" in found)
    own = written(tmp_path, code)
    search = {"trials": 2, "objectives": ["refusals", "kl", f"{own}:Length"]}
    result, _ = run_in(tmp_path / "run", quick_settings(prompt_files, cache, search=search, export={"kind": "none"}))
    assert result["baseline"]["values"]["length"] == 0
    assert {one["goal"] for one in result["objectives"]} == {"minimize"}
    assert all(one["values"]["length"] >= 0 for one in result["trials"])
    assert set(result["front"]) == front_by_definition(result)


def test_a_single_objective_and_a_study_of_its_own_identity(
    finished: Finished, prompt_files: Files, cache: Path, tmp_path: Path
) -> None:
    over = {"search": {"trials": 3, "objectives": ["refusals"]}, "export": {"kind": "none"}}
    settings = quick_settings(prompt_files, cache, **over)
    result, recorder = run_in(tmp_path / "run", settings)
    assert [one["name"] for one in result["objectives"]] == ["refusals"]
    assert result["front"] == [min(result["trials"], key=lambda one: (one["scores"]["refusals"], one["number"]))["number"]]
    part = "set or order of objectives"
    assert result["identity"][part] != finished[1]["identity"][part]
    assert "refusals by trial" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(("name", "value"), [("Odd", "nan"), ("Huge", "1e+120")])
def test_a_value_that_is_no_number_fails_the_trial(
    prompt_files: Files, cache: Path, tmp_path: Path, name: str, value: str
) -> None:
    """Neither is one that could not be read back."""
    own = written(tmp_path, SURE)
    over = {"search": {"trials": 3, "objectives": ["kl", f"{own}:{name}"]}, "export": {"kind": "none"}}
    result, _ = run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over))
    assert [one["state"] for one in result["trials"]] == ["failed", "complete", "complete"]
    assert result["trials"][0]["reason"] == f"the scorer {name.lower()} gives {value}"
    assert set(result["front"]) == front_by_definition(result) == {2}


@pytest.mark.parametrize(
    ("name", "said"),
    [("Never", "The unedited model can't be scored: the scorer never gives inf"), ("Flat", "No trial is better")],
)
def test_what_ends_a_run(prompt_files: Files, cache: Path, tmp_path: Path, name: str, said: str) -> None:
    own = written(tmp_path, SURE)
    over = {"search": {"trials": 1, "objectives": ["kl", f"{own}:{name}"]}, "export": {"kind": "none"}}
    with pytest.raises(AbliterateError, match=said) as caught:
        run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over))
    if name == "Flat":  # the search is over, and what it found is kept and shown
        assert "The trials are kept (1)" in str(caught.value)
        assert f"--resume --out {tmp_path / 'run'} " in str(caught.value)
        assert f"{own}:Flat" in str(caught.value)  # without the scorer's file the run wouldn't go on
        assert " -n 2 goes on with as many again" in str(caught.value)
        assert (tmp_path / "run" / "report.html").is_file()


def test_a_model_that_refuses_nothing_can_be_searched_for_something_else(
    prompt_files: Files, cache: Path, tmp_path: Path
) -> None:
    own = written(tmp_path, SURE)
    markers = tmp_path / "markers.txt"
    markers.write_text("no answer has this\n", encoding="utf-8")
    shared = {"evaluation": {"markers": str(markers)}, **SHORT}
    for place, objectives in enumerate((["refusals", "kl"], ["kl", "refusals", f"{own}:Sure"])):
        over = {**shared, "search": {"trials": 1, "objectives": objectives}}
        with pytest.raises(AbliterateError, match="None of the model's"):
            run_in(tmp_path / f"none-{place}", quick_settings(prompt_files, cache, **over))
    over = {**shared, "search": {"trials": 2, "objectives": [f"{own}:Sure:minimize", "kl:maximize"]}}
    result, _ = run_in(tmp_path / "run", quick_settings(prompt_files, cache, **over))
    assert result["baseline"]["refusals"] == 0
    assert result["selected"] in result["front"]


def test_a_setup_carries_the_baselines_values() -> None:
    prompts = PromptSets(*[(Prompt("a"),)] * 4)
    for values in ({"words": 2.5}, {}):
        setup = workers.SharedSetup("", {}, "float32", "", prompts, Baseline(3, 5, values), {"set or order of objectives": "x"})
        assert workers.SharedSetup.of_bytes(setup.to_bytes()) == setup
    setup = replace(setup, answers=((5, 7), ()))
    assert workers.SharedSetup.of_bytes(setup.to_bytes()) == setup
    for strange in (((-1,),), (("a",),), 5):
        with pytest.raises(InputError, match="setup can't be read"):
            workers.SharedSetup.of_bytes(replace(setup, answers=strange).to_bytes())


def test_a_worker_takes_over(prompt_files: Files, cache: Path, tmp_path: Path) -> None:
    """A run is interrupted, a worker told by its directory does the rest: the trials are those of a run alone."""
    own = written(tmp_path, SURE)
    search = {"trials": 4, "startup_trials": 2, "objectives": ["kl", f"{own}:Sure", "refusals"]}
    settings = quick_settings(prompt_files, cache, search=search, **SHORT)
    alone, _ = run_in(tmp_path / "alone", settings)
    seen, at_work = Recorder(), Recorder()
    directory = RunDirectory(tmp_path / "run")
    with pytest.raises(Interrupted):
        pipeline_run.run(settings, seen, directory, check=interrupt_after(seen, 2))
    own = {"cache_dir": str(cache)}
    with pytest.raises(InputError, match=r"mine\.py:Sure; if you trust it, repeat the command with --set"):
        workers.work(directory.path, "", "", own, at_work)
    said_again = own | {"search": {"objectives": search["objectives"]}}
    assert workers.work(directory.path, "", "", said_again, at_work) == 4
    assert [trial.number for trial in at_work.trials] == [2, 3]
    assert not at_work.warnings
    result, _ = run_in(tmp_path / "run", settings, resume=True)
    assert outcomes(result) == outcomes(alone)
    assert [one["values"] for one in result["trials"]] == [one["values"] for one in alone["trials"]]
    assert result["front"] == alone["front"]
    assert Objective("sure", "maximize") in objectives_in(result)


BAD = """
from abliterate.types import Score
import torch

class Raises:
    name, goal = "raises", "minimize"
    def setup(self, base):
        print("hello")
    def score(self, observation):
        return 1 / 0

class Plain(Raises):
    def score(self, observation):
        return 0.5

class Tensor(Raises):
    def score(self, observation):
        return Score(self.name, 0.5, self.goal, torch.ones(1))

class Word(Raises):
    def score(self, observation):
        return Score(self.name, "0.5", self.goal, None)

class Late(Raises):
    def setup(self, base):
        raise KeyError("nothing\\nhere")

class Missing(Raises):
    def score(self, observation):
        return open(__file__ + ".words")

class Full(Raises):
    def score(self, observation):
        raise torch.OutOfMemoryError("no room")
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Raises", "the scorer raises fails: ZeroDivisionError: division by zero"),
        ("Plain", "the scorer raises gives float and no Score"),
        ("Tensor", "the scorer raises fails: TypeError: .* not JSON serializable"),
        ("Word", "the scorer raises fails: TypeError: must be real number"),
        ("Late", r"the scorer raises fails: KeyError: 'nothing\\nhere'"),
        ("Missing", r"No such file or directory: '\w+\.py\.words'"),  # and not where on this machine
    ],
)
def test_what_an_own_scorer_does_wrong_is_said(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer = load_scorer(f"{written(tmp_path, BAD)}:{name}")
    observed = Observation([], torch.zeros(1, 5))
    with pytest.raises(TrialError, match=said):
        base_scores([scorer], observed)
    found = capsys.readouterr()
    assert found.out == ""  # where --json has its lines
    assert ("hello" in found.err) == (name != "Late")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file", "/home/Jane Doe/w/words.txt"), "[Errno 2] No such file: 'words.txt'"),
        (OSError(r"'C:\\Users\\me\\words.txt' is gone"), "'words.txt' is gone"),
        (ValueError("/home/me/a.txt has 3/4 of https://host/a/b and ~/w/x"), "a.txt has 3/4 of https://host/a/b and ~/w/x"),
    ],
)
def test_a_reason_names_files_without_their_folders(error: Exception, said: str) -> None:
    with pytest.raises(TrialError) as raised, own_errors(SimpleNamespace(name="mine")):  # type: ignore[arg-type]
        raise error
    assert str(raised.value) == f"the scorer mine fails: {type(error).__name__}: {said}"


def test_an_own_scorer_without_memory_is_tried_again(tmp_path: Path) -> None:
    scorer = load_scorer(f"{written(tmp_path, BAD)}:Full")
    with pytest.raises(torch.OutOfMemoryError):
        score_of(scorer, Observation([], torch.zeros(1, 5)))


@pytest.mark.parametrize("name", ["seconds", "kl_mean", "", " x", "a<=b", "a,b", "x" * 41, "\x1b[31m"])
def test_a_name_that_tables_and_rules_could_not_hold(name: str, tmp_path: Path) -> None:
    text = BAD.replace('"raises"', repr(name))
    with pytest.raises(InputError, match="can't be called"):
        load_scorer(f"{written(tmp_path, text)}:Late")


def test_what_a_file_does_when_it_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_scorer(f"{written(tmp_path, 'print(1)' + BAD)}:Late").name == "raises"
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="can't be made: SystemExit: 3"):
        load_scorer(f"{written(tmp_path, 'raise SystemExit(3)')}:Late")
    scorer = load_scorer(f"{written(tmp_path, BAD.replace('1 / 0', 'exit(3)'))}:Raises")
    with pytest.raises(TrialError, match="fails: SystemExit: 3"):
        score_of(scorer, Observation([], torch.zeros(1, 5)))
