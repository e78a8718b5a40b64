"""The command line of the tool, for scripts that run it in a process of its own."""

from __future__ import annotations

import sys


def command(*arguments: object) -> list[str]:
    """`abliterate` with these arguments, by this interpreter."""
    return [sys.executable, "-m", "abliterate", *map(str, arguments)]


def search_demo(trials: int, *arguments: object) -> list[str]:
    """A search of the demo model without refinement, as scripts that measure the search alone run it."""
    return command("run", "demo", "--no-refine", "-n", trials, *arguments)
