"""Measure several workers at one study: two workers on two cores against one, and 64 simulated workers at a PostgreSQL server.

Writes docs/workers.md. A simulated worker asks for a trial, waits as long as a trial may take, and tells its scores; the time
beyond the waiting is the storage's and the sampler's.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the imports below come from there

# ruff: noqa: E402
from postgres import server

PAGE = """# Several workers

By `python scripts/measure_workers.py`, {cores} cores, one thread each process, {date}.

## The demo model on two cores

`abliterate run demo -n {trials} --export none --set efficiency.use_certified_stop=false --gpus N --device cpu`: every trial is
evaluated in full, so that each takes about as long whatever the other trials find. Seconds of the stage `search`, in which a
second worker also starts and loads the model; the shortest of {repeats} searches each, taken in turn.

| workers | search, s | speed-up | efficiency | trials of each worker |
|---|---|---|---|---|
{rows}

## {simulated} simulated workers at one PostgreSQL server

{processes} processes of {threads} workers; a trial takes {low:.0f} to {high:.0f} s, {budget} trials.

| | |
|---|---|
| finished trials | {told}, each slot once: {exact} |
| trials begun for them | {begun} |
| duration | {seconds:.1f} s; the same trials without any cost of asking and telling {ideal:.1f} s |
| efficiency | {efficiency:.0%} |
| share of a worker's time in trials | {share:.1%} |
| of it in the database | {database:.1%} |
| asking for a trial, median and 95 % | {ask:.3f} s, {ask95:.3f} s |
| telling a trial, median and 95 % | {tell:.3f} s, {tell95:.3f} s |

Without cost, each trial is given in order to the worker that is free first, so that the time lost at the end, when some workers
have no trial left, isn't counted as the storage's. All workers start at the same moment and share {cores} cores with their
samplers and the server itself.
"""


def main() -> None:
    """Make both measurements and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a simulated trial")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "workers.md")
    args = parser.parse_args()
    best: dict[int, tuple[float, str]] = {}
    for count in (1, 2) * args.repeats:
        best[count] = min(best.get(count, (math.inf, "")), search_seconds(count, args.trials))
    rows, first = [], best[1][0]
    for count, (seconds, shares) in best.items():
        rows.append(f"| {count} | {seconds:.1f} | {first / seconds:.2f} | {first / seconds / count:.0%} | {shares} |")
    simulation = simulate(args.workers, args.processes, args.budget, args.seconds)
    page = PAGE.format(
        cores=os.cpu_count(),
        date=time.strftime("%F"),
        trials=args.trials,
        repeats=args.repeats,
        rows="\n".join(rows),
        simulated=args.workers,
        processes=args.processes,
        threads=args.workers // args.processes,
        low=0.5 * args.seconds,
        high=1.5 * args.seconds,
        budget=args.budget,
        **simulation,
    )
    args.out.write_text(page, encoding="utf-8")
    print(page)


def search_seconds(workers: int, trials: int) -> tuple[float, str]:
    """Seconds of the search of the demo model, and the number of trials of each worker."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "abliterate", "run", "demo", "-n", str(trials), "-o", str(out), "--export", "none"]
        command += ["--set", "evaluation.heldout=false"]
        command += ["--set", "efficiency.use_certified_stop=false", "--gpus", str(workers), "--device", "cpu"]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        assert [trial["number"] for trial in result["trials"]] == list(range(trials))
        from fake_worker import study_of

        from abliterate.search.study import STUDY_NAME

        counts: Counter[str] = Counter()
        for trial in study_of("", out / "study.journal", STUDY_NAME, "watcher", trials, 60)._all():
            counts[trial.user_attrs["worker"]] += 1
        return float(result["timings"]["search"]), " + ".join(map(str, sorted(counts.values(), reverse=True)))


def simulate(workers: int, processes: int, budget: int, seconds: float) -> dict[str, object]:
    """Simulate `workers` workers at a PostgreSQL server that is started for them."""
    threads = workers // processes
    with server() as postgres:
        url = postgres.make("workers")
        from fake_worker import study_of

        study_of(url, Path(), "s", "watcher", budget, 60)
        command = [sys.executable, str(ROOT / "tests" / "fake_worker.py"), url, "x", "s"]
        running = [
            subprocess.Popen(
                [*command, f"p{index}", str(budget), str(seconds), "60", str(threads)], stdout=subprocess.PIPE, text=True
            )
            for index in range(processes)
        ]
        lines = [line.split() for process in running for line in process.communicate()[0].splitlines()]
        watcher = study_of(url, Path(), "s", "watcher", budget, 60)
        finished, begun = watcher.trials(), len(watcher._all())
    ask, tell = ([float(line[index]) for line in lines] for index in (1, 2))
    waited = [float(line[3]) for line in sorted(lines, key=lambda line: float(line[4]))]
    began, ended = min(float(line[4]) for line in lines), max(float(line[5]) for line in lines)
    total, database = sum(waited) + sum(ask) + sum(tell), sum(float(line[6]) for line in lines)
    free = [0.0] * workers
    for wait in waited:
        heapq.heapreplace(free, free[0] + wait)
    return {
        "told": len(finished),
        "exact": "yes" if [trial.number for trial in finished] == list(range(budget)) else "NO",
        "seconds": ended - began,
        "begun": begun,
        "ideal": max(free),
        "efficiency": max(free) / (ended - began),
        "share": sum(waited) / total,
        "database": database / total,
        "ask": statistics.median(ask),
        "ask95": statistics.quantiles(ask, n=20)[-1],
        "tell": statistics.median(tell),
        "tell95": statistics.quantiles(tell, n=20)[-1],
    }


if __name__ == "__main__":
    main()
