"""Measure several workers at one study: two on two cores against one, and 64 simulated ones at one PostgreSQL server.

Writes docs/workers.md. The simulation's workers ask, wait as long as a trial may take, and tell; what they take beyond waiting
is the storage's and the sampler's.
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
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # what follows is imported from there

# ruff: noqa: E402
from support.postgres import server

PAGE = """# Several workers

By `python scripts/measure_workers.py`, {cores} cores, one thread each process, {date}.

## The demo model on two cores

`abliterate run demo -n {trials} --export none --set efficiency.use_certified_stop=false --gpus N --device cpu`: every trial is
evaluated in full, so that all take about as long whatever the others find. Seconds of the stage `search`, in which a further
worker also starts and loads the model; of {repeats} searches each, taken in turn, the shortest.

| workers | search, s | speed-up | efficiency | trials of each worker |
|---|---|---|---|---|
{rows}

## {simulated} simulated workers at one PostgreSQL server

{processes} processes of {threads} workers; a trial takes {low:.0f} to {high:.0f} s, {budget} trials.

| | |
|---|---|
| trials told | {told}, each slot once: {exact} |
| trials begun for them | {begun} |
| duration | {seconds:.1f} s; the same trials without any cost of asking and telling {ideal:.1f} s |
| efficiency | {efficiency:.0%} |
| share of a worker's time in trials | {share:.1%} |
| of it in the database | {database:.1%} |
| asking for a trial, median and 95 % | {ask:.3f} s, {ask95:.3f} s |
| telling one, median and 95 % | {tell:.3f} s, {tell95:.3f} s |

Without cost: each trial given to the worker that is free first, in their order, so what is lost at the end, where some have
none left, isn't counted as the storage's. All workers start at the same moment and share {cores} cores for what samplers
compute and for the server itself.
"""


def main() -> None:
    """Both measurements."""
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
    found = simulate(args.workers, args.processes, args.budget, args.seconds)
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
        **found,
    )
    args.out.write_text(page, encoding="utf-8")
    print(page)


def search_seconds(workers: int, trials: int) -> tuple[float, str]:
    """Seconds of the search of the demo model, and how many trials each worker had."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "run"
        command = [sys.executable, "-m", "abliterate", "run", "demo", "-n", str(trials), "-o", str(out), "--export", "none"]
        command += ["--set", "evaluation.heldout=false"]
        command += ["--set", "efficiency.use_certified_stop=false", "--gpus", str(workers), "--device", "cpu"]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        assert [trial["number"] for trial in result["trials"]] == list(range(trials))
        from abliterate.search.study import STUDY_NAME
        from support.fake_worker import study_of

        told: dict[str, int] = {}
        for one in study_of("", out / "study.journal", STUDY_NAME, "watcher", trials, 60)._all():
            told[one.user_attrs["worker"]] = told.get(one.user_attrs["worker"], 0) + 1
        return float(result["timings"]["search"]), " + ".join(map(str, sorted(told.values(), reverse=True)))


def simulate(workers: int, processes: int, budget: int, seconds: float) -> dict[str, object]:
    """So many workers at a PostgreSQL server of our own."""
    threads = workers // processes
    with server() as postgres:
        url = postgres.make("workers")
        from support.fake_worker import study_of

        study_of(url, Path(), "s", "watcher", budget, 60)
        command = [sys.executable, str(ROOT / "tests" / "support" / "fake_worker.py"), url, "x", "s"]
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
