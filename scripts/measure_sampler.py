"""Compare three ways of telling the sampler about a pruned trial. Writes docs/sampler.md.

Each seed has one study of the demo model per variant: every trial is evaluated in full; pruned trials are told as PRUNED; or
pruned trials are told with (KL, r*), their optimistic bound. The variants share seeds and startup trials, and are compared by
the front's hypervolume.

    .venv/bin/python scripts/measure_sampler.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from optuna.trial import TrialState
from rig import Rig, make_rig

from abliterate.search.front import hypervolume, pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.search.study import Asked, Study, open_study
from abliterate.settings.sources import load_settings
from abliterate.types import Trial

VARIANTS = ("full", "pruned", "bound")


def tell(study: Study, asked: Asked, trial: Trial, prompts: int, variant: str) -> None:
    """Tell the study about a trial as `Study.tell` does, but by variant."""
    asked.handle.set_user_attr("record", json.dumps(trial.to_record()))
    if trial.state == "stopped" and variant == "pruned":
        study._study.tell(asked.handle, state=TrialState.PRUNED)
    else:
        study._study.tell(asked.handle, [trial.kl, trial.refusals / prompts])


def run(rig: Rig, variant: str, trials: int, journal: Path, known: dict[str, Trial]) -> tuple[float, int]:
    """(hypervolume, number of pruned trials) of one study."""
    study = open_study("", journal, rig.space, rig.context.settings.seed)
    study.claim({})
    never = DominancePruner(((0.0, sys.maxsize),))
    done: list[Trial] = []
    for number in range(trials):
        asked = study.ask()
        key = json.dumps(asked.params.to_record())
        if variant == "full" and key not in known:
            known[key] = rig.evaluate(number, asked.params, never)
        pruner = never if variant == "full" else DominancePruner.of(done, rig.baseline)
        trial = known[key] if variant == "full" else rig.evaluate(number, asked.params, pruner)
        tell(study, asked, trial, rig.baseline.prompts, variant)
        done.append(trial)
    volume = hypervolume(pareto_front(done, rig.baseline), rig.baseline)
    return volume, sum(trial.state == "stopped" for trial in done)


def one_seed(seed: int, trials: int) -> dict[str, tuple[float, int]]:
    """{variant: result} of one seed."""
    torch.set_num_threads(1)
    settings = load_settings(
        "", {"model": "demo", "seed": seed, "search": {"trials": trials}, "evaluation": {"batch_size": 50}}
    )
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(settings, Path(folder))
        return {variant: run(rig, variant, trials, Path(folder) / f"{variant}.journal", {}) for variant in VARIANTS}


def page(results: dict[int, dict[str, tuple[float, int]]], trials: int) -> str:
    """The results as Markdown."""
    lines = [
        "# How the sampler is told about a pruned trial",
        "",
        f"Made on {datetime.date.today()} by `python {' '.join(sys.argv)}`: the demo model, {trials} trials,",
        f"{len(results)} seeds. Figures are the hypervolume of the front against (KL 1, share 1).",
        "",
        "| variant | median | mean | standard deviation | worst | best | trials pruned |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        volumes, stopped = zip(*(result[variant] for result in results.values()), strict=True)
        spread = f"{statistics.mean(volumes):.4f} | {statistics.stdev(volumes):.4f}"
        lines.append(
            f"| {variant} | {statistics.median(volumes):.4f} | {spread} "
            f"| {min(volumes):.4f} | {max(volumes):.4f} | {statistics.mean(stopped):.1f} |"
        )
    for variant in VARIANTS[1:]:
        gains = [result[variant][0] - result["full"][0] for result in results.values()]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        lines += [
            "",
            f"{variant} − full, by seed: mean {statistics.mean(gains):+.4f} ± {error:.4f} (standard error); better on ",
        ]
        lines[-1] += f"{sum(gain > 0 for gain in gains)}, equal on {sum(gain == 0 for gain in gains)} of {len(gains)} seeds."
    lines += ["", "| seed | " + " | ".join(VARIANTS) + " |", "|---|" + "---|" * len(VARIANTS)]
    for seed, result in sorted(results.items()):
        lines.append(f"| {seed} | " + " | ".join(f"{result[variant][0]:.4f}" for variant in VARIANTS) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run all seeds in several processes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    results: dict[int, dict[str, tuple[float, int]]] = {}
    with ProcessPoolExecutor(args.processes) as pool:
        for seed, result in enumerate(pool.map(one_seed, range(args.seeds), [args.trials] * args.seeds)):
            results[seed] = result
            print(seed, result, flush=True)
    (Path(__file__).parents[1] / "docs" / "sampler.md").write_text(page(results, args.trials), encoding="utf-8")


if __name__ == "__main__":
    main()
