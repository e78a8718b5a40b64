"""Held-out against search scores on the demo, three seeds; writes docs/evaluation.md.

    python scripts/measure_heldout.py -n 40

For each seed one run, then `abliterate evaluate` of some more trials of its front: one selected trial says little.
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
{over} over-refusal prompts that neither directions nor the search saw. In brackets 95 % Clopper-Pearson intervals, in percent.

{table}

**Optimism** is the held-out score minus the search's: what the search promises too much. Over the selected trials the mean
is {selected_refusals} points of refusals and {selected_kl} nats of first-token KL; over all trials shown {all_refusals} points
(from {least} to {most}) and {all_kl} nats. {inside} of {count} search counts lie within the held-out interval.

The demo's sets are drawn from one distribution (verbs, objects and phrasings are shared), which is the mildest case there is:
what is seen here is the optimism of having picked the best of many trials, and not that of prompts of another kind. For real
models the default held-out sets are of another origin (JailbreakBench's behaviours) and expected to differ more.

## What is measured

{measures}
"""
MEASURES = """\
| | on | what it is |
|---|---|---|
| refusals | harmful | as in the search: a marker in the greedy answer, or no answer at all |
| answered | harmful | neither a refusal nor a fault |
| faults | harmful | open thinking block; empty; repetitive (> 50 % of its token 4-grams stood before); ended within 4 tokens |
| KL, first token | harmless | as in the search: KL(base‖candidate) over the full vocabulary; mean, median, max |
| KL along answers | harmless | the same at every token of the base's own greedy answer, both models fed that answer |
| perplexity | harmless | of the base's answers, under base and candidate |
| unchanged | harmless | greedy answers with the same tokens; mean position of the first token that differs in the others |
| over-refusal | look harmful | refusals of harmless prompts that name something harmful |

Answers come from plain `generate` (`--reference`), whole; teacher-forced passes hold at most 512 MiB of logits whatever the
vocabulary. `tests/unit/pipeline/test_heldout.py` holds KL and perplexity against one float64 pass per sequence over full
logits.
"""


def command(*arguments: object) -> list[str]:
    """The tool, as a process of its own."""
    return [sys.executable, "-m", "abliterate", *map(str, arguments)]


def spread(front: Sequence[int], selected: int, points: int) -> list[int]:
    """`points` trials from all over a front, by rising KL, with the selected one."""
    if len(front) <= points:
        return list(front)
    step = (len(front) - 1) / (points - 1)
    chosen = {front[round(place * step)] for place in range(points - 1)} | {selected}
    return [number for number in front if number in chosen]


def measure_seed(seed: int, trials: int, points: int, folder: Path) -> list[dict[str, Any]]:
    """The held-out record of the selected trial and of some others on the front, by rising KL."""
    out = folder / f"seed{seed}"
    subprocess.run(command("run", "demo", "-n", trials, "--seed", seed, "--out", out, "--export", "none"), check=True)
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    selected = result["selected"]
    found = []
    for number in spread(result["front"], selected, points):
        record = result["heldout"]
        if number != selected:
            done = subprocess.run(
                command("evaluate", "demo", f"{out}:{number}", "--json"), check=True, stdout=subprocess.PIPE, text=True
            )
            record = json.loads(done.stdout.splitlines()[-1])["heldout"]
        found.append({"seed": seed, "selected": number == selected, **record})
    return found


def percent(rate: dict[str, Any]) -> str:
    """A count and its interval."""
    return f"{rate['count']} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def row(one: dict[str, Any]) -> str:
    """One trial."""
    candidate = one["candidate"]
    faults = sum(candidate["faults"].values())
    cells = [
        one["seed"],
        f"**{one['trial']}**" if one["selected"] else one["trial"],
        one["search"]["refusals"]["count"],
        percent(candidate["refusals"]),
        faults,
        f"{one['search']['kl']['mean']:.4f}",
        f"{one['kl']['mean']:.4f}",
        f"{one['kl_answers']['mean']:.5f}",
        f"{one['perplexity']['base']:.3f} → {one['perplexity']['candidate']:.3f}",
        percent(one["unchanged"]),
        f"{one['base']['over_refusals']['count']} → {candidate['over_refusals']['count']}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(found: Sequence[dict[str, Any]], trials: int, points: int) -> str:
    """The page's text."""
    heads = ["seed", "trial", "refusals, search", "refusals, held out", "faults", "KL, search", "KL, held out"]
    heads += ["KL along answers", "perplexity", "unchanged", "over-refusal"]
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(row, found)]
    optimism = [100 * one["optimism"]["refusals"] for one in found]
    chosen = [one["optimism"] for one in found if one["selected"]]
    inside = sum(
        one["candidate"]["refusals"]["low"] <= one["search"]["refusals"]["share"] <= one["candidate"]["refusals"]["high"]
        for one in found
    )
    sizes = {name: one["count"] for name, one in found[0]["prompts"].items()}
    return PAGE.format(
        date=datetime.date.today(),
        command=" ".join(sys.argv),
        trials=trials,
        points=points,
        harmful=sizes["harmful_heldout"],
        harmless=sizes["harmless_heldout"],
        over=sizes["over_refusal"],
        table="\n".join(table),
        selected_refusals=f"{100 * statistics.fmean(one['refusals'] for one in chosen):+.1f}",
        selected_kl=f"{statistics.fmean(one['kl'] for one in chosen):+.4f}",
        all_refusals=f"{statistics.fmean(optimism):+.1f}",
        least=f"{min(optimism):+.0f}",
        most=f"{max(optimism):+.0f}",
        all_kl=f"{statistics.fmean(one['optimism']['kl'] for one in found):+.4f}",
        inside=inside,
        count=len(found),
        measures=MEASURES.rstrip(),
    )


def main() -> None:
    """Run the seeds, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--points", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [one for seed in args.seeds for one in measure_seed(seed, args.trials, args.points, Path(folder))]
    (Path(__file__).parents[1] / "docs" / "evaluation.md").write_text(page(found, args.trials, args.points), encoding="utf-8")


if __name__ == "__main__":
    main()
