"""A run from anybody: no command lets its files run code, open a database or upload, unless the person says so again."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import tomli_w
from huggingface_hub import HfApi

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import app
from abliterate.cli.run import RunFlags, resolve
from abliterate.errors import InputError, Interrupted, TrialError
from abliterate.files import DIGEST, read_toml
from abliterate.model import loader
from abliterate.model.loader import demo_path
from abliterate.pipeline import local_workers, workers
from abliterate.pipeline import run as pipeline_run
from abliterate.scorers.judges import Classifier
from abliterate.search.storage import open_storage, share, shared
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.settings.sources import merge
from support.cli import Invoke, assert_sentence
from support.runs import copy_run

Finished = tuple[Path, dict[str, Any], Settings]
MARK = "from pathlib import Path\nPath({ran!r}).touch()\n"
SCORER = (
    'class Words:\n    name, goal = "words", "minimize"\n    def setup(self, base): ...\n    def score(self, observed): ...\n'
)
REPO = "me/stolen"


class Watched:
    """What a hostile run would like to do, and whether it was done."""

    def __init__(self, folder: Path) -> None:
        self.ran, self.database = folder / "ran", folder / "elsewhere.db"
        self.calls: list[str] = []

    def note(self, what: str) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            self.calls.append(f"{what} {args[1:]}")
            raise OSError("refused by the test")

        return called

    def assert_nothing(self) -> None:
        assert not self.ran.exists()
        assert not self.database.exists()
        assert self.calls == []


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_the_persons_own")
    for name in ("create_repo", "upload_folder", "upload_file"):
        monkeypatch.setattr(HfApi, name, found.note(name))
    monkeypatch.setattr(socket.socket, "connect", found.note("connect"))
    monkeypatch.setattr("builtins.input", found.note("asked"))
    return found


def change(run: Path, **over: Any) -> None:
    path = RunDirectory(run).settings
    path.write_text(tomli_w.dumps(merge(read_toml(path), over)), encoding="utf-8")


def change_result(run: Path, **over: Any) -> None:
    path = RunDirectory(run).result
    record = merge(json.loads(path.read_text(encoding="utf-8")), over)
    record.pop(DIGEST, None)
    path.write_text(json.dumps(record), encoding="utf-8")


def with_own_code(source: Path, to: Path, ran: Path) -> Path:
    """A copy of a model whose files all name code."""
    copy_run(source, to)
    code = MARK.format(ran=str(ran))
    (to / "custom_generate").mkdir()
    for name in ("code.py", "custom_generate/generate.py"):
        (to / name).write_text(code, encoding="utf-8")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"), "code.Own")
    for name, auto in (("config.json", names), ("tokenizer_config.json", {"AutoTokenizer": ["code.Own", "code.Own"]})):
        path = to / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"auto_map": auto}), encoding="utf-8")
    return to


@pytest.fixture
def hostile(finished: Finished, watched: Watched, tmp_path: Path) -> Path:
    """A run that names code of its own, of its model and of the Hub, a database elsewhere, and an upload."""
    run = copy_run(finished[0], tmp_path / "a run")
    base = with_own_code(demo_path() / "model", run / "base", watched.ran)
    (run / "evil.py").write_text(MARK.format(ran=str(watched.ran)) + SCORER, encoding="utf-8")
    own = f"{run / 'evil.py'}:Words"
    change(
        run,
        model=str(base),
        load={"trust_remote_code": True, "attn_implementation": "owner/kernel"},
        evaluation={"scorers": ["refusals", "kl", own], "heldout_scorers": [own]},
        search={"objectives": ["kl", f"{own}:maximize"], "storage": f"sqlite:///{watched.database}"},
        export={"kind": "adapter", "push": REPO, "push_private": False},
    )
    (run / "study.name").write_text("abliterate-run-0123456789ab\n", encoding="utf-8")
    config = loader.load_config(str(base), LoadSettings())
    change_result(run, model={"fingerprint": loader.fingerprint(str(base), config)})
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    recipe["settings"].setdefault("load", {})["trust_remote_code"] = True
    recipe["settings"].setdefault("evaluation", {})["scorers"] = ["kl", "evil.py:Words"]
    recipe.pop("sha256", None)
    (run / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    # Modules that Python would import where it looks in the current folder.
    for name in ("torch.py", "abliterate.py", "vl_convert.py", "sitecustomize.py"):
        (run / name).write_text(MARK.format(ran=str(watched.ran)), encoding="utf-8")
    return run


def command_lines(run: Path, files: dict[str, str]) -> dict[str, list[tuple[int, list[object]]]]:
    """{command: [(exit code, its arguments)]} for every command that is given a directory."""
    held = [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]
    listed = run.parent / "list.toml"
    listed.write_text(tomli_w.dumps({"run": [{"model": "demo", "out": str(run)}]}), encoding="utf-8")
    chosen = Result.read(RunDirectory(run)).selected
    other = run.parent / "other"
    other.mkdir(exist_ok=True)
    for name in ("result.json", "settings.toml"):
        shutil.copy(run / name, other)
    return {
        "run": [
            (2, ["run", "--resume", "-o", run]),
            (2, ["run", "demo", "--resume", "-o", run, "--gpus", "2", "-n", "9"]),
            (1, ["run", "--list", listed, "--resume"]),
        ],
        "worker": [(2, ["worker", run])],
        "export": [(0, ["export", run, "--trial", chosen, "--kind", "adapter", "-o", run.parent / "export"])],
        "evaluate": [(0, ["evaluate", run / "base", run, *held])],
        "chat": [(0, ["chat", run, "--max-new-tokens", "2"]), (0, ["chat", run / "base", "--max-new-tokens", "2"])],
        "reproduce": [(2, ["reproduce", run, "-o", run.parent / "made"])],
        "report": [(0, ["report", run])],
        "trials": [(0, ["trials", run])],
        "compare": [(0, ["compare", run, other, "-o", run.parent / "compare.html"])],
        "inspect": [(0, ["inspect", run / "base", "--no-weights"])],
        "tune-batch": [(2, ["tune-batch", run])],
    }


COMMANDS = ("run", "worker", "export", "evaluate", "chat", "reproduce", "report", "trials", "compare", "inspect", "tune-batch")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_lets_a_hostile_run_act(
    command: str,
    hostile: Path,
    watched: Watched,
    heldout_files: dict[str, str],
    invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = command_lines(hostile, heldout_files)
    known = {each.name or each.callback.__name__.replace("_", "-") for each in app.app.registered_commands if each.callback}
    assert known - {"doctor"} == {*lines} == {*COMMANDS}  # doctor is given no directory
    monkeypatch.chdir(hostile)
    before = {path: path.read_bytes() for path in hostile.rglob("*") if path.is_file() and path.name != "report.html"}
    for code, arguments in lines[command]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        outcome = invoke(*arguments)
        watched.assert_nothing()
        assert outcome.code == code, outcome
        assert "unexpected" not in outcome.err
        assert "Traceback" not in outcome.err
        if command == "run":
            said = " ".join((outcome.err + outcome.out).split())
            assert "asks for what only you may allow" in said
            for part in (
                "evil.py:Words",
                "owner/kernel",
                "load.trust_remote_code=true",
                f"--push {REPO}",
                "--storage sqlite:///",
            ):
                assert part in said
    assert before == {path: path.read_bytes() for path in before}


def test_the_newest_run_of_a_model_is_a_strangers_too(hostile: Path, watched: Watched, invoke: Invoke, tmp_path: Path) -> None:
    copy_run(hostile, tmp_path / "runs" / "demo-20260101-000000")
    change(tmp_path / "runs" / "demo-20260101-000000", model="demo")
    outcome = invoke("run", "demo", "--resume")
    assert_sentence(outcome, 2, "The run in runs/demo-20260101-000000 asks for what only you may allow")
    watched.assert_nothing()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Settings]]:
    """The settings of a run that gets as far as its model; it ends there."""
    found: list[Settings] = []

    def check_model(settings: Settings, **options: Any) -> None:
        found.append(settings)
        raise InputError("Seen.")

    monkeypatch.setattr(pipeline_run, "check_model", check_model)
    return found


def offered(outcome_err: str, before: str) -> list[str]:
    """The words of the command or options that a sentence offers."""
    return shlex.split(" ".join(outcome_err.split()).partition(before)[2].rstrip("."))


def test_what_the_person_says_again_is_done(
    hostile: Path, watched: Watched, seen: list[Settings], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options of the sentence are enough, and mean what the run's settings do."""
    change(hostile, search={"storage": ""})
    refused = invoke("run", "--resume", "-o", hostile)
    options = offered(refused.err, "repeat the command with ")
    watched.assert_nothing()
    pairs = list(zip(options[::2], options[1::2], strict=True))
    for words in ("evil.py", "trust_remote_code", "owner/kernel", REPO, "push_private"):  # each is needed
        fewer = [word for pair in pairs if words not in pair[1] for word in pair]
        assert len(fewer) < len(options)
        assert_sentence(invoke("run", "--resume", "-o", hostile, *fewer), 2, words)
    assert seen == []
    assert_sentence(invoke("run", "--resume", "-o", hostile, *options), 2, "Seen.")
    assert watched.ran.exists()
    (settings,) = seen
    ours = {"out": str(hostile), "cache_dir": settings.cache_dir}  # the tests' cache is in the environment
    assert settings.model_dump(mode="json") == read_toml(hostile / "settings.toml") | ours


