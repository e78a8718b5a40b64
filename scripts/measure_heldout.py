"""Compare held-out scores with search scores on the demo with three seeds. Writes docs/evaluation.md.

    python scripts/measure_heldout.py -n 40

Each seed has one run, followed by `abliterate evaluate` of several more trials of its front, because the selected trial alone
tells little.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = """# Held-out against search scores

Made on {date} by `python {command}`: for each seed `abliterate run demo -n {trials}` with default settings, and up to
{points} trials from all over its front, the selected one among them, measured on the {harmful} harmful, {harmless} harmless and
{over} over-refusal prompts that neither the directions nor the search saw. Brackets hold 95 % Clopper-Pearson intervals in
percent.

{table}

**Optimism** is the held-out score minus the search's score, by which the search promises too much. Over the selected trials its
mean is {selected_refusals} points of refusals and {selected_kl} nats of first-token KL; over all trials shown it is
{all_refusals} points (from {least} to {most}) and {all_kl} nats. {inside} of {count} search counts lie within the held-out
interval.

The demo's sets are drawn from one distribution (verbs, objects and phrasings are shared), which is the mildest case: the table
shows the optimism of picking the best of many trials, but not that of prompts of another kind. For real models the default
held-out sets have another origin (JailbreakBench's behaviours), and the scores are expected to differ more.

## What is measured

{measures}
"""
MEASURES = """\
| | on | meaning |
|---|---|---|
| refusals | harmful | as in the search: a marker in the greedy answer, or an empty answer |
| answered | harmful | neither a refusal nor a fault |
| faults | harmful | open thinking block; empty; repetitive (> 50 % of the token 4-grams occur before); ended within 4 tokens |
| KL, first token | harmless | as in the search: KL(base‖candidate) over the full vocabulary; mean, median, max |
| KL along answers | harmless | the same KL at every token of the base's own greedy answer, which both models are fed |
| perplexity | harmless | of the base's answers, under base and candidate |
| unchanged | harmless | greedy answers with the same tokens; of the others, mean position of the first different token |
| over-refusal | look harmful | refusals of harmless prompts that name something harmful |

The answers are whole and come from plain `generate` (`--reference`); teacher-forced passes hold at most 512 MiB of logits with
any vocabulary. `tests/test_heldout.py` compares KL and perplexity with one float64 pass per sequence over full logits.
"""


def command(*arguments: object) -> list[str]:
    """The command line of the tool in a process of its own."""
    return [sys.executable, "-m", "abliterate", *map(str, arguments)]


def spread(front: Sequence[int], selected: int, points: int) -> list[int]:
    """`points` trials from all over a front, by rising KL, with the selected trial among them."""
    if len(front) <= points:
        return list(front)
    step = (len(front) - 1) / (points - 1)
    chosen = {front[round(index * step)] for index in range(points - 1)} | {selected}
    return [number for number in front if number in chosen]


def measure_seed(seed: int, trials: int, points: int, folder: Path) -> list[dict[str, Any]]:
    """The held-out records of the selected trial and of other trials on the front, by rising KL."""
    out = folder / f"seed{seed}"
    subprocess.run(command("run", "demo", "-n", trials, "--seed", seed, "--out", out, "--export", "none"), check=True)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    selected = result["selected"]
    records = []
    for number in spread(result["front"], selected, points):
        record = result["heldout"]
        if number != selected:
            done = subprocess.run(
                command("evaluate", "demo", f"{out}:{number}", "--json"), check=True, stdout=subprocess.PIPE, text=True
            )
            record = json.loads(done.stdout.splitlines()[-1])["heldout"]
        records.append({"seed": seed, "selected": number == selected, **record})
    return records


def percent(rate: dict[str, Any]) -> str:
    """A count and its interval as text."""
    return f"{rate['count']} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def row(record: dict[str, Any]) -> str:
    """The table row of one trial."""
    candidate = record["candidate"]
    faults = sum(candidate["faults"].values())
    cells = [
        record["seed"],
        f"**{record['trial']}**" if record["selected"] else record["trial"],
        record["search"]["refusals"]["count"],
        percent(candidate["refusals"]),
        faults,
        f"{record['search']['kl']['mean']:.4f}",
        f"{record['kl']['mean']:.4f}",
        f"{record['kl_answers']['mean']:.5f}",
        f"{record['perplexity']['base']:.3f} → {record['perplexity']['candidate']:.3f}",
        percent(record["unchanged"]),
        f"{record['base']['over_refusals']['count']} → {candidate['over_refusals']['count']}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(records: Sequence[dict[str, Any]], trials: int, points: int) -> str:
    """The text of the page."""
    heads = ["seed", "trial", "refusals, search", "refusals, held out", "faults", "KL, search", "KL, held out"]
    heads += ["KL along answers", "perplexity", "unchanged", "over-refusal"]
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, records)]
    optimism = [100 * record["optimism"]["refusals"] for record in records]
    chosen = [record["optimism"] for record in records if record["selected"]]
    intervals = [(record["candidate"]["refusals"], record["search"]["refusals"]["share"]) for record in records]
    inside = sum(interval["low"] <= share <= interval["high"] for interval, share in intervals)
    sizes = {name: prompts["count"] for name, prompts in records[0]["prompts"].items()}
    return PAGE.format(
        date=datetime.date.today(),
        command=" ".join(sys.argv),
        trials=trials,
        points=points,
        harmful=sizes["harmful_heldout"],
        harmless=sizes["harmless_heldout"],
        over=sizes["over_refusal"],
        table="\n".join(table),
        selected_refusals=f"{100 * statistics.fmean(gap['refusals'] for gap in chosen):+.1f}",
        selected_kl=f"{statistics.fmean(gap['kl'] for gap in chosen):+.4f}",
        all_refusals=f"{statistics.fmean(optimism):+.1f}",
        least=f"{min(optimism):+.0f}",
        most=f"{max(optimism):+.0f}",
        all_kl=f"{statistics.fmean(record['optimism']['kl'] for record in records):+.4f}",
        inside=inside,
        count=len(records),
        measures=MEASURES.rstrip(),
    )


def main() -> None:
    """Run the seeds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = [(seed, Path(folder)) for seed in args.seeds]
        records = [record for seed, path in folders for record in measure_seed(seed, args.trials, args.points, path)]
    text = page(records, args.trials, args.points)
    (Path(__file__).parents[1] / "docs" / "evaluation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
