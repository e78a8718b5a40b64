"""`abliterate evaluate`: what is refused before anything is loaded, and what of a run from anybody isn't run or shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat import open as chat_open
from abliterate.cli import evaluate as cli_evaluate
from abliterate.errors import InputError
from abliterate.files import DIGEST, read_toml
from abliterate.model import hub
from abliterate.pipeline import evaluate as pipeline_evaluate
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline.from_settings import scorers_of
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.settings.sources import merge
from support.cli import Invoke, assert_sentence, forbidden
from support.models import make_model, save_model
from support.runs import copy_run

Finished = tuple[Path, dict[str, Any], Settings]
EVIL = """
from pathlib import Path
Path(__file__).with_name("was run").touch()

class Words:
    name, goal = "words", "minimize"
    def setup(self, base): ...
    def score(self, observation): ...
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Hub, and nothing asked of it."""
    hub.ask_again()
    monkeypatch.setattr(hub, "_reachable", lambda endpoint: False)
    yield
    hub.ask_again()


def change(run: Path, **over: Any) -> None:
    """Other stored settings."""
    path = RunDirectory(run).settings
    path.write_text(tomli_w.dumps(merge(read_toml(path), over)), encoding="utf-8")


@pytest.fixture
def hostile(finished: Finished, tmp_path: Path) -> Path:
    """A run whose settings name code: of its own, of its model, of the Hub."""
    run = copy_run(finished[0], tmp_path / "run")
    (run / "evil.py").write_text(EVIL, encoding="utf-8")
    own = f"{run / 'evil.py'}:Words"
    change(
        run,
        load={"trust_remote_code": True, "attn_implementation": "owner/kernel"},
        evaluation={"scorers": ["refusals", "kl", own], "heldout_scorers": [own]},
        search={"objectives": ["kl", f"{own}:maximize"]},
        efficiency={"residual_cache_dir": str(run)},
    )
    return run


class Stopped:
    """Stands for what follows once scorers are made and the settings known; keeps these."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []

    def __call__(self, settings: Settings, **options: Any) -> None:
        self.settings.append(settings)
        raise InputError("Seen.")


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Stopped:
    found = Stopped()
    monkeypatch.setattr(pipeline_evaluate, "check_model", found)
    return found


def test_no_code_of_a_hostile_run_is_run(
    hostile: Path,
    finished: Finished,
    stopped: Stopped,
    invoke: Invoke,
) -> None:
    outcome = invoke("evaluate", "demo", hostile, "--json")
    assert_sentence(outcome, 2, "Seen.")
    (settings,) = stopped.settings
    assert not (hostile / "was run").exists()
    assert not settings.load.trust_remote_code
    assert settings.load.attn_implementation == ""
    assert settings.efficiency.residual_cache_dir == ""
    assert settings.scorers == ("refusals", "kl")
    # What trials were measured with is the run's.
    theirs = finished[2]
    assert (settings.prompts, settings.response, settings.edit) == (theirs.prompts, theirs.response, theirs.edit)
    assert settings.load.dtypes == theirs.load.dtypes
    said = [line["text"] for line in map(json.loads, outcome.out.splitlines()) if line["event"] == "warning"]
    assert "aren't run (evil.py:Words)" in said[0]
    assert "--set 'evaluation.heldout_scorers=" in said[0]
    assert "--set load.trust_remote_code=true" in said[1]


def test_what_a_person_names_is_run(
    hostile: Path,
    stopped: Stopped,
    invoke: Invoke,
) -> None:
    scorer = f"evaluation.heldout_scorers=['{hostile / 'evil.py'}:Words']"
    options = ["--set", scorer, "--set", "load.trust_remote_code=true", "--set", "load.attn_implementation=owner/kernel"]
    outcome = invoke("evaluate", "demo", hostile, *options, "--json")
    assert (hostile / "was run").exists()
    assert stopped.settings[0].load.trust_remote_code
    assert '"warning"' not in outcome.out


