"""Measure one variant of scripts/benchmark.py once, in this process: evaluate a fixed list of trials, or record a study."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rig import Rig, make_rig

from abliterate.pipeline import batch_size
from abliterate.pipeline.preflight import with_edit_mode
from abliterate.search.study import open_study
from abliterate.settings.sources import load_settings
from abliterate.types import BatchSizes, Trial, TrialParams


def record(rig: Rig, count: int, folder: Path) -> dict[str, Any]:
    """Record a study of `count` trials as `abliterate run` makes it."""
    study = open_study("", folder / "study.journal", rig.bench.space, rig.bench.settings.seed)
    study.claim({})
    done: list[Trial] = []
    for number in range(count):
        asked = study.ask()
        trial = rig.evaluate(number, asked.params, rig.pruner(done))
        study.tell(asked, trial, rig.baseline.prompts)
        done.append(trial)
    return {"trials": [trial.to_record() for trial in done]}


def replay(rig: Rig, study: list[Trial], count: int) -> dict[str, Any]:
    """Evaluate `count` trials of the study, evenly spaced, each with the pruning limit that it had there."""
    step = max(1, len(study) // count)
    chosen = list(range(0, len(study), step))[:count]
    before = (rig.counters.passes, rig.counters.tokens)
    seconds = edit_seconds = 0.0
    adapters = {"hits": 0, "misses": 0}
    trials = []
    for number in chosen:
        pruner = rig.pruner(study[:number])
        before_trial = rig.bench.caches()["adapters"]
        started = time.perf_counter()
        trial = rig.evaluate(number, study[number].params, pruner)
        seconds += time.perf_counter() - started
        for kind, counted in rig.bench.caches()["adapters"].items():
            adapters[kind] += counted - before_trial[kind]
        edit_seconds += edit_time(rig, study[number].params, study[max(0, number - step)].params)
        limit = pruner.limit({"kl": trial.kl}, "refusals")
        figures = {"number": number, "state": trial.state, "refusals": trial.refusals, "kl": trial.kl, "limit": limit}
        trials.append(figures | {"seconds": trial.seconds})
    counts = {"passes": rig.counters.passes - before[0], "tokens": rig.counters.tokens - before[1]}
    return {
        "trials": trials,
        "seconds": seconds,
        "edit_seconds": edit_seconds,
        "adapters": adapters,
        **counts,
        **rig.memory.stop(),
    }


def edit_time(rig: Rig, params: TrialParams, before: TrialParams) -> float:
    """Seconds that the adapter update of a trial takes after another trial; it is measured apart from the trial's own time."""
    with rig.bench.edited(before):
        pass
    started = time.perf_counter()
    rig.bench.editor.apply(params)
    seconds = time.perf_counter() - started
    rig.bench.editor.suspend()
    return seconds


def main() -> None:
    """Set up the model, measure, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--study", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--record", type=int, default=0)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--edit-mode", default="full")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--batch-sizes", type=int, nargs=3, help="of residuals, prefill and decoding. Default: measured")
    parser.add_argument("--off", nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], help="prompt sources as name=path")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {
        "model": args.model,
        "cache_dir": str(args.cache),
        "prompts": dict(p.split("=", 1) for p in args.set),
    }
    options |= {"efficiency": dict.fromkeys(args.off, False), "edit": {"mode": args.edit_mode}}
    if args.batch_sizes:
        batch_size.batch_sizes = lambda *_: BatchSizes(*args.batch_sizes)  # type: ignore[assignment]
    settings = with_edit_mode(load_settings("", options))
    if args.reference:
        settings = settings.model_copy(update={"efficiency": settings.efficiency.reference()})
    if args.record:
        settings = settings.model_copy(update={"search": settings.search.model_copy(update={"trials": args.record})})
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        rig = make_rig(settings)
        startup = time.perf_counter() - started
        stages = dict(rig.bench.context.clock.timings)
        if args.record:
            result = record(rig, args.record, Path(folder))
        else:
            records = json.loads(args.study.read_text(encoding="utf-8"))["trials"]
            study = [Trial.from_record(trial) for trial in records]
            result = replay(rig, study, args.count)
    hits = rig.bench.caches() | {"adapters": result.get("adapters", {"hits": 0, "misses": 0})}
    result |= {"startup": startup, "stages": stages, "hits": hits, "batch_sizes": rig.bench.sizes.by_name}
    args.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
