"""Readers that go (`| head`, q in `less`) and encodings that aren't UTF-8: no command ends of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.terminal.streams import UNREAD
from support.cli import Finished, spawn
from support.forked import Pipes, finish, write_config
from support.runs import copy_run, quick_options

C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_run_goes_on_without_its_reader(finished: Finished, prompt_files: dict[str, str], tmp_path: Path) -> None:
    cache = finished[0].parent / "cache"  # of a run with the same model and prompts
    config = write_config(tmp_path / "q.toml", quick_options(prompt_files, cache, search={"trials": 2}))
    command = finish(["run", "demo", "-c", config, "-o", "run", "--export", "none"], tmp_path, before=Pipes(1))
    assert command.end() == 0, command.err
    assert command.err == f"{UNREAD}\n"
    record = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert len(record["trials"]) == 2
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["trials", "run"], 0), (["trials", "run", "--csv"], 0), (["report", "run"], 0), (["trials", "none", "--json"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_ends_as_it_would(arguments: list[str], code: int, finished: Finished, tmp_path: Path) -> None:
    copy_run(finished[0], tmp_path / "run")
    for unread in ((1,), (1, 2)):
        command = finish(arguments, tmp_path, before=Pipes(*unread))
        assert command.end() == code, command.err
        assert "Traceback" not in command.err
        assert UNREAD not in command.err, "what ends at once doesn't go on"


def test_a_chat_answers_the_rest_without_its_reader(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("Hello\nHow are you?\n/save said.json\n", encoding="utf-8")
    command = finish(["chat", "demo", "--max-new-tokens", "4"], tmp_path, before=Pipes(1, typed="asked.txt"))
    assert command.end() == 0, command.err
    assert command.err.count(UNREAD) == 1
    assert len(json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))["turns"]) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "cp437", "ascii"])
def test_a_chat_reads_utf8_whatever_the_system_says(encoding: str, tmp_path: Path) -> None:
    asked = ["Grüße 😀 ≥", "naïve"]
    content = "\ufeff" + "\n".join([*asked, "/system Sei «kurz»", "/save said.json"]) + "\n"
    (tmp_path / "asked.txt").write_text(content, encoding="utf-8")
    pipes = Pipes(typed="asked.txt", encoding=encoding)
    command = finish(["chat", "demo", "--max-new-tokens", "4"], tmp_path, before=pipes)
    assert command.end() == 0, command.err
    assert "system prompt for the whole conversation: Sei «kurz»" in command.err
    said = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert [turn["prompt"] for turn in said["turns"]] == asked


@pytest.mark.parametrize("environment", [C_LOCALE, {"PYTHONIOENCODING": "cp1252:strict"}], ids=["C", "cp1252"])
def test_output_is_utf8_whatever_the_system_says(environment: dict[str, str], finished: Finished, tmp_path: Path) -> None:
    process = spawn(["trials", finished[0]], tmp_path, **environment)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "★" in out
