"""Measure the cost of putting a trial's edits on the model: exact edits, new svd edits, and svd edits from the memo.

.venv/bin/python scripts/measure_edits.py      # writes the section "Adapter updates" of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmark_page import command, update_page
from rig import Rig, make_rig, timed

from abliterate.settings.sources import load_settings
from abliterate.types import TrialParams

ROOT = Path(__file__).parents[1]


def make(representation: str, cache: Path) -> Rig:
    """Load the demo model with edits of one representation."""
    options = {"model": "demo", "cache_dir": str(cache), "edit": {"representation": representation}}
    return make_rig(load_settings("", options))


def updates(rig: Rig, trials: Sequence[TrialParams]) -> float:
    """Median seconds of an update, each of which follows the edits of another trial."""
    return statistics.median(timed(lambda params=params: rig.bench.editor.apply(params))[1] for params in trials)


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        exact, svd = make("exact", Path(folder)), make("svd", Path(folder))
        trials = exact.bench.space.samples(args.trials, seed=1)
        trial = statistics.mean(done.seconds for done in exact.replay(trials))
        medians = {"exact": updates(exact, trials), "svd, not in the memo": updates(svd, trials)}
        assert (svd.bench.editor.memo.hits, svd.bench.editor.memo.misses > 0) == (0, True)
        medians["svd, from the memo"] = updates(svd, trials)
        assert svd.bench.editor.memo.hits > 0
    lines = [
        f"{datetime.date.today()}, `{command()}`: the demo model, {args.trials} random trials, {args.threads} threads; a trial",
        f"takes {trial:.3f} s on average.",
        "",
        "| edits | ms an update (median) | of a trial |",
        "|---|---|---|",
        *(f"| {name} | {1000 * seconds:.2f} | {seconds / trial:.2%} |" for name, seconds in medians.items()),
    ]
    print("\n".join(lines))
    update_page(ROOT / "docs" / "benchmarks.md", "Adapter updates", "\n".join(lines))


if __name__ == "__main__":
    main()
