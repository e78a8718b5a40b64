"""Measure how coarse the grid of coeffs and direction indices may be. Writes docs/svd-grid.md.

The demo runs with the svd representation for several grids, with the same seeds and number of trials. The grids are compared by
the front's hypervolume (docs/design.md §4: reference point KL 1, share 1) and the memo's hit rate:

    .venv/bin/python scripts/measure_svd_grid.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from abliterate.search.front import hypervolume, pareto_front
from abliterate.types import Baseline, Trial

GRIDS = ((0.0, 0.0), (0.02, 0.1), (0.05, 0.25), (0.1, 0.5))


def measure(coeff_grid: float, direction_grid: float, seed: int, trials: int, folder: Path) -> tuple[float, float, float]:
    """(hypervolume, memo hit rate, median seconds of a trial) of one run."""
    out = folder / f"{coeff_grid}-{seed}"
    command = [sys.executable, "-m", "abliterate", "run", "demo", "-n", str(trials), "--seed", str(seed), "-o", str(out)]
    command += ["--export", "none", "--set", "edit.representation=svd", "--set", "evaluation.heldout=false"]
    command += ["--set", f"edit.coeff_grid={coeff_grid}", "--set", f"edit.direction_grid={direction_grid}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    baseline = Baseline(**result["baseline"])
    trials_done = [Trial.from_record(record) for record in result["trials"]]
    memo = result["caches"]["svd"]
    rate = memo["hits"] / max(1, memo["hits"] + memo["misses"])
    seconds = statistics.median(trial.seconds for trial in trials_done)
    return hypervolume(pareto_front(trials_done, baseline), baseline), rate, seconds


def main() -> None:
    """Measure every grid on every seed and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    lines = [
        "# Snapping coeffs and direction indices to a grid",
        "",
        f"Made on {datetime.date.today()} by `python {' '.join(sys.argv)}`: the demo model, svd representation of rank 3,",
        f"{args.trials} trials, seeds {args.seeds}. Grid 0 rounds nothing.",
        "",
        "| coeff grid | direction grid | hypervolume by seed | median | memo hit rate | seconds a trial |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for coeff_grid, direction_grid in GRIDS:
            runs = [measure(coeff_grid, direction_grid, seed, args.trials, Path(folder)) for seed in args.seeds]
            volumes, rates, seconds = zip(*runs, strict=True)
            lines.append(
                f"| {coeff_grid} | {direction_grid} | {', '.join(f'{v:.3f}' for v in volumes)} "
                f"| {statistics.median(volumes):.3f} | {statistics.mean(rates):.1%} | {statistics.median(seconds):.2f} |"
            )
            print(lines[-1], flush=True)
    page = Path(__file__).parents[1] / "docs" / "svd-grid.md"
    page.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
