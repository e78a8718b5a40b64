"""Finding one's way: mistyped commands and bad input, help, shell completion, `config` and `doctor`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from abliterate.artifacts.runs import JOURNAL, RESULT, SETTINGS
from abliterate.cli import app, checks
from abliterate.cli import doctor as cli_doctor
from abliterate.directions import METHODS as DIRECTION_METHODS
from abliterate.edits import AUTO, is_refinable
from abliterate.edits import METHODS as EDIT_METHODS
from abliterate.export import EXPORTERS, NOTHING
from abliterate.files import DIGEST, read_toml, write_json
from abliterate.scorers import SCORERS
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path, load_settings, options_of
from abliterate.terminal.tables import make_console
from support import early
from support.cli import Invoke, Outcome, assert_sentence
from support.events import checked
from support.paths import TESTS

# [(arguments, parts of the sentence)]: what must be told before torch is imported. `runs/` holds the runs `good` and `new`.
BAD: list[tuple[list[str], tuple[str, ...]]] = [
    # commands
    (["Qwen/Qwen3-0.6B"], ("did you mean abliterate run Qwen/Qwen3-0.6B?",)),
    (["demo"], ("did you mean abliterate run demo?",)),
    (["a-folder"], ("did you mean abliterate run a-folder?",)),
    (["runs/good"], ("did you mean abliterate chat runs/good",)),
    (["insepct", "demo"], ("did you mean abliterate inspect?",)),
    (["cache", "lst"], ("did you mean abliterate cache ls?",)),
    (["config", "int", "x.toml"], ("did you mean abliterate config init?",)),
    (["xyzzy"], ("abliterate --help lists the commands",)),
    # models
    (["run"], ("abliterate run demo",)),
    (["inspect"], ("abliterate inspect demo",)),
    (["tune-batch"], ("abliterate tune-batch demo",)),
    (["run", "/no/such/model"], ("no model directory /no/such/model",)),
    (["inspect", "./nothing"], ("no model directory ./nothing",)),
    (["run", "a-file"], ("is a file",)),
    # runs
    (["chat", "runs/goood"], ("There is no run in runs/goood", "did you mean runs/good?")),
    (["chat", "good"], ("did you mean runs/good?",)),
    (["trials", "runs/xyzzy"], ("the newest runs are", "runs/good", "runs/new")),
    (["report", "runs/goood"], ("did you mean runs/good?",)),
    (["report", "runs/good/model"], ("did you mean runs/good?",)),
    (["export", "runs/goood", "--trial", "1"], ("did you mean runs/good?",)),
    (["evaluate", "demo", "runs/goood"], ("did you mean runs/good?",)),
    (["evaluate", "demo", "runs/goood:3"], ("did you mean runs/good?",)),
    (["evaluate", "runs/goood", "demo"], ("did you mean runs/good?",)),
    (["worker", "runs/goood"], ("did you mean runs/good?",)),
    (["run", "runs/goood"], ("did you mean runs/good?",)),
    (["reproduce", "runs/goood"], ("did you mean runs/good?",)),
    (["reproduce", "nothing.json"], ("There is no recipe nothing.json",)),
    # trials
    (["export", "runs/good", "--trial", "999"], ("no finished trial 999", "abliterate trials runs/good")),
    (["export", "runs/new", "--trial", "0"], ("has no result.json", "--resume")),
    (["chat", "runs/good", "--trial", "999"], ("no finished trial 999",)),
    (["chat", "demo", "--trial", "1"], ("--trial needs a run",)),
    (["evaluate", "demo", "runs/good:999"], ("no finished trial 999",)),
    (["run", "demo", "-n", "4", "--no-refine", "--select", "trial:77"], ("numbers 0 to 3", "-n")),
    (["run", "demo", "-n", "4", "--refine", "--select", "trial:12"], ("numbers 0 to 11",)),
    (["run", "demo", "-n", "4", "--refine", "--set", "edit.mode=arbitrary-rank", "--select", "trial:5"], ("numbers 0 to 3",)),
    (["run", "--resume", "-o", "runs/good", "--select", "trial:99"], ("'trial:99'", "can't have")),
    # settings and files
    (["run", "demo", "--set", "search.trails=5"], ("did you mean search.trials?",)),
    (["run", "demo", "--set", "search.trials=-1"], ("search.trials has a wrong value",)),
    (["run", "demo", "--select", "best"], ("'best' is not a rule",)),
    (["run", "demo", "--set", "edit.mode=fulll"], ("no edit mode 'fulll'",)),
    (["run", "demo", "--set", "directions.method=x"], ("no direction method 'x'",)),
    (["run", "demo", "--export", "whole"], ("no export kind 'whole'",)),
    (["run", "demo", "--objective", "beauty"], ("no scorer 'beauty'",)),
    (["run", "demo", "--harmful", "no/such.txt"], ("no/such.txt",)),
    (["tune-batch", "demo", "--harmless-eval", "no/such.txt"], ("no/such.txt",)),
    (["run", "demo", "--harmful-heldout", "no/such.txt"], ("no/such.txt",)),
    (["run", "demo", "--markers", "no/such.txt"], ("no marker file",)),
    (
        ["run", "demo", "-c", "no-such-preset"],
        ("presets: biprojected, cliches, default, quick, sycophancy, thorough",),
    ),
    (["run", "demo", "-o", "runs/good"], ("already holds a run", "--resume")),
    # tokens and drivers
    (["run", "demo", "--push", "me/model"], ("no Hub token", "hf auth login")),
    (["export", "runs/good", "--trial", "0", "--push", "me/model"], ("no Hub token",)),
    (["run", "demo", "--push", "model"], ("owner/name",)),
    (
        ["run", "demo", "--storage", "postgresql+psycopg://me:hunter2@db/x"],
        ("pip install '.[postgres]' in", "psycopg"),
    ),
    # config
    (["config", "--set", "search.trails=5"], ("did you mean search.trials?",)),
    (["config", "init", "a-file", "demo"], ("exists", "--force")),
    (["config", "init", "a-folder"], ("is a directory",)),
    (["config", "init", "no/such.toml"], ("There is no directory",)),
    (["config", "-c", "quick", "init", "x.toml"], ("omit them",)),
]


def make_runs(folder: Path) -> None:
    """Two runs that were carried out elsewhere, a folder and a file."""
    good, new = folder / "runs" / "good", folder / "runs" / "new"
    for run in (good, new):
        run.mkdir(parents=True)
        (run / JOURNAL).touch()
        (run / SETTINGS).write_text('model = "demo"\n[edit]\nmode = "full"\n', encoding="utf-8")
    result = json.loads((TESTS / "support" / "golden" / RESULT).read_text(encoding="utf-8"))
    write_json(good / RESULT, {name: value for name, value in result.items() if name != DIGEST})
    (folder / "a-folder").mkdir()
    (folder / "a-file").write_text("x", encoding="utf-8")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """How each command line of `BAD` ended, in its order, all in one process."""
    folder = tmp_path_factory.mktemp("early")
    make_runs(folder)
    table = folder / "table.json"
    table.write_text(json.dumps([arguments for arguments, _ in BAD]), encoding="utf-8")
    ours = ("HF_", "ABLITERATE_REFINE", "ABLITERATE_EDIT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [sys.executable, early.__file__, str(table)],
        cwd=folder,
        env={**environment, "HF_HOME": str(folder / "hub")},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(BAD)), ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_told_before_torch_is_imported(number: int, told: list[dict[str, Any]]) -> None:
    ended = told[number]
    assert_sentence(Outcome(ended["code"], ended["out"], ended["err"]), 2, *BAD[number][1])
    assert ended["heavy"] == []
    assert ended["seconds"] < 2
    assert "hunter2" not in ended["err"]


def test_the_names_that_are_checked_early_are_those_of_the_registries() -> None:
    assert set(checks.UNREFINED) == {name for name, method in EDIT_METHODS.items() if not is_refinable(method)}
    names = {setting: set(known) for setting, (_, known) in checks.BUILT_IN.items()}
    assert names == {
        "directions.method": set(DIRECTION_METHODS),
        "edit.mode": {*EDIT_METHODS, AUTO},
        "export.kind": {*EXPORTERS, NOTHING},
    }
    assert set(checks.SCORERS) == set(SCORERS)


def commands(group: Any = None, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command and group, by its words."""
    group = group or typer.main.get_command(app.app)
    found = {above: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*above, name))
    return found


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_help_is_plain(words: tuple[str, ...], invoke: Invoke) -> None:
    outcome = invoke(*words, "-h")
    assert outcome.code == 0
    assert "Usage: abliterate" in outcome.out
    assert not [kind for kind in ("<bool>", "<str>", "<int>", "<float>", "<path>", "<list") if kind in outcome.out]


