"""What shell completion offers for values: presets, run directories, trial numbers.

The shell starts the program at every press of the tab key, so nothing heavy is imported, and of a run only `result.json` is
read. A name that has nothing to offer is completed by the shell as a file.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from abliterate.artifacts.runs import RESULT, RUNS, runs_in
from abliterate.errors import AbliterateError
from abliterate.files import expanded
from abliterate.settings.presets import presets
from abliterate.types import kl_text

Offered = list[tuple[str, str]]
# Shells evaluate what they are offered, and a run directory may come from anybody, so other names are left to the shell's own
# completion of files, which quotes them.
_PLAIN = re.compile(r"[\w.,@%+=/~-]+")


def preset_names(ctx: Any, args: list[str], incomplete: str) -> Offered:
    """The presets that `-c` takes."""
    try:
        return [(name, "preset") for name in presets() if name.startswith(incomplete)]
    except AbliterateError:
        return []


def run_directories(ctx: Any, args: list[str], incomplete: str) -> Offered:
    """Run directories in `runs/` and in the folder that the typed text names, as they are to be typed; the newest first."""
    typed = os.path.dirname(incomplete)
    found = [(os.path.join(typed, run.name), run) for run in _runs(typed or ".")]
    found += [(str(run), run) for run in _runs(str(RUNS))]
    return [(name, "run") for name in dict(found) if name.startswith(incomplete) and _PLAIN.fullmatch(name)]


def runs_or_demo(ctx: Any, args: list[str], incomplete: str) -> Offered:
    """Run directories, and the demo model."""
    demo = [("demo", "the model that ships here")] if "demo".startswith(incomplete) else []
    return run_directories(ctx, args, incomplete) + demo


def trial_numbers(ctx: Any, args: list[str], incomplete: str) -> Offered:
    """The complete trials of the run on the command line, those on the front first."""
    given = ctx.params.get("run_directory") or ctx.params.get("target")
    # Behind an option whose value is still missing, the parser leaves the arguments as they are.
    record = next(filter(None, (_result(Path(str(path))) for path in (given, *ctx.args) if path)), {})
    front = record.get("front", [])
    trials = [one for one in record.get("trials", []) if one.get("state") == "complete"]
    trials.sort(key=lambda one: (one["number"] not in front, one["number"]))
    offered = [(str(one["number"]), _described(one, front)) for one in trials]
    return [(number, text) for number, text in offered if number.startswith(incomplete)]


def _runs(folder: str) -> list[Path]:
    try:
        return runs_in(expanded(folder))
    except AbliterateError:  # ~ of a user who doesn't exist
        return []


def _result(run: Path) -> dict[str, Any]:
    """The content of a run's `result.json`, unchecked; nothing if it isn't there or isn't what a run writes."""
    try:
        record = json.loads((expanded(run) / RESULT).read_text(encoding="utf-8"))
        sound = all(isinstance(one["number"], int) and isinstance(one["scores"], dict) for one in record["trials"])
        return record if sound and isinstance(record["front"], list) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AbliterateError):
        return {}


def _described(trial: dict[str, Any], front: list[Any]) -> str:
    """A trial in a few words, for shells that show them. Of scores that aren't what a run writes nothing is said."""
    scores, parts = trial["scores"], ["front"] if trial["number"] in front else []
    for name in ("unanswered", "refusals"):
        count = scores.get(name)
        count = count.get("count") if isinstance(count, dict) else count
        if isinstance(count, int):
            parts.append(f"{name} {count}")
    kl = scores.get("kl")
    if isinstance(kl, dict) and isinstance(kl.get("mean"), float):
        parts.append(f"KL {kl_text(kl['mean'])}")
    return ", ".join(parts)