def test_the_environment_and_a_configuration_file_are_the_persons(
    hostile: Path, seen: list[Settings], invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = read_toml(hostile / "settings.toml")
    monkeypatch.setenv("ABLITERATE_LOAD__TRUST_REMOTE_CODE", "true")
    monkeypatch.setenv("ABLITERATE_LOAD__ATTN_IMPLEMENTATION", "owner/kernel")
    mine = {"evaluation": {"heldout_scorers": own["evaluation"]["heldout_scorers"]}, "export": own["export"]}
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(mine), encoding="utf-8")
    change(hostile, search={"storage": ""})
    refused = invoke("run", "--resume", "-o", hostile)
    assert "trust_remote_code" not in refused.err
    assert f"--push {REPO}" in " ".join(refused.err.split())
    assert_sentence(invoke("run", "--resume", "-o", hostile, "-c", tmp_path / "mine.toml"), 2, "Seen.")
    assert seen[0].export.push == REPO
    # What the person says instead counts, too.
    harmless = ["--push", "", "--set", "evaluation.scorers=['kl']", "--set", "evaluation.heldout_scorers=[]"]
    objectives = ["--objective", "kl", "--objective", "refusals"]
    assert_sentence(invoke("run", "--resume", "-o", hostile, *harmless, *objectives), 2, "Seen.")
    assert (seen[1].export.push, seen[1].scorers) == ("", ("kl", "refusals"))