def test_help_says_the_defaults_of_settings() -> None:
    settings, every = Settings(), commands()
    defaults = {
        "device": settings.device,
        "seed": settings.seed,
        "trials": settings.search.trials,
        "select": settings.search.select,
        "objectives": " and ".join(settings.search.objectives),
        "export": settings.export.kind,
    }
    helps = {param.name: param.help for param in every[("run",)].params}
    for name, value in defaults.items():
        assert f"Default: {value}" in helps[name]
    for words, command in every.items():
        for param in command.params:
            # Filters and lists that add something have no default, and a flag is off.
            plain = param.default in (None, "") and not getattr(param, "is_flag", False) and not param.required
            if plain and param.rich_help_panel != "Filters" and param.name not in ("listed", "assignments", "benchmark", "png"):
                assert getattr(param, "hidden", False) or "efault" in param.help or words[:1] in OWN_DEFAULTS, (
                    words,
                    param.name,
                )


# Of these commands some options have no value unless one is given.
OWN_DEFAULTS = {("reproduce",), ("worker",), ("evaluate",), ("chat",), ("export",)}


def test_the_version_has_a_short_option(invoke: Invoke) -> None:
    assert invoke("-V").out == invoke("--version").out != ""


@pytest.mark.parametrize("arguments", [["--debug", "trials", "no"], ["trials", "--debug", "no"], ["trials", "no", "--debug"]])
def test_debug_stands_anywhere(arguments: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_DEBUG", "")
    assert "Traceback" not in invoke("trials", "no").err
    assert "Traceback" in invoke(*arguments).err


@pytest.mark.parametrize(
    "arguments", [["--debug", "cache", "path"], ["cache", "--debug", "path"], ["cache", "path", "--debug"]]
)
def test_debug_stands_anywhere_in_a_group(arguments: list[str], invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLITERATE_DEBUG", "")
    assert invoke(*arguments).code == 0
    assert os.environ["ABLITERATE_DEBUG"] == "1"


@pytest.mark.parametrize(("command", "function"), [("inspect", "inspect"), ("tune-batch", "tune_batch")])
def test_the_prompt_options_reach_the_settings(
    command: str, function: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("harmful", "harmless", "harmful_eval", "harmless_eval", "harmful_heldout", "harmless_heldout", "over_refusal")
    options, given = [], []
    for name in (*names, "markers"):
        file = tmp_path / f"{name}.txt"
        file.write_text("x\n", encoding="utf-8")
        options += [f"--{name.replace('_', '-')}", file]

    def keep(options: Mapping[str, Any], config: str, assignments: list[str], **flags: Any) -> None:
        given.append(load_settings(config, options_of(options, assignments)))

    monkeypatch.setattr(f"abliterate.cli.{function}.{function}", keep)
    assert invoke(command, "demo", *options).code == 0
    (settings,) = given
    assert {name: getattr(settings.prompts, name) for name in names} == {name: str(tmp_path / f"{name}.txt") for name in names}
    assert settings.evaluation.markers == str(tmp_path / "markers.txt")


def complete(shell: str, words: list[str], folder: Path, **more: str) -> str:
    """What a shell is offered behind `words`, the last of which is being typed, by the protocol of its completion script."""
    variables = {"_ABLITERATE_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        variables |= {"COMP_WORDS": "\n".join(["abliterate", *words]), "COMP_CWORD": str(len(words))}
    else:
        variables |= {"_TYPER_COMPLETE_ARGS": " ".join(["abliterate", *words]), "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    # A process of its own, which also tells what it has imported.
    code = (
        f"import sys, abliterate.cli.app as app\ntry: app.main()\nfinally: print([n for n in {UNNEEDED} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    *offered, imported = done.stdout.splitlines()
    assert imported == "[]"
    return "\n".join(offered)


UNNEEDED = ("torch", "transformers", "optuna", "pydantic_settings")


def test_shells_complete_presets_runs_and_trials(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    make_runs(tmp_path)
    (tmp_path / "runs" / "$(touch harm)").mkdir()
    (tmp_path / "runs" / "$(touch harm)" / JOURNAL).touch()

    def offered(shell: str, *words: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setenv("_ABLITERATE_COMPLETE", f"complete_{shell}")
            patch.setenv("COMP_WORDS", "\n".join(["abliterate", *words]))
            patch.setenv("COMP_CWORD", str(len(words)))
            patch.setenv("_TYPER_COMPLETE_ARGS", " ".join(["abliterate", *words]))
            patch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
            outcome = invoke()
        assert outcome.err == ""
        return outcome.out.split("\n")

    assert complete("bash", ["export", "runs/good", "--trial", ""], tmp_path).split() == ["0", "1", "3"]
    known = ["biprojected", "cliches", "default", "quick", "sycophancy", "thorough"]
    assert offered("bash", "run", "demo", "-c", "")[:6] == known
    assert offered("bash", "run", "demo", "-c", "th")[0] == "thorough"
    assert set(offered("bash", "trials", "")) == {"runs/good", "runs/new", ""}  # nothing that a shell would evaluate
    assert offered("bash", "trials", "./runs/g")[0] == "./runs/good"
    assert offered("bash", "chat", "d")[0] == "demo"
    assert offered("bash", "chat", "runs/good", "--trial", "3")[0] == "3"
    assert offered("bash", "export", "runs/new", "--trial", "") == ["", ""]
    assert offered("bash", "tune-b")[0] == "tune-batch"
    assert offered("fish", "report", "runs/n")[0] == "runs/new\trun"
    assert '"0":"front, unanswered 0, refusals 0, KL 0.0233"' in offered("zsh", "chat", "runs/good", "--trial", "")[0]
    for shell, part in (("bash", "complete -o default"), ("zsh", "compdef"), ("fish", "complete --command abliterate")):
        monkeypatch.setenv("_ABLITERATE_COMPLETE", f"source_{shell}")
        assert part in invoke().out


def test_config_prints_every_option(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("config").out == config_path("default.toml").read_text(encoding="utf-8")
    given = ["-c", "thorough", "--set", "load.template_options={think=false}", "--set", "search.max_coeff={default=[0, 1.5]}"]
    outcome = invoke("config", *given, "--set", "search.storage=postgresql://me:hunter2@db/x", "--set", "seed=3")
    assert "hunter2" not in outcome.out
    assert "search.ei_candidates" in outcome.out.splitlines()[0]
    assert outcome.out.count("\n#") == config_path("default.toml").read_text(encoding="utf-8").count("\n#")
    file = tmp_path / "all.toml"
    file.write_text(outcome.out, encoding="utf-8")
    settings = load_settings(str(file))
    assert settings.search.storage == "postgresql://me:***@db/x"
    assert (settings.search.trials, settings.search.startup_trials, settings.seed) == (200, 0, 3)
    assert settings.load.template_options == {"think": False}
    assert settings.search.max_coeff == {"default": (0, 1.5)}


def test_config_init_writes_a_file_that_runs_can_use(invoke: Invoke, tmp_path: Path) -> None:
    assert "abliterate run -c my.toml" in invoke("config", "init", "my.toml", "Qwen/Qwen3-0.6B").out
    text = (tmp_path / "my.toml").read_text(encoding="utf-8")
    assert read_toml(tmp_path / "my.toml")["model"] == "Qwen/Qwen3-0.6B"
    assert load_settings("my.toml").model == "Qwen/Qwen3-0.6B"
    # The options behind a # are the defaults: without the # the file says the same.
    active = "\n".join(line.removeprefix("# ") if " = " in line and line[2:].isascii() else line for line in text.splitlines())
    (tmp_path / "active.toml").write_text(active, encoding="utf-8")
    assert len(read_toml(tmp_path / "active.toml")["search"]) == 2
    defaults = load_settings("", {"model": "Qwen/Qwen3-0.6B"})
    assert load_settings("active.toml") == defaults == load_settings("my.toml")
    assert invoke("config", "init", "my.toml", "demo").code == 2
    assert (tmp_path / "my.toml").read_text(encoding="utf-8") == text
    assert invoke("config", "init", "my.toml", "demo", "--force").code == 0
    assert load_settings("my.toml").model == "demo"
    (tmp_path / "model").mkdir()
    invoke("config", "init", "local.toml", "model")
    assert load_settings("local.toml").model == str(tmp_path / "model")


def test_doctor(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_notThisOne0123456789")
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "entry").write_bytes(b"x" * 2048)
    lines = checked(invoke("doctor", "--cache-dir", cache, "--json"), "doctor")
    found = {check["name"]: check for check in lines[-1]["checks"]}
    assert lines[-1]["well"]
    assert {"python", "torch", "transformers", "peft", "optuna", "extra bnb", "device", "memory", "runs"} <= found.keys()
    assert (found["Hub token"]["state"], found["Hub token"]["value"]) == ("ok", "present")
    assert "2.0 KiB" in found["cache"]["value"]
    outcome = invoke("doctor", "--cache-dir", cache)
    assert outcome.code == 0
    assert "hf_notThisOne" not in outcome.out + outcome.err + json.dumps(lines)
    assert not (tmp_path / "runs").exists()  # nothing is made by looking


def test_doctor_looks_at_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, **more: Any) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", closed)  # as where a folder above is another user's
    assert cli_doctor._folder("cache", tmp_path / "none" / "cache", "set it", sized=True).value.startswith(str(tmp_path))


def test_doctor_says_what_to_do(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = cli_doctor.metadata.version
    old = {"optuna": "1.0"}

    def pretended(name: str) -> str:
        if name == "bitsandbytes":
            raise cli_doctor.metadata.PackageNotFoundError(name)
        return old.get(name) or version(name)

    monkeypatch.setattr(cli_doctor.metadata, "version", pretended)
    monkeypatch.setattr(cli_doctor, "_NO_ROOM", 2**60)
    monkeypatch.setattr(cli_doctor, "_LITTLE_ROOM", 2**60)
    monkeypatch.setenv("ABLITERATE_SEACH__TRIALS", "5")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    result, error = checked(invoke("doctor", "--cache-dir", tmp_path / "file" / "c", "--json"), "doctor", 1, last="error")
    found = {check["name"]: check for check in result["checks"]}
    bad = {name for name, check in found.items() if check["state"] == "bad"}
    assert bad == {"optuna", "settings", "runs", "cache"}
    assert all(name in error["message"] for name in bad)
    assert found["optuna"]["remedy"] == "pip install 'optuna>=5.0'"
    assert "ABLITERATE_SEARCH__TRIALS" in found["settings"]["remedy"]
    assert "free space" in found["runs"]["remedy"]
    assert found["extra bnb"]["remedy"].endswith("pip install '.[bnb]' in your clone of abliterate")
    assert all(check["remedy"] for check in found.values() if check["state"] != "ok")


def test_doctor_breaks_remedies_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_doctor, "make_console", lambda: make_console(force_terminal=True, width=60))
    remedy = "a CPU is enough for the demo and small models; for larger ones use a machine with a GPU"
    _, *lines = cli_doctor._line(cli_doctor.Check("device", "note", "cpu", remedy)).splitlines()
    assert " ".join(line.strip() for line in lines) == remedy
    assert all(len(line) <= 60 and line.startswith(" " * 20) for line in lines)
