"""Names and texts made to break out of folders, terminals, cards and pages; and secrets, which nothing may write down."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory, default_path
from abliterate.cli import app
from abliterate.errors import InputError
from abliterate.export.card import FILES, checked, code, commands, model_card, plain, recipe
from abliterate.model.loader import demo_path
from abliterate.objectives import SETTINGS_NAMING_SCORERS
from abliterate.pipeline.workers import study_location
from abliterate.report.data import gather
from abliterate.report.page import render
from abliterate.settings.schema import Settings
from abliterate.settings.sources import (
    _PROMPT_SETS,
    config_path,
    dump_settings,
    load_settings,
    merge,
    parse_assignments,
    without_password,
)
from abliterate.terminal import tables
from abliterate.terminal.reporters import PlainReporter, RichReporter, show_error
from abliterate.types import Kernel, Objective, Trial, TrialParams
from support.forked import Command, NoPictures, finish, write_config
from support.models import make_tokenizer
from support.objectives import OWN as WORDS
from support.runs import SECRETS, copy_run, quick_options

Finished = tuple[Path, dict[str, Any], Settings]
Whole = tuple[Path, Path, list[dict[str, Any]]]
NAMES = [
    *("..", "../..", "/", "/etc/passwd", "a/../../b", "~", "~nobody-of-that-name/x", "-rf", "--help", "CON", "nul.txt", "com1"),
    *("one\ntwo", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\r\x1b[2Kgone", "[red]bold[/red]", "[/]", "😀" * 40, "x" * 5000),
    *("\u202eevil", "a\u2028b", "a:b|c*?<>\"'`$(touch pwned);", "\x00nul", "<script>alert(1)</script>", "a" * 300 + "/b", " "),
]
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\n"] + ["\u202e", "\u2028"]


def ids(name: str) -> str:
    return ascii(name)[1:30]


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_no_model_name_leaves_the_runs_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = default_path(name)
    assert path.parent == Path("runs")
    assert path.resolve().parent == tmp_path / "runs"
    path.mkdir(parents=True)  # a name that a file system takes
    stem = path.name.split(".")[0].lower()
    assert stem not in ("con", "prn", "aux", "nul", "com1", "lpt1")
    assert path.name[0] not in ".-"
    assert path.name.isascii()


@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_hostile_names_on_the_command_line_are_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As model and as file: refused, nothing made, nothing of them reaches the terminal raw."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if name == "--help":
        return
    files = [] if name == "/etc/passwd" else [["run", "demo", f"--harmful={name}"], ["run", "demo", f"--markers={name}"]]
    for arguments in (["run", "--", name], ["trials", "--", name], *files):
        monkeypatch.setattr(sys, "argv", ["abliterate", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2, (arguments, err)
        assert "unexpected" not in err
        assert "Traceback" not in out + err
        assert not [control for control in CONTROLS if control in out + err]
        assert err.count("\n") == 1 or "Usage" in err
    assert {path.name for path in tmp_path.rglob("*")} <= {"runs"}


def test_names_that_arent_utf8_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: Finished
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = "caf\udce9"
    Path(odd).mkdir()
    for arguments in (["run", odd], ["run", "demo", "-o", odd], ["export", str(finished[0]), "--trial", "0", "-o", odd]):
        monkeypatch.setattr(sys, "argv", ["abliterate", *arguments])
        with pytest.raises(SystemExit) as ended:
            app.main()
        err = capsys.readouterr().err
        assert (ended.value.code, "UTF-8" in err, "unexpected" in err) == (2, True, False), err
        assert err.encode("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == [odd]
    with pytest.raises(InputError, match="The setting model isn't UTF-8 text"):
        load_settings("", {"model": odd})


@pytest.mark.parametrize("rich", [False, True])
@pytest.mark.parametrize("name", NAMES, ids=ids)
def test_no_text_breaks_the_terminal(name: str, rich: bool) -> None:
    out = io.StringIO()
    reporter = RichReporter(Console(file=out, force_terminal=False, width=20_000)) if rich else PlainReporter(out)
    params = TrialParams("global", 1.0, {"mlp.down_proj": Kernel(1, 1, 1, 1)})
    for control in ["", *(CONTROLS if len(name) < 100 else [])]:
        reporter.header({"model": name + control})
        reporter.stage("load", name + control)
        reporter.note(name + control)
        reporter.warn(name + control)
        reporter.trial(Trial(0, params, "failed", {}, 0.1, name + control), 1, False, None)
        reporter.close()
    seen = out.getvalue()
    assert not [control for control in CONTROLS if control in seen]
    if name.isprintable() and len(name) < 100:
        assert seen.count(name.strip() or " ") >= 5  # brackets are no markup


def test_errors_and_tables_escape(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "[red]a\x1b[2Jb\ud800[/red]\nerror: all is well"
    show_error(hostile)
    tables.print_table(("a",), [(hostile,)])
    out, err = capsys.readouterr()
    assert err == "error: [red]a\\x1b[2Jb\\ud800[/red]\\nerror: all is well\n"
    assert "\x1b" not in out
    assert "[red]a" in out


HOSTILE = "<img src=x onerror=alert(1)>](http://x)|`[y]\n---\n# Safe model\n```"


def test_the_report_escapes(finished: Finished) -> None:
    path, first, _ = finished
    result = {**first, "model": first["model"] | {"id": HOSTILE}}
    result["trials"] = [{**trial, "state": "failed", "reason": HOSTILE} for trial in first["trials"]]
    page = render(gather(RunDirectory(path), Result.model_validate({**result, "front": [], "selected": None})))
    assert "<img src=x" not in page
    assert html.escape(HOSTILE.split("\n")[0]) in page


# What a card says that is nobody's text.
CARD = {
    "on_hub": False,
    "n_harmful": 1,
    "n_harmless": 1,
    "before": 1,
    "kl": {"mean": 0.1, "median": 0.1, "max": 0.1},
    "mode": "full",
    "representation": "exact",
    "approximation": {},
    "method": "mean",
    "number": 0,
    "seed": 0,
    "params": TrialParams("per layer", 0.0, {}),
    "dense": True,
}


def test_the_card_escapes(finished: Finished, tmp_path: Path) -> None:
    """A directory's or file's name can't add markup, tables, sections or commands to the card."""
    _, first, settings = finished
    model = tmp_path / "m<img src=x onerror=alert(1)>|`[y](z)\n# Safe model\n```\n## Yes"
    model.parent.mkdir(exist_ok=True)
    copy_run(demo_path() / "model", model)
    record = {**first, "model": first["model"] | {"id": model.name}}
    record["prompts"] = {name: {**part, "source": HOSTILE} for name, part in first["prompts"].items()}
    section = recipe(settings.model_copy(update={"model": str(model)}), record, "merged", 0)
    facts = {
        **CARD,
        "base": model.name,
        "revision": "",
        "after": 0,
        "recipe": section,
        "objectives": (Objective(HOSTILE, "minimize"),),
        "before_values": {HOSTILE: 1.0},
        "values": {HOSTILE: 2.0},
    }
    card = model_card(facts)
    lines, fence, outside = card.split("\n"), "", []
    for line in lines:
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.rstrip("abcdefghijklmnopqrstuvwxyz")
        else:
            outside.append(line)
    assert not fence
    assert not [line for line in outside if line.strip() in ("# Safe model", "## Yes")]
    titles = [f"# {plain(model.name)}, with refusal ablated", "## How to reproduce"]
    assert [line for line in outside if line.startswith("#")] == titles
    text = "\n".join(re.sub(r"(?<!\\)(`+).*?(?<!`)\1(?!`)", "", line) for line in outside)  # what is code isn't read as markup
    assert not re.search(r"(?<!\\)<img", text)
    assert not re.search(r"(?<!\\)\[y", text)
    rows = [line for line in outside if line.startswith("|") and "sha256" in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_a_card_has_no_control_characters(finished: Finished) -> None:
    """Of a scorer's, a file's, a model's name or a setting; its commands mean what they would have."""
    _, first, settings = finished
    odd = "a" + "".join(CONTROLS) + "\U000e0001'b\\"
    options = {"prompts": {"prefix": odd}, "load": {"template_options": {odd: odd}}, "model": odd.replace("\0", "")}
    own = load_settings("", {name: value for name, value in options.items() if name != "model"})
    own = own.model_copy(update={"model": options["model"]})
    record = {**first, "model": first["model"] | {"id": odd}}
    record["prompts"] = {name: {**part, "source": odd} for name, part in first["prompts"].items()}
    rate = {"count": 1, "prompts": 2, "low": 0.1, "high": 0.9}
    side = {"refusals": rate, "answered": rate, "harmless_refusals": rate, "over_refusals": rate, "faults": {"empty": 1}}
    spread = {"mean": 0.1, "median": 0.1, "max": 0.2}
    judge = {"name": odd, "base": rate, "candidate": rate, "disagreements": [], "error": ""}
    heldout = {
        "base": side,
        "candidate": side,
        "unchanged": rate | {"first_difference": 2.5},
        "search": {"refusals": rate, "kl": spread},
        "kl": spread,
        "kl_answers": spread | {"tokens": 1},
        "judges": [judge],
        "scores": {odd: {"values": {"base": 1.0, "candidate": 2.0}, "error": ""}},
        "perplexity": {"base": 1.0, "candidate": 1.0},
        "prompts": {"harmful_heldout": {"source": odd, "count": 3}},
    }
    facts = {
        **CARD,
        "base": odd,
        "revision": odd,
        "after": 1,
        "heldout": heldout,
        "objectives": (Objective(odd, "minimize"),),
        "before_values": {odd: 1.0},
        "values": {odd: 2.0},
        "recipe": recipe(own, record, "merged", 0),
    }
    failed = checked({"ok": False, "checks": {}, "reason": odd}, Trial.from_record(first["trials"][0]), 1)
    for text in (model_card(facts), failed, plain(odd), code(odd)):
        assert not [control for control in CONTROLS if control in text]
        assert text.replace("\n", "").isprintable()
    command = commands(own, record, "merged", 0)[0]
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True
    )
    arguments = said.stdout.decode("utf-8").split("\0")
    assert arguments[2] == own.model
    found = load_settings("", parse_assignments([value for name, value in pairwise(arguments) if name == "--set"]))
    assert found.prompts == own.prompts
    assert found.load.template_options == own.load.template_options


