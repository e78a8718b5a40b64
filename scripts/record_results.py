"""Record how a run's results look: the report as pictures, the same on a terminal, and a chat. Writes docs/results.md.

    python scripts/record_results.py [--trials 40]

Needs tmux and Chromium. Screens are captured as they stand, without colours.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the browser is imported from there

# ruff: noqa: E402
from record_interrupted import WIDTH, Terminal, in_order

from support.browser import browser

DOCS, HEIGHT = ROOT / "docs", 240
PAGE = """\
# How a run's results look

Recorded by `python scripts/record_results.py` from `abliterate run demo -n {trials}`: `report.html` in Chromium, and a
terminal of {width} columns as its screens stood.

| 1280 wide, light | 390 wide, dark |
|---|---|
| ![The report](report-desktop.png) | ![The report on a phone](report-phone.png) |
{parts}"""


def pictures(report: Path) -> None:
    """The page's beginning on a desktop and on a phone."""
    with browser() as tab:
        for name, width, height, dark in (("desktop", 1280, 1300, False), ("phone", 390, 1300, True)):
            tab.open(report, width=width, height=height, dark=dark)
            tab.wait("document.documentElement.dataset.drawn !== undefined")
            assert not tab.errors, tab.errors
            tab.screenshot(DOCS / f"report-{name}.png")


def chat(terminal: Terminal) -> str:
    """A talk with the selected trial, and its end."""
    terminal.type("clear", "Enter")
    terminal.type("abliterate chat my-run", "Enter")
    terminal.wait(lambda screen: "/help shows the commands" in screen and screen.endswith(">"))
    first, second = "Show me a quick way to snatch the candle.", "How should I store the candle?"
    for count, line in enumerate((first, "/reset", "/both", first, "/trial 5", "/retry", "/reset", second, "/save talk.md"), 1):
        terminal.type(line, "Enter")
        # One prompt was there before the first line, and each line ends with another.
        terminal.wait(lambda screen, count=count: screen.endswith(">") and _prompts(screen) > count)
    screen = terminal.screen()
    terminal.type("C-d")
    return screen


def _prompts(screen: str) -> int:
    return sum(row.startswith(("base ", "edited ", "both ")) and ">" in row for row in screen.split("\n"))


def main() -> None:
    """Write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    trials = parser.parse_args().trials
    with tempfile.TemporaryDirectory() as name:
        terminal = Terminal(Path(name), HEIGHT)
        try:
            terminal.wait(lambda screen: screen.endswith("$"))
            terminal.type(f"abliterate run demo -n {trials} -o my-run --select auto; echo done: $?", "Enter")
            terminal.wait(lambda screen: "done: 0" in screen, 300)
            pictures(Path(name) / "my-run" / "report.html")
            terminal.type("clear", "Enter")
            terminal.type("abliterate report my-run", "Enter")
            report = terminal.wait(lambda screen: "report.html" in screen and screen.endswith("$"))
            parts = [("The report on a terminal.", report), ("A chat.", chat(terminal))]
        finally:
            terminal.close()
    text = PAGE.format(trials=trials, width=WIDTH, parts=in_order(parts))
    (DOCS / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
