"""Profile the milliseconds of a trial. Writes the tables of docs/performance.md between their marks.

    .venv/bin/python scripts/profile_trial.py demo ~/.cache/abliterate-models/smollm2-refusing

Three kinds of trials of each model run on one thread: a hopeless trial (the pruner allows no refusal), a trial that is
pruned for its refusals, and a trial that survives and answers every prompt. Each kind has several trials that differ a little,
as in a study; with equal trials, drafts from earlier responses would always be right. Python's own profiler slows Python down,
so wall time is measured without it, and the profiler's shares are scaled to that.
"""

from __future__ import annotations

import argparse
import cProfile
import datetime
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rig import Rig, make_rig, settings_of

from abliterate.search.pruner import DominancePruner
from abliterate.types import Kernel, TrialParams

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
TEXT = ("responses.py", "refusals.py", "thinking.py", "stopping.py", "chat_template.py")
EDITS = ("edit_hooks.py", "experts.py", "editor.py")
GROUPS: tuple[tuple[str, Callable[[str, str], bool]], ...] = (
    ("matrix products", lambda file, name: "nn.linear" in name or ".matmul" in name),
    ("attention", lambda file, name: "scaled_dot_product" in name),
    ("cache: append, select rows, join", lambda file, name: "torch.cat" in name or "index_select" in name),
    ("text, markers, thinking blocks", lambda file, name: file.endswith(TEXT) or "tokeniz" in file + name.lower()),
    ("edit hooks", lambda file, name: file.endswith(EDITS) or "addcmul" in name or "edits/" in file),
    ("norms, rotary, activations, masks: other tensor operations", lambda file, name: file == "~"),
    ("Python between them", lambda file, name: True),
)


def strong(rig: Rig, shift: float) -> TrialParams:
    """An edit under which the demo and the real model answer nearly everything."""
    last = rig.bench.space.n_layers - 1
    kernel = Kernel(1.4 - shift, (0.55 + shift) * last, 1.2, 0.4 * last)
    return TrialParams("global", (0.55 + shift) * last, dict.fromkeys(rig.bench.space.components, kernel))


def weak(rig: Rig, shift: float) -> TrialParams:
    """An edit under which they refuse nearly everything."""
    last = rig.bench.space.n_layers - 1
    kernel = Kernel(0.8 + shift, (0.9 - shift) * last, 0.2, 0.2 * last)
    return TrialParams("per layer", 0.6 * last, dict.fromkeys(rig.bench.space.components, kernel))


def measure(
    rig: Rig, edit: Callable[[Rig, float], TrialParams], limit: int, trials: int
) -> tuple[float, int, int, str, dict[str, float]]:
    """(seconds, passes, tokens, state, share of each group), medians over trials that differ a little."""
    pruner = DominancePruner(((0.0, limit),), rig.bench.objectives)
    before = trials // 2
    shifts = [0.005 * step for step in range(before + trials)]
    for shift in shifts[:before]:
        rig.evaluate(0, edit(rig, shift), pruner)
    seconds, counts = [], []
    profile = cProfile.Profile()
    for index, shift in enumerate(shifts[before:]):
        passes, tokens, started = rig.counters.passes, rig.counters.tokens, time.perf_counter()
        if index % 2:
            trial = profile.runcall(rig.evaluate, 0, edit(rig, shift), pruner)
            continue
        trial = rig.evaluate(0, edit(rig, shift), pruner)
        seconds.append(time.perf_counter() - started)
        counts.append((rig.counters.passes - passes, rig.counters.tokens - tokens))
    groups = dict.fromkeys((name for name, _ in GROUPS), 0.0)
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in stats.items():
        groups[next(group for group, belongs in GROUPS if belongs(file, name))] += own
    total = sum(groups.values())
    passes, tokens = (round(statistics.median(column)) for column in zip(*counts, strict=True))
    return statistics.median(seconds), passes, tokens, trial.state, {name: own / total for name, own in groups.items()}


def profiled(model: str, trials: int) -> list[str]:
    """The table of a model, whose trials are `trials` a kind after half as many that only warm it up."""
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(settings_of(model, 0, [f"cache_dir={folder}", "evaluation.batch_size=100"]))
        kinds = {"hopeless (r* = 0)": (strong, 0), "stopped (r* = 10)": (weak, 10), "survivor": (strong, 10**6)}
        columns = {name: measure(rig, edit, limit, trials) for name, (edit, limit) in kinds.items()}
    lines = [f"| {Path(model).name} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines.append("| state | " + " | ".join(state for _, _, _, state, _ in columns.values()) + " |")
    lines.append("| passes | " + " | ".join(str(passes) for _, passes, _, _, _ in columns.values()) + " |")
    lines.append("| tokens | " + " | ".join(str(tokens) for _, _, tokens, _, _ in columns.values()) + " |")
    lines.append("| **milliseconds** | " + " | ".join(f"**{1000 * seconds:.0f}**" for seconds, *_ in columns.values()) + " |")
    for name, _ in GROUPS:
        cells = (f"{1000 * seconds * shares[name]:.0f}" for seconds, _, _, _, shares in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measure the three kinds of trials of each model and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--trials", type=int, default=11, help="of each kind, of which every second one is profiled")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python scripts/profile_trial.py {' '.join(args.models)} --trials {args.trials}".replace(str(Path.home()), "~")
    lines = [f"{datetime.date.today()}, `{command}`, one thread, batches of 100:"]
    for model in args.models:
        lines += ["", *profiled(model, args.trials)]
    print("\n".join(lines))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