PASSWORD = "pa55w0rd-nobody-may-see"


def assert_nothing_said(secrets: list[str], folders: tuple[Path, ...], *texts: str) -> None:
    """No secret in any file under the folders, in the cache, nor in the texts."""
    everywhere = (*folders, Path(os.environ["ABLITERATE_CACHE_DIR"]))
    contents = {str(path): path.read_bytes() for folder in everywhere for path in folder.rglob("*") if path.is_file()}
    assert len(contents) > 5
    for secret in secrets:
        assert not [name for name, content in contents.items() if secret.encode() in content]
        assert not [text for text in texts if secret in text]


def test_tokens_are_in_no_file_and_no_log(whole: Whole, tmp_path: Path) -> None:
    """With --debug too: run, log, cache, export, and a command that fails."""
    config, run, _ = whole
    copy_run(run, tmp_path / "run")
    arguments = ["--debug", "run", "demo", "-c", config, "-o", "run", "--json", "--resume", "--harmful", "nowhere"]
    failed = finish(arguments, tmp_path, environment=SECRETS)
    assert failed.end() == 2
    assert "Traceback" in failed.err  # as asked for
    assert {"run", ".out-0", ".err-0"} <= {path.name for path in run.parent.iterdir()}
    assert_nothing_said([*SECRETS.values()], (run.parent, tmp_path), failed.out, failed.err)


