"""Measure how the yardstick's bounds move with fewer answers, against their spread over draws.

    OMP_NUM_THREADS=1 python scripts/measure_yardstick.py demo --seeds 0 1

The base answers every harmless prompt of the directions once for each seed. Random parts of these answers, of different sizes,
give bounds as a run's answers do; the table has their means and standard deviations. A bound that doesn't move but spreads
more is a matter of luck, and of no bias. The model is `demo`, or a folder that `train_demo_model.py --variant` or
`real_model.py` made, with its prompts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch
from rig import Quiet, settings_of

from abliterate import find_directions, load
from abliterate.evaluation.likelihood import own_answers
from abliterate.pipeline.yardstick import measured
from abliterate.scorers.yardstick import AT_MOST, Measures, Spoiled, calibrate

DRAWS = 200


def bounds_of(own: Sequence[Measures], spoiled: Spoiled, sampled: Sequence[int], looked: Sequence[int]) -> dict[str, float]:
    """The bounds by the answers numbered `sampled`, of which only those in `looked` give repetitions and topics."""

    def bounds(part: Sequence[int]) -> dict[str, float]:
        kept = {name: [values[index] for index in part] for name, values in vars(spoiled).items()}
        kept["ends"] = [value for value in kept["ends"] if value > 0]  # an answer that was cut at the limit has no end
        return dict(calibrate([own[index] for index in part], Spoiled(**kept)).bounds)

    return bounds(sampled) | {name: value for name, value in bounds(looked).items() if name in ("distinct", "topic")}


def main() -> None:
    """Measure all answers and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--counts", type=int, nargs="+", default=[128, 96, 64, 48, 32])
    args = parser.parse_args()
    torch.set_num_threads(1)
    own: list[Measures] = []
    spoiled: dict[str, list[float]] = {name: [] for name in ("greedy", "looped", "exchanged", "ends", "cut")}
    with (
        tempfile.TemporaryDirectory() as cache,
        load(settings_of(args.model, 0, [f"cache_dir={cache}", "evaluation.batch_size=64"]), Quiet()) as bench,
    ):
        find_directions(bench)
        base = replace(bench.asked(), harmless=bench.prompts.harmless)
        for seed in args.seeds:
            with base.model.active():
                given = own_answers(bench.engine, base.harmless, len(base.harmless), seed)
            some, others = measured(base, given)
            own += some
            for name in ("greedy", "looped", "exchanged", "cut"):
                spoiled[name] += getattr(others, name)
            spoiled["ends"] += [one.end for one in some]
    whole = Spoiled(**spoiled)
    print(f"{len(own)} answers", flush=True)
    print("| answers | for repetitions and topics | " + " | ".join(AT_MOST) + " |\n" + "|---" * (2 + len(AT_MOST)) + "|")
    draw = random.Random(0)
    for count in args.counts:
        for part in sorted({count, min(count, 64), min(count, 48), min(count, 32)}, reverse=True):
            drawn = [draw.sample(range(len(own)), count) for _ in range(DRAWS)]
            found = [bounds_of(own, whole, sampled, sampled[:part]) for sampled in drawn]
            columns = {name: [bounds[name] for bounds in found] for name in AT_MOST}
            cells = (f"{statistics.fmean(column):.3f} ± {statistics.stdev(column):.3f}" for column in columns.values())
            print(f"| {count} | {part} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
