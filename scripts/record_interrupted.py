"""Record an interrupted and resumed run as a person sees it: drives a terminal through tmux and writes the screens to docs/.

    python scripts/record_interrupted.py [--out docs/interrupted-run.md]

Needs tmux. The screens are captured as they stand, without colours.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 124, 44
PAGE = """\
# An interrupted run, and how it goes on

Recorded by `scripts/record_interrupted.py` in a terminal of {width} × {height}, as the screens stood.
`abliterate run demo -n 12`, Ctrl+C after a few trials, then `--resume`.
{parts}"""


class Terminal:
    """A tmux session of its own, in a folder, with `abliterate` on its path."""

    def __init__(self, folder: Path, height: int = HEIGHT) -> None:
        self._server = f"abliterate-{uuid.uuid4().hex[:8]}"
        (folder / "abliterate").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m abliterate "$@"\n')
        (folder / "abliterate").chmod(0o755)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT / "src"),
            "ABLITERATE_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "LC_ALL": "C.UTF-8",
            "PS1": "$ ",
        }
        command = ["new-session", "-d", "-x", str(WIDTH), "-y", str(height), "-c", str(folder), "bash", "--norc", "--noprofile"]
        subprocess.run(["tmux", "-u", "-L", self._server, *command], env=environment, check=True)

    def type(self, *keys: str) -> None:
        """Keys as tmux names them."""
        subprocess.run(["tmux", "-L", self._server, "send-keys", *keys], check=True)

    def screen(self) -> str:
        """What stands on the screen now."""
        shown = subprocess.run(["tmux", "-L", self._server, "capture-pane", "-p"], capture_output=True, text=True, check=True)
        return "\n".join(line.rstrip() for line in shown.stdout.rstrip().split("\n"))

    def wait(self, seen: Callable[[str], bool], seconds: float = 60) -> str:
        """The screen as soon as it shows what is waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if seen(screen := self.screen()):
                return screen
            time.sleep(0.1)
        raise SystemExit(f"The terminal doesn't show what was waited for:\n{self.screen()}")

    def close(self) -> None:
        """End the session."""
        subprocess.run(["tmux", "-L", self._server, "kill-server"], check=False)


def record(terminal: Terminal) -> list[tuple[str, str]]:
    """(what happens, the screen then) of the whole story."""
    parts = []
    terminal.wait(lambda screen: screen.endswith("$"))
    terminal.type("abliterate run demo -n 12 -o my-run", "Enter")
    screen = terminal.wait(lambda screen: "4/12" in screen)
    parts.append(("The run has begun: the fourth trial is done.", screen))
    terminal.type("C-c")
    terminal.wait(lambda screen: "interrupted" in screen and screen.endswith("$"))
    terminal.type("echo exit code: $?", "Enter")
    screen = terminal.wait(lambda screen: "exit code: 130" in screen)
    parts.append(("Ctrl+C: it stops after the current pass, says what is kept and how to go on.", screen))
    terminal.type("clear", "Enter")
    time.sleep(0.5)
    terminal.type("abliterate run --resume --out my-run --select knee", "Enter")
    terminal.wait(lambda screen: "are kept from before" in screen)
    screen = terminal.wait(lambda screen: "12/12" in screen)
    parts.append(("Continued, without naming the model again: the trials of before are kept.", screen))
    terminal.wait(lambda screen: "exported (" in screen and screen.endswith("$"))
    terminal.type("echo exit code: $?; ls my-run", "Enter")
    screen = terminal.wait(lambda screen: "exit code: 0" in screen and "study.journal" in screen)
    parts.append(("The end, and what is in the run directory.", screen))
    return parts


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "interrupted-run.md")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder))
        try:
            parts = record(terminal)
        finally:
            terminal.close()
    out.write_text(PAGE.format(width=WIDTH, height=HEIGHT, parts=in_order(parts)), encoding="utf-8")


def in_order(parts: Sequence[tuple[str, str]]) -> str:
    """What happened, as Markdown."""
    return "".join(f"\n{number}. {what}\n\n```text\n{screen}\n```\n" for number, (what, screen) in enumerate(parts, 1))


if __name__ == "__main__":
    main()
