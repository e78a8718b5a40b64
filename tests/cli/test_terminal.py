"""What keys do at a question, on a terminal of the test's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.forked import Lean
from support.runs import copy_run
from support.terminals import AtTerminal

pytest.importorskip("pty")

QUESTION = "Export trial"


@pytest.mark.parametrize("key", [b"\x03", b"\x04", b"q"], ids=["Ctrl+C", "Ctrl+D", "q"])
def test_keys_at_the_question_which_trial(finished: tuple[Path, dict[str, Any], Any], tmp_path: Path, key: bytes) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    terminal = AtTerminal(["run", "--resume", "-o", run], QUESTION, Lean())
    code = terminal.press(key)
    if key == b"\x03":  # at once, and the trials are kept
        assert code == 130, terminal.seen
        assert f"--trial {finished[1]['selected']}" in " ".join(terminal.seen.split())
        assert not (run / "model").exists()
        return
    assert code == 0, terminal.seen
    assert terminal.seen.count("Front: ") == 1, "the front is shown once"
    shown = [terminal.seen.index(part) for part in ("took ", "report: ", "abliterate chat ", "abliterate export ")]
    assert shown == sorted(shown)
    if key == b"q":
        assert not (run / "model").exists()
        assert (run / "report.html").is_file()
    else:  # the end of the input takes the proposal
        assert (run / "model" / "config.json").is_file()
        assert json.loads((run / "result.json").read_text(encoding="utf-8"))["selected"] == finished[1]["selected"]


def test_a_chat_at_the_question_leads_back_to_it(finished: tuple[Path, dict[str, Any], Any], tmp_path: Path) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    terminal = AtTerminal(["run", "--resume", "-o", run], QUESTION, Lean())
    terminal.press_and_see(b"c", "/quit goes back")
    terminal.press_and_see(b"Hi there\r", "edited")
    terminal.press_and_see(b"\x03", "once more")
    terminal.press_and_see(b"\x03", QUESTION)  # ends the chat, and not the run
    terminal.press_and_see(b"c", "/quit goes back")
    terminal.press_and_see(b"/quit\r", QUESTION)
    assert terminal.press(b"q") == 0, terminal.seen
    assert not (run / "model").exists()
