"""Measure the cost of putting a trial's edits on the model: exact edits, new svd edits, and svd edits from the memo.

.venv/bin/python scripts/measure_edits.py demo DIR     # writes the section "Adapter updates" of docs/benchmarks.md

A model is `demo`, or a folder that `train_demo_model.py --variant` or `real_model.py` made, with its prompts.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark_page import command, counted, update_page
from rig import Rig, make_rig, settings_of, timed

from abliterate.types import TrialParams

ROOT = Path(__file__).parents[1]


def make(model: str, representation: str, cache: Path) -> Rig:
    """Load a model with edits of one representation."""
    return make_rig(settings_of(model, 0, [f"cache_dir={cache}", f"edit.representation={representation}"]))


def updates(rig: Rig, trials: Sequence[TrialParams]) -> float:
    """Median seconds of an update, each of which follows the edits of another trial."""
    return statistics.median(timed(lambda params=params: rig.bench.editor.apply(params))[1] for params in trials)


def rows(model: str, count: int) -> list[str]:
    """The rows of a model: its trials' mean, and the medians of `count` updates."""
    with tempfile.TemporaryDirectory() as folder:
        exact, svd = make(model, "exact", Path(folder)), make(model, "svd", Path(folder))
        trials = exact.bench.space.samples(count, seed=1)
        trial = statistics.mean(done.seconds for done in exact.replay(trials))
        medians = {"exact": updates(exact, trials), "svd, not in the memo": updates(svd, trials)}
        assert (svd.bench.editor.memo.hits, svd.bench.editor.memo.misses > 0) == (0, True)
        medians["svd, from the memo"] = updates(svd, trials)
        assert svd.bench.editor.memo.hits > 0
    name = Path(model).name
    return [
        f"| {name} | {trial:.3f} | {edits} | {1000 * seconds:.2f} | {seconds / trial:.2%} |"
        for edits, seconds in medians.items()
    ]


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"{datetime.date.today()}, `{command()}`: {args.trials} random trials of each model, "
        f"{counted(args.threads, 'thread')}.",
        "",
        "| model | s a trial (mean) | edits | ms an update (median) | of a trial |",
        "|---|---|---|---|---|",
        *(row for model in args.models for row in rows(model, args.trials)),
    ]
    print("\n".join(lines))
    update_page(ROOT / "docs" / "benchmarks.md", "Adapter updates", "\n".join(lines))


if __name__ == "__main__":
    main()