def test_hints_to_resume_have_the_options_that_a_run_needs(
    hostile: Path, seen: list[Settings], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption's and a damaged file's, quoted for a shell: pasted, they work."""
    change(hostile, search={"storage": ""})
    options = offered(invoke("run", "--resume", "-o", hostile).err, "repeat the command with ")

    def interrupted(*args: Any, **more: Any) -> Any:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(pipeline_run, "run", interrupted)
        outcome = invoke("run", "--resume", "-o", hostile, *options)
    said = " ".join(outcome.err.split())
    again = shlex.split(said.partition("Continue with ")[2].partition(", or export")[0])
    assert again == ["abliterate", "run", "--resume", "--out", str(hostile), *options]
    assert f"abliterate export '{hostile}' --trial" in said
    assert "--trust-remote-code" in said
    assert_sentence(invoke(*again[1:]), 2, "Seen.")
    (hostile / "result.json").write_text("{", encoding="utf-8")
    (hostile / "directions.safetensors").write_bytes(b"")
    for command in (["trials", hostile], ["report", hostile], ["export", hostile, "--trial", "0"], ["chat", hostile]):
        outcome = invoke(*command)
        said = " ".join(outcome.err.split()).partition("error: ")[2]
        assert outcome.code == 2
        assert "result.json can't be read" in said
        assert "(if you trust the run, " in said
        assert shlex.split(said.partition("; ")[2].partition(" rebuilds it")[0]) == again


def test_a_worker_is_no_strangers_hand(
    hostile: Path, watched: Watched, finished: Finished, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither the database that a directory names nor the settings that a study shares act by themselves."""
    study = RunDirectory(hostile).study_name()
    outcome = invoke("worker", hostile)
    assert_sentence(outcome, 2, str(watched.database), f"--study {study} instead of the directory")
    watched.assert_nothing()
    own = f"{hostile / 'evil.py'}:Words"
    loads: list[LoadSettings] = []

    def load_calibrated(context: Any, *rest: Any) -> Any:
        loads.append(context.settings.load)
        raise InputError("Seen.")

    monkeypatch.setattr(workers, "load_calibrated", load_calibrated)
    change(hostile, search={"storage": ""})
    (hostile / "study.name").unlink()
    opened = optuna.load_study(study_name=None, storage=open_storage("", hostile / "study.journal"))
    setup = json.loads(shared(opened, "setup") or b"")
    honest = setup["settings"]
    over = {"load": {"trust_remote_code": True}, "evaluation": {"scorers": ["refusals", own]}}
    setup["settings"] = tomli_w.dumps(merge(read_toml(finished[0] / "settings.toml"), over))
    share(opened, "setup", json.dumps(setup).encode())
    options = offered(invoke("worker", hostile).err, "repeat the command with ")
    assert options == ["--set", f'evaluation.scorers=["refusals", "{own}"]', "--set", "load.trust_remote_code=true"]
    watched.assert_nothing()
    assert loads == []
    assert_sentence(invoke("worker", hostile, *options), 2, "Seen.")
    assert loads[0].trust_remote_code
    # The name of a shared file can't lead anywhere.
    setup |= {"settings": honest, "files": {**setup["files"], f"evaluation.{watched.ran}": "written"}}
    share(opened, "setup", json.dumps(setup).encode())
    assert_sentence(invoke("worker", hostile), 2, "The study's setup can't be read")
    for wrong in ([1], {**setup, "files": {}, "prompts": {"harmful": [[1, 2]]}}, {**setup, "files": {}, "dtype": 3}):
        share(opened, "setup", json.dumps(wrong).encode())
        assert_sentence(invoke("worker", hostile), 2)
    watched.assert_nothing()


def test_workers_on_further_devices_may_do_what_the_run_may_and_import_nothing_from_the_folder(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Process:
        stdin = None

        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(command)

        def poll(self) -> None: ...
        def send_signal(self, number: int) -> None: ...
        def wait(self, timeout: float = 0) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    with local_workers.local_workers(RunDirectory(hostile), ["cpu"], "", print, ["--set", "load.trust_remote_code=true"]):
        pass
    (command,) = commands
    assert command[:4] == [sys.executable, "-P", "-m", "abliterate"]
    assert command[-4:-2] == ["--set", "load.trust_remote_code=true"] or command[6:8] == [
        "--set",
        "load.trust_remote_code=true",
    ]


def test_an_upload_of_a_strangers_trial_is_private(
    hostile: Path, finished: Finished, watched: Watched, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, bool]] = []

    def push(folder: Path, settings: Any) -> str:
        asked.append((settings.push, settings.push_private))
        return "address"

    monkeypatch.setattr("abliterate.pipeline.export.push", push)
    export = ["export", hostile, "--trial", finished[1]["selected"], "--kind", "adapter", "--push", "me/mine"]
    assert invoke(*export, "-o", tmp_path / "one").code == 0
    monkeypatch.setenv("ABLITERATE_EXPORT__PUSH_PRIVATE", "false")
    assert invoke(*export, "-o", tmp_path / "two").code == 0
    assert asked == [("me/mine", True), ("me/mine", False)]


def test_a_judges_own_code_isnt_run_nor_asked_about(classifier: str, tmp_path: Path, watched: Watched) -> None:
    judge = with_own_code(Path(classifier), tmp_path / "judge", watched.ran)
    config = json.loads((judge / "config.json").read_text(encoding="utf-8"))
    own = {"AutoConfig": "code.Own", "AutoModelForSequenceClassification": "code.Own"}
    (judge / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}), encoding="utf-8")
    with pytest.raises(TrialError, match="can't be loaded"):
        Classifier(str(judge))._load()
    watched.assert_nothing()


