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

QUESTION = "Which trial is to be exported"


@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl+C", "Ctrl+D"])
def test_keys_at_the_question_which_trial(finished: tuple[Path, dict[str, Any], Any], tmp_path: Path, key: bytes) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    terminal = AtTerminal(["run", "--resume", "-o", run], QUESTION, Lean())
    code = terminal.press(key)
    if key == b"\x03":  # at once, and the trials are kept
        assert code == 130, terminal.seen
        assert f"--trial {finished[1]['selected']}" in " ".join(terminal.seen.split())
        assert not (run / "model").exists()
    else:  # the end of the input takes the default
        assert code == 0, terminal.seen
        assert (run / "model" / "config.json").is_file()
        assert json.loads((run / "result.json").read_text(encoding="utf-8"))["selected"] == finished[1]["selected"]