@dataclass(frozen=True)
class Private:
    """A run of which paths and a database's password are to stay private: how it and what came after it ended."""

    top: Path
    out: Path
    first: Command
    without: Command
    again: Command


def stated_in(folder: Path, files: dict[str, str], judge: str) -> dict[str, Any]:
    """Options with every setting that may be a path, the database's included, and what is there."""
    copy_run(demo_path() / "model", folder / "base")
    copy_run(Path(judge), folder / "judge")
    (folder / "mine.py").write_text(WORDS, encoding="utf-8")
    (folder / "markers.txt").write_bytes(config_path("markers.txt").read_bytes())
    (folder / "mine.jinja").write_text(make_tokenizer().chat_template, encoding="utf-8")  # type: ignore[arg-type]
    for name, path in files.items():
        (folder / f"{name}.jsonl").write_bytes(Path(path).read_bytes())
    scorer = f"{folder}/mine.py:Words"
    return {
        "model": str(folder / "base"),
        "prompts": {name: str(folder / f"{name}.jsonl") for name in files},
        "load": {"chat_template": str(folder / "mine.jinja"), "offload_folder": str(folder / "offload")},
        "evaluation": {
            "markers": str(folder / "markers.txt"),
            "heldout": True,
            "judge_model": str(folder / "judge"),
            "scorers": ["refusals", "kl", "classifier", scorer],
            "heldout_scorers": ["classifier", scorer],
        },
        "efficiency": {"residual_cache_dir": str(folder / "residuals")},
        "search": {"trials": 2, "objectives": ["refusals", "kl", f"{scorer}:maximize"]},
        "export": {"kind": "adapter"},
    }