def test_a_judges_config_chooses_no_kernels_and_no_pickle_is_opened(classifier: str, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(classifier, judge)
    config = json.loads((judge / "config.json").read_text(encoding="utf-8"))
    asks = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"}
    (judge / "config.json").write_text(json.dumps(config | asks), encoding="utf-8")
    assert Classifier(str(judge))._load()[0].config._attn_implementation == "eager"
    (judge / "model.safetensors").rename(judge / "pytorch_model.bin")
    with pytest.raises(TrialError, match="can't be loaded"):
        Classifier(str(judge))._load()


def test_a_private_file_as_chat_template_gets_into_no_export(finished: Finished, invoke: Invoke, tmp_path: Path) -> None:
    run, private = copy_run(finished[0], tmp_path / "run"), tmp_path / "id_rsa"
    private.write_text("a private key", encoding="utf-8")
    change(run, load={"chat_template": str(private)})
    outcome = invoke("export", run, "--trial", finished[1]["selected"], "--kind", "adapter", "-o", tmp_path / "out")
    assert_sentence(outcome, 2, "tokenizer or chat template")
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_writes_to_the_persons_own_folders(finished: Finished, tmp_path: Path) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    places = {"cache_dir": str(tmp_path / "c"), "efficiency": {"residual_cache_dir": str(tmp_path / "r")}}
    change(run, load={"offload_folder": str(tmp_path / "o")}, **places)
    given = {"out": str(run), "cache_dir": str(tmp_path / "mine")}
    settings, _ = resolve(given, "", RunFlags(resume=True))
    assert (settings.cache_dir, settings.efficiency.residual_cache_dir) == (given["cache_dir"], "")
    assert settings.load.offload_folder == ""


@pytest.mark.parametrize("name", ["study.journal", ".lock", "refined", "worker-1.log"])
def test_a_link_in_place_of_a_file_that_is_written_is_refused(
    name: str, finished: Finished, invoke: Invoke, tmp_path: Path
) -> None:
    run, victim = copy_run(finished[0], tmp_path / "run"), tmp_path / "victim"
    victim.write_text("first\nlast", encoding="utf-8")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(victim)
    for command in (["run", "--resume", "--out", run], ["worker", run]):
        assert_sentence(invoke(*command), 2, name, "is a link")
    assert victim.read_text(encoding="utf-8") == "first\nlast"
