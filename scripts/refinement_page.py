"""Write docs/generated/refinement.md from the lines of `measure_refinement.py`.

    python scripts/refinement_page.py refinement.jsonl

For each model and course, over its seeds: the least KL at 3 % refusals or fewer, its exact good answers, and the cost. Lines of
earlier days are in docs/generated/refinement.jsonl; new ones join them there, without the trials that say nothing more.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

SHARE = "0.03"
BEFORE = "edit.mode=full"  # of lines that name no mode: it was the default when they were made
Line = Mapping[str, Any]
TEXT = (
    "*KL* is the least KL of a trial that leaves at most 3 % of the harmful evaluation prompts refused: its median over",
    "seeds, their range, and of how many seeds if some have no such trial. *Good*: the exact count of its good answers of 100.",
    "*Tokens*: those that the model was fed from the first trial on, forward once and backward twice. *Ratio*: the KL over",
    "that of the search alone (of `full`) with the same seed, and *at equal cost* that of its trials after as many tokens.",
    "*As good after*: the tokens until the first trial whose KL is no larger than that of the search alone at its end, as a",
    "share of the search's. The last three are over the seeds whose search has such a trial at all, and where the course has",
    "one, too. *Earlier course*: until the morning of 2026-11-29, which began at a four to six times larger weight and kept no",
    "margin.",
)
# (refined, trials, what else was set)
Course = tuple[bool, int, str]
Courses = Mapping[Course, Mapping[int, Line]]


def courses_of(lines: Sequence[Line]) -> dict[str, Courses]:
    """{model: its courses}; of two lines of one seed the later one counts."""
    found: dict[str, dict[Course, dict[int, Line]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        given = assigned(line)
        given += [f"{line['spoil']:.0%} of the targets spoiled"] if line.get("spoil") else []
        given += ["nothing shared"] if line.get("apart") else []
        found[model_of(line)][line["refined"], line["trials"], ", ".join(given)][line["seed"]] = line
    return dict(found)


def compact(line: Line) -> Line:
    """The line with only those points that are refined or better than all before them."""
    points, least = [], math.inf
    for point in line["points"]:
        better = good_enough(point, line["prompts"]) and point["kl"] < least
        least = min(least, point["kl"]) if better else least
        points += [point] if better or "beta" in point else []
    return line | {"points": points}


def rounded(value: Any) -> Any:
    """JSON with floats of six digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def assigned(line: Line) -> list[str]:
    """The settings that were set, without the cache's place, and always with the edit mode."""
    given = [text for text in line.get("set", ()) if not text.startswith("cache_dir=")]
    return given if any(text.startswith("edit.mode=") for text in given) else [BEFORE, *given]


def identity(line: Line) -> str:
    """What a line is of: of two such lines the later one counts."""
    names = ("seed", "trials", "refined", "spoil", "apart")
    return json.dumps([model_of(line), *(line.get(name) or None for name in names), assigned(line)])


def model_of(line: Line) -> str:
    """The model, and of one that a script makes a few digits of its weights' hash, which differs between kinds of CPU."""
    name, weights = line["model"], line.get("weights")
    return name if name == "demo" or not weights else f"{name} {weights.removeprefix('sha256:')[:8]}"


def least_kl(line: Line) -> float | None:
    """The least KL at `SHARE` refusals or fewer."""
    best = line["best"][SHARE]
    return None if best is None else best["kl"]


def spent(line: Line, tokens: int) -> int:
    """Of so many tokens, those from the first trial on."""
    return tokens - line["ready"]["tokens"]


def tokens_until(line: Line, kl: float) -> int | None:
    """The tokens of a course until its first trial with a KL of at most `kl` and no more than `SHARE` refusals."""
    for point in line["points"]:
        if good_enough(point, line["prompts"]) and point["kl"] <= kl:
            return spent(line, point["tokens"])
    return None


def good_enough(point: Mapping[str, Any], prompts: int) -> bool:
    """Whether a point was measured in full and refuses at most `SHARE`."""
    return bool(point["state"] == "complete" and point["refusals"] <= float(SHARE) * prompts)


def least_kl_within(line: Line, tokens: int) -> float | None:
    """`least_kl` of the trials that a course had after so many tokens."""
    points = [
        point for point in line["points"] if good_enough(point, line["prompts"]) and spent(line, point["tokens"]) <= tokens
    ]
    return min((point["kl"] for point in points), default=None)


def shown(values: Sequence[float], of: int, form: str) -> str:
    """The median and the range of a figure, and of how many seeds."""
    if not values:
        return f"none of {of}" if of else "–"
    text = f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
    return text if len(values) == of else f"{text}, {len(values)} of {of}"


def row(course: Course, by_seed: Mapping[int, Line], search: Mapping[int, Line]) -> str:
    """A row of the table."""
    refined, trials, given = course
    pairs = [(line, search[seed]) for seed, line in by_seed.items() if refined and seed in search]
    both = [(line, other) for line, other in pairs if least_kl(other) is not None]
    kls = [kl for line in by_seed.values() if (kl := least_kl(line)) is not None]
    goods = [line["best"][SHARE]["good"] for line in by_seed.values() if line["best"][SHARE] is not None]
    ratios, equal, shares = list[float](), list[float](), list[float]()
    for line, other in both:
        theirs, cost = least_kl(other) or 0.0, spent(other, other["tokens"])
        ours, within, until = least_kl(line), least_kl_within(line, cost), tokens_until(line, theirs)
        ratios += [] if ours is None else [ours / theirs]
        equal += [] if within is None else [within / theirs]
        shares += [] if until is None else [until / cost]
    name = f"{trials} trials, refined" if refined else f"{trials} trials"
    cells = [
        f"{name}: {given}" if given else name,
        len(by_seed),
        shown(kls, len(by_seed), ".5f"),
        shown(known, len(by_seed), "g") if (known := [good for good in goods if good is not None]) or not goods else "–",
        shown([spent(line, line["tokens"]) / 1e6 for line in by_seed.values()], len(by_seed), ".2f"),
        shown(ratios, len(pairs), ".2f"),
        shown(equal, len(pairs), ".2f"),
        shown(shares, len(pairs), ".0%"),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(found: Mapping[str, Courses], command: str) -> str:
    """The page in Markdown."""
    lines = [
        "# Refinement beside the search alone",
        "",
        f"Written by `{command}` from the output of `scripts/measure_refinement.py`, which is kept in refinement.jsonl.",
        "",
        *TEXT,
    ]
    for model, courses in sorted(found.items()):
        alone = sorted(course for course in courses if not course[0])
        usual = [course for course in alone if course[2] == BEFORE] or alone
        search = courses[usual[-1]] if usual else {}
        lines += [
            "",
            f"## {model}",
            "",
            "| course | seeds | KL at ≤ 3 % | good | M tokens | ratio | at equal cost | as good after |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [row(course, courses[course], search) for course in sorted(courses)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="*", help="output of measure_refinement.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "generated" / "refinement.md")
    args = parser.parse_args()
    stored = args.out.with_suffix(".jsonl")
    paths = [*([stored] if stored.exists() else []), *args.lines]
    read = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    lines = {identity(line): rounded(compact(line)) for line in read}
    kept = [json.dumps(lines[key], ensure_ascii=False) + "\n" for key in sorted(lines)]
    stored.write_text("".join(kept), encoding="utf-8")
    args.out.write_text(page(courses_of(list(lines.values())), "python scripts/refinement_page.py LINES"), encoding="utf-8")


if __name__ == "__main__":
    main()