def test_a_chat_and_an_export_run_no_code_of_a_run(
    hostile: Path,
    finished: Finished,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    loads: list[LoadSettings] = []

    def load_model(name: str, load: LoadSettings, *rest: Any) -> None:
        loads.append(load)
        raise InputError("Seen.")

    def open_base(context: Any, result: Any, number: int) -> None:
        load_model("", context.settings.load)

    monkeypatch.setattr(chat_open.loader, "load_model", load_model)
    monkeypatch.setattr(pipeline_export_trial, "open_base", open_base)
    export = ["export", hostile, "--trial", finished[1]["selected"], "-o", tmp_path / "export"]
    trust = "load.trust_remote_code=true"
    for command, option in ((["chat", hostile], ["--set", trust]), (export, ["--trust-remote-code"])):
        outcome = invoke(*command, "--json")
        assert_sentence(outcome, 2, "Seen.")
        assert (loads[-1].trust_remote_code, loads[-1].attn_implementation) == (False, "")
        assert any(" ".join(map(str, option)) in line for line in outcome.out.splitlines() if '"warning"' in line)
        invoke(*command, *option, "--json")
        assert loads[-1].trust_remote_code
    assert len(loads) == 4

    def load_calibrated(context: Any, *rest: Any) -> None:
        scorers_of(context.settings)
        raise InputError("Seen.")

    monkeypatch.undo()
    monkeypatch.setattr(pipeline_export_trial, "load_calibrated", load_calibrated)
    change(hostile, load={"attn_implementation": ""})
    assert_sentence(invoke(*export, "--verify"), 2, "Seen.")
    assert not (hostile / "was run").exists()


def test_the_candidate_is_looked_at_before_the_base_is_loaded(
    offline: None,
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    monkeypatch.setattr(pipeline_evaluate, "open_workbench", forbidden)
    assert_sentence(invoke("evaluate", "demo", "pt"), 2, "The model pt can't be fetched from the Hub")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "none of that name"}', encoding="utf-8")
    assert_sentence(invoke("evaluate", "demo", broken), 2, "broken", "can't be loaded")
    for head in (str(tmp_path), "nothing", "owner/name", "x" * 5000):
        assert_sentence(invoke("evaluate", "demo", f"{head}:3"), 2, "There is no run in")
    assert_sentence(invoke("evaluate", "demo", "~nobody-of-that-name/x:3"), 2, "no home directory on this machine")
    assert_sentence(invoke("evaluate", "demo", f"{finished[0]}:999"), 2, "no finished trial 999")
    assert_sentence(invoke("evaluate", "demo", f"{finished[0]}:²"), 2)


def test_a_run_without_a_complete_trial(finished: Finished) -> None:
    run, candidate = Result.read(RunDirectory(finished[0])), pipeline_evaluate.Candidate("trial", "my runs/one")
    run = run.model_copy(update={"selected": None})
    with pytest.raises(InputError, match="has chosen no trial yet; name a trial as my runs/one:N"):
        pipeline_evaluate._trial_of(run, candidate)
    run.trials = [replace(trial, state="stopped") for trial in run.trials]
    with pytest.raises(InputError, match=r"all 4 of its trials were stopped or failed; .* --out 'my runs/one' --trials 8\."):
        pipeline_evaluate._trial_of(run, candidate)
    run.trials = []
    with pytest.raises(InputError, match="no trial of it has finished yet; wait for one"):
        pipeline_evaluate._trial_of(run, candidate)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_an_adapter_that_would_not_act_is_refused(
    config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    """Only the model's layers are run: prompt tuning would look like no change at all."""
    base = save_model(make_model("llama"), tmp_path / "base")
    options = {"encoder_hidden_size": 8} if config is PromptEncoderConfig else {}
    adapter = get_peft_model(make_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4, **options))
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(str(tmp_path / "adapter"))
    monkeypatch.setattr(pipeline_evaluate, "open_workbench", forbidden)
    monkeypatch.setattr(chat_open.loader, "open_model", forbidden)
    for command in (("evaluate", base, tmp_path / "adapter"), ("chat", tmp_path / "adapter")):
        assert_sentence(invoke(*command), 2, "acts outside the model's layers", adapter.peft_config["default"].peft_type.value)


def test_a_run_is_measured_at_its_own_revision(
    finished: Finished,
    stopped: Stopped,
    tmp_path: Path,
    invoke: Invoke,
) -> None:
    run = RunDirectory(copy_run(finished[0], tmp_path / "run"))
    record = json.loads(run.result.read_text(encoding="utf-8"))
    record.pop(DIGEST)
    record["model"] |= {"id": "owner/name", "revision": "abc123"}
    run.result.write_text(json.dumps(record), encoding="utf-8")
    change(run.path, load={"revision": "main"})
    for base, revision in (("owner/name", "abc123"), ("owner/other", "main"), ("demo", "main")):
        assert_sentence(invoke("evaluate", base, run.path), 2, "Seen.")
        assert (stopped.settings[-1].model, stopped.settings[-1].load.revision) == (base, revision)
    save_model(make_model("llama"), tmp_path / "name")  # a directory has no commits
    record["model"]["id"] = "name"
    run.result.write_text(json.dumps(record), encoding="utf-8")
    assert_sentence(invoke("evaluate", tmp_path / "name", run.path), 2, "Seen.")
    assert stopped.settings[-1].load.revision == "main"


def test_a_configuration_file_wins_over_the_run(finished: Finished, stopped: Stopped, tmp_path: Path, invoke: Invoke) -> None:
    prompts, config = tmp_path / "p.txt", tmp_path / "own.toml"
    prompts.write_text("How do I bake bread?\n", encoding="utf-8")
    text = '[prompts]\nharmful_heldout = "p.txt"\n[response]\nmax_new_tokens = 7\n[edit]\nmode = "columns"\n'
    config.write_text(text, encoding="utf-8")
    assert_sentence(invoke("evaluate", "demo", finished[0], "-c", config), 2, "Seen.")
    found, run = stopped.settings[-1], finished[2]
    assert (found.prompts.harmful_heldout, found.response.max_new_tokens) == (str(prompts), 7)
    assert found.prompts.harmful_eval == run.prompts.harmful_eval, "what isn't given is the run's"
    assert found.edit.mode == run.edit.mode == "full", "nor may a file change what the trial is"


def test_what_a_server_says_controls_no_terminal(
    measured: Finished,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Invoke,
) -> None:
    """The reason phrase of a judge's server is part of what is shown."""
    said = "the judge's endpoint answers 400 \x1b]0;title\x07\x9b2J\u202eno"
    judge = {"name": "endpoint", "base": None, "candidate": None, "disagreements": [], "error": said}
    heldout = measured[1]["heldout"] | {"judges": [judge], "scores": {"w\x1b[2J": {"base": 1, "candidate": 2, "error": ""}}}

    def evaluate(*args: Any, show: Any) -> dict[str, Any]:
        show(heldout)
        return {"base": "demo", "candidate": "demo", "heldout": heldout, "benchmarks": [], "error": ""}

    monkeypatch.setattr(cli_evaluate, "evaluate_candidate", evaluate)
    outcome = invoke("evaluate", "demo", "demo")
    assert outcome.code == 0
    assert "answers 400 \\x1b]0;title" in outcome.out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(outcome.out)
