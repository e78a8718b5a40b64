"""Record an interrupted and resumed run as a person sees it: drive a terminal through tmux and write its screens to docs/.

    python scripts/record_interrupted.py [--out docs/interrupted-run.md]

The script needs tmux. The screens are captured as they are, without colours.
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
# An interrupted run, and how it continues

Recorded by `scripts/record_interrupted.py` in a terminal of {width} × {height}: `abliterate run demo -n 12`, Ctrl+C after a few
trials, then `--resume`.
{scenes}"""


class Terminal:
    """A separate tmux session in a folder, with `abliterate` on its path."""

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
        """Press keys, by tmux's names."""
        subprocess.run(["tmux", "-L", self._server, "send-keys", *keys], check=True)

    def screen(self) -> str:
        """The text on the screen now."""
        shown = subprocess.run(["tmux", "-L", self._server, "capture-pane", "-p"], capture_output=True, text=True, check=True)
        return "\n".join(line.rstrip() for line in shown.stdout.rstrip().split("\n"))

    def wait(self, seen: Callable[[str], bool], seconds: float = 60) -> str:
        """The screen as soon as `seen` accepts it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if seen(screen := self.screen()):
                return screen
            time.sleep(0.1)
        raise SystemExit(f"The terminal doesn't show the expected screen, but this:\n{self.screen()}")

    def close(self) -> None:
        """End the session."""
        subprocess.run(["tmux", "-L", self._server, "kill-server"], check=False)


def record(terminal: Terminal) -> list[tuple[str, str]]:
    """The scenes of the whole story: (what happens, the screen then)."""
    scenes = []
    terminal.wait(lambda screen: screen.endswith("$"))
    terminal.type("abliterate run demo -n 12 -o my-run", "Enter")
    screen = terminal.wait(lambda screen: "4/12" in screen)
    scenes.append(("The run has started: the fourth trial is done.", screen))
    terminal.type("C-c")
    terminal.wait(lambda screen: "interrupted" in screen and screen.endswith("$"))
    terminal.type("echo exit code: $?", "Enter")
    screen = terminal.wait(lambda screen: "exit code: 130" in screen)
    scenes.append(
        ("Ctrl+C: the run stops after the current pass, and tells which trials are kept and how to continue.", screen)
    )
    terminal.type("clear", "Enter")
    time.sleep(0.5)
    terminal.type("abliterate run --resume --out my-run --select knee", "Enter")
    terminal.wait(lambda screen: "are kept from before" in screen)
    screen = terminal.wait(lambda screen: "12/12" in screen)
    scenes.append(("The run continues without the model being named again; the earlier trials are kept.", screen))
    terminal.wait(lambda screen: "exported (" in screen and screen.endswith("$"))
    terminal.type("echo exit code: $?; ls my-run", "Enter")
    screen = terminal.wait(lambda screen: "exit code: 0" in screen and "study.journal" in screen)
    scenes.append(("The end, and the content of the run directory.", screen))
    return scenes


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "interrupted-run.md")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder))
        try:
            scenes = record(terminal)
        finally:
            terminal.close()
    out.write_text(PAGE.format(width=WIDTH, height=HEIGHT, scenes=in_order(scenes)), encoding="utf-8")


def in_order(scenes: Sequence[tuple[str, str]]) -> str:
    """The scenes as Markdown."""
    return "".join(f"\n{number}. {event}\n\n```text\n{screen}\n```\n" for number, (event, screen) in enumerate(scenes, 1))


if __name__ == "__main__":
    main()
