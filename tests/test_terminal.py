"""What keys do at a question, on a terminal of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import copy_run

pty = pytest.importorskip("pty")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

QUESTION = "Which trial is to be exported"


class AtTerminal:
    """`abliterate run --resume` in a terminal, up to the question which trial is to be exported."""

    def __init__(self, run: Path) -> None:
        self._terminal, inside = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "abliterate", "run", "--resume", "-o", str(run)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl+C is a signal
        )
        os.close(inside)
        timer = threading.Timer(120, self._process.kill)
        timer.daemon = True
        timer.start()
        self.seen = ""
        while QUESTION not in self.seen and (text := self._read()):
            self.seen += text
        assert QUESTION in self.seen

    def press(self, key: bytes) -> int:
        """The exit code after a key; what is shown is in `seen`."""
        time.sleep(0.5)  # until the question waits for input
        os.write(self._terminal, key)
        while text := self._read():
            self.seen += text
        os.close(self._terminal)
        return self._process.wait()

    def _read(self) -> str:
        try:
            return os.read(self._terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            return ""


@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["Ctrl+C", "Ctrl+D"])
def test_keys_at_the_question_which_trial(finished: tuple[Path, dict[str, Any], Any], tmp_path: Path, key: bytes) -> None:
    run = copy_run(finished[0], tmp_path / "run")
    shutil.rmtree(run / "model")
    terminal = AtTerminal(run)
    code = terminal.press(key)
    if key == b"\x03":  # at once, and the trials are kept
        assert code == 130, terminal.seen
        assert f"--trial {finished[1]['selected']}" in " ".join(terminal.seen.split())
        assert not (run / "model").exists()
    else:  # the end of the input takes the default
        assert code == 0, terminal.seen
        assert (run / "model" / "config.json").is_file()
        assert json.loads((run / "result.json").read_text(encoding="utf-8"))["selected"] == finished[1]["selected"]