@pytest.fixture(scope="module")
def private(
    prompt_files: dict[str, str], heldout_files: dict[str, str], classifier: str, tmp_path_factory: pytest.TempPathFactory
) -> Private:
    """SQLite takes no password but as a parameter of the URL, which it passes over."""
    top = tmp_path_factory.mktemp("private")
    folder = top / "secretdir"
    stated = stated_in(folder, prompt_files | heldout_files, classifier)
    storage = f"sqlite:///file:{folder}/study.db?uri=true&password={PASSWORD}"
    # Any setting for a prompt set or a file is among them.
    settings = load_settings("", merge(stated, {"search": {"storage": storage}}))
    may_be_paths = {name for name, text in texts_of(settings.model_dump()) if "secretdir" in text}
    assert may_be_paths >= {
        *(f"prompts.{name}" for name in _PROMPT_SETS),
        *FILES.values(),
        *SETTINGS_NAMING_SCORERS,
        "evaluation.judge_model",
        "search.storage",
    }
    config = write_config(folder / "quick.toml", quick_options({}, folder / "cache", **stated))
    out = folder / "outdir" / "run"
    arguments = ["--debug", "run", "-c", config, "-o", out]
    first = finish([*arguments, "--storage", storage], top, before=NoPictures())  # the last one draws them
    without = finish([*arguments, "--resume"], top)
    again = finish([*arguments, "--resume", "--storage", storage, "-n", "3", "--json"], top)
    for command, expected in ((first, 0), (without, 2), (again, 0)):
        assert command.end() == expected, command.out + command.err
    return Private(top, out, first, without, again)


def test_a_databases_password_is_in_no_file_and_no_log(private: Private, tmp_path: Path) -> None:
    assert "give --storage again" in " ".join(private.without.err.split())
    assert "2 trials are kept" in private.again.out
    unreachable = finish(["--debug", "run", "demo", "--storage", f"nodb://me:{PASSWORD}@127.0.0.1:9/x"], tmp_path)
    assert unreachable.end() == 2
    every = (private.first, private.without, private.again, unreachable)
    assert_nothing_said(
        [PASSWORD], (private.top, tmp_path), *(text for command in every for text in (command.out, command.err))
    )
    study = (private.out / "study.name").read_text(encoding="utf-8").strip()
    with pytest.raises(InputError, match=f"give --storage URL --study {study} instead of the directory"):
        study_location(private.out, "", "")


def test_paths_are_in_no_file_that_is_passed_on(private: Private, heldout_files: dict[str, str]) -> None:
    """With every setting that may be a path: of a run's files only `settings.toml` says where anything lies."""
    out = private.out
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert not result["heldout"]["judges"][0].get("error")
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    card = files["model/README.md"].read_text(encoding="utf-8")
    assert files.keys() >= {"report.html", "result.json", "recipe.json", "model/recipe.json", "settings.toml"}
    assert [name for name, path in files.items() if b"secretdir" in path.read_bytes()] == ["settings.toml"]
    # Where the run itself lies is what the person has just said.
    shown = [line for command in (private.first, private.again) for line in (command.out + command.err).splitlines()]
    shown = [line.replace(json.dumps(str(out))[1:-1], "") for line in shown]
    assert not [line for line in shown if "secretdir" in line]
    # What trials are scored by is named, what only the last step uses isn't.
    assert 'evaluation.judge_model="judge"' in card
    assert "heldout_scorers" not in card
    for name in (*heldout_files, "judge_", "heldout_scorers"):
        assert name not in json.dumps(json.loads(files["recipe.json"].read_text(encoding="utf-8"))["settings"])


def texts_of(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in nested settings."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from texts_of(entry, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from texts_of(entry, name)
    elif isinstance(value, str):
        yield name, value


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://me:secret@host:5432/db", "postgresql+psycopg://me:***@host:5432/db"),
        ("postgresql://me:se@cr/et@host/db?x=1", "postgresql://me:***@host/db?x=1"),
        ("postgresql://host/db?user=me&password=secret&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("sqlite:////tmp/a:b@c.db", "sqlite:////tmp/a:b@c.db"),
        ("", ""),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert without_password(url) == shown
    settings = load_settings("", {"search": {"storage": url}})
    assert "secret" not in dump_settings(settings)
    if shown == url:
        assert url in dump_settings(settings)


def test_a_card_never_names_the_storage(finished: Finished) -> None:
    _, first, settings = finished
    own = settings.model_copy(update={"search": settings.search.model_copy(update={"storage": f"pg://u:{PASSWORD}@h/d"})})
    assert PASSWORD not in recipe(own, first, "merged", 0)
