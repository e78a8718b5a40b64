"""Write docs/generated/refinement.md from the lines of `measure_refinement.py`.

    python scripts/refinement_page.py refinement.jsonl

For each model and course, over its seeds: the least KL at 3 % refusals or fewer, its exact good answers, and the cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SHARE = "0.03"
Line = Mapping[str, Any]
TEXT = (
    "*KL* is the least KL of a trial that leaves at most 3 % of the harmful evaluation prompts refused: its median over",
    "seeds, and its range; *none*: seeds without such a trial. *Good*: the exact count of good answers of 100. *Tokens* are",
    "those that the model was fed from the first trial on, forward once and backward twice. *Ratio*: the KL over that of the",
    "search alone with the same seed, and *at equal cost* that of the trials which it had after as many tokens. *As good",
    "after*: the tokens until the first trial whose KL is no larger than that of the search alone at its end, as a share of",
    "the search's.",
)
# {(trials, refined): {seed: line}}
Courses = Mapping[tuple[int, bool], Mapping[int, Line]]


def courses_of(lines: Sequence[Line]) -> dict[str, Courses]:
    """{model: its courses}; of two lines of one seed the later one counts."""
    found: dict[str, dict[tuple[int, bool], dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[line["model"]][line["trials"], line["refined"]][line["seed"]] = line
    return dict(found)


def least_kl(line: Line) -> float | None:
    """The least KL at `SHARE` refusals or fewer."""
    best = line["best"][SHARE]
    return None if best is None else best["kl"]


def spent(line: Line, tokens: int) -> int:
    """Tokens without those before the first trial, which courses of one seed share in a cache."""
    return tokens - line["ready"]["tokens"]


def tokens_until(line: Line, kl: float, prompts: int) -> int | None:
    """The tokens of a course until its first trial with a KL of at most `kl` and no more than `SHARE` refusals."""
    for point in line["points"]:
        if point["kl"] <= kl and good_enough(point, prompts):
            return spent(line, point["tokens"])
    return None


def good_enough(point: Mapping[str, Any], prompts: int) -> bool:
    """Whether a point was measured in full and refuses at most `SHARE`."""
    return bool(point["state"] == "complete" and point["refusals"] <= float(SHARE) * prompts)


def least_kl_within(line: Line, tokens: int, prompts: int) -> float | None:
    """`least_kl` of the trials that a course had after so many tokens."""
    points = [point for point in line["points"] if good_enough(point, prompts) and spent(line, point["tokens"]) <= tokens]
    return min((point["kl"] for point in points), default=None)


def row(course: tuple[int, bool], by_seed: Mapping[int, Line], search: Mapping[int, Line], prompts: int) -> str:
    """A row of the table."""
    trials, refined = course
    kls = [least_kl(line) for line in by_seed.values()]
    known = sorted(kl for kl in kls if kl is not None)
    goods = [line["best"][SHARE]["good"] for line in by_seed.values() if line["best"][SHARE] is not None]
    goods = [good for good in goods if good is not None]
    costs, ratios, equal, shares = [], [], [], []
    for seed, line in by_seed.items():
        costs.append(spent(line, line["tokens"]))
        other = search.get(seed)
        if refined and other is not None and (theirs := least_kl(other)) is not None:
            ours, until = least_kl(line), tokens_until(line, theirs, prompts)
            ratios += [] if ours is None else [ours / theirs]
            within = least_kl_within(line, spent(other, other["tokens"]), prompts)
            equal += [] if within is None else [within / theirs]
            shares += [] if until is None else [until / spent(other, other["tokens"])]
    cells = [
        f"{trials} trials, refined" if refined else f"{trials} trials",
        len(by_seed),
        f"{statistics.median(known):.4f} ({known[0]:.4f} to {known[-1]:.4f})" if known else "–",
        len(kls) - len(known),
        f"{statistics.median(goods):g} (least {min(goods)})" if goods else "–",
        f"{statistics.median(costs) / 1e6:.2f} M",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–",
        f"{statistics.median(equal):.2f} ({min(equal):.2f} to {max(equal):.2f})" if equal else "–",
        f"{statistics.median(shares):.0%} (most {max(shares):.0%})" if shares else "–",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(found: Mapping[str, Courses], command: str) -> str:
    """The page in Markdown."""
    lines = [
        "# Refinement beside the search alone",
        "",
        f"Written by `{command}` from the output of `scripts/measure_refinement.py`.",
        "",
        *TEXT,
    ]
    for model, courses in sorted(found.items()):
        search = next((by_seed for (_, refined), by_seed in sorted(courses.items(), reverse=True) if not refined), {})
        prompts = 40 if model.startswith("smollm2") else 100
        lines += [
            "",
            f"## {model}",
            "",
            "| course | seeds | KL at ≤ 3 % | none | good | tokens | ratio | at equal cost | as good after |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [row(course, courses[course], search, prompts) for course in sorted(courses, key=lambda one: (one[1], one[0]))]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "generated" / "refinement.md")
    args = parser.parse_args()
    lines = [json.loads(line) for path in args.lines for line in path.read_text(encoding="utf-8").splitlines()]
    names = " ".join(path.name for path in args.lines)
    args.out.write_text(page(courses_of(lines), f"python scripts/refinement_page.py {names}"), encoding="utf-8")


if __name__ == "__main__":
    main()
