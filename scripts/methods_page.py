"""Write docs/generated/methods.md from lines of `measure_refinement.py --heldout` that differ in the method.

    python scripts/measure_refinement.py demo --seeds 0 1 2 --trials 60 --starts --heldout --set edit.mode=pre --out lines.jsonl
    python scripts/methods_page.py lines.jsonl

For each model, budget and method, over its seeds: the trial of least KL at 3 % refusals or fewer, and the one that a run
selects, as they score on held-out prompts. Lines of earlier days are in docs/generated/methods.jsonl; new ones join them there,
without their trials.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from refinement_page import BEFORE, ROOT, Line, assigned, identity, model_of, rounded, spent

TEXT = (
    "For each method: the trial of least KL among those that leave at most 3 % of the harmful evaluation prompts refused, and",
    "what it scores on held-out prompts. *Found*: of how many seeds there is such a trial. Each figure is the median over the",
    "seeds that have one and, in brackets, the worst of all seeds: – where some seed has none, so medians with a – are of the",
    "seeds that went well alone. *KL*: of the first token on evaluation prompts. On held-out prompts:",
    "*unanswered*, the share of harmful ones without a real answer; *KL held out*, the first token's; *KL along*, the mean",
    "along the unedited model's answers. *M tokens*: all that the model was fed, a token forward once and backward twice.",
    "*Selected* is the same of the trial that a run selects by itself, with the share of held-out harmless answers that stay",
    "word for word the same, of which the worst is the least.",
)
Cells = Sequence[tuple[str, str, Callable[[Line], float]]]
# (heading, form, what a line says)
FIGURES: Cells = (
    ("KL", ".5f", lambda line: line["best"]["0.03"]["kl"]),
    ("unanswered", ".0%", lambda line: line["heldout"]["unanswered"]["candidate"]["count"]["share"]),
    ("KL held out", ".5f", lambda line: line["heldout"]["kl"]["mean"]),
    ("KL along", ".5f", lambda line: line["heldout"]["kl_answers"]["mean"]),
)


# The same of the selected trial.
SELECTED: Cells = (
    ("KL", ".5f", lambda line: line["selected"]["kl"]),
    ("unanswered", ".0%", lambda line: line["selected"]["heldout"]["unanswered"]["candidate"]["count"]["share"]),
    ("KL held out", ".5f", lambda line: line["selected"]["heldout"]["kl"]["mean"]),
    ("KL along", ".5f", lambda line: line["selected"]["heldout"]["kl_answers"]["mean"]),
)


def budget(line: Line) -> str:
    """What a course consists of."""
    return f"{line['trials']} trials, then refinement" if line["refined"] else f"{line['trials']} trials"


def method(line: Line) -> str:
    """The settings that make the method."""
    return ", ".join(assigned(line))


def without_points(line: Line) -> Line:
    """The line without its single trials, which this page doesn't show, and without the cache's place."""
    return {name: value for name, value in line.items() if name != "points"} | {"set": assigned(line)}


def selected_row(name: str, lines: Sequence[Line]) -> str:
    """A row of the second table: the selected trials of one method of a model."""
    cells = [name, str(len(lines))]
    for _, form, figure in SELECTED:
        values = [figure(line) for line in lines]
        cells.append(f"{median(values):{form}} ({max(values):{form}})")
    same = [line["selected"]["heldout"]["unchanged"]["share"] for line in lines]
    return "| " + " | ".join([*cells, f"{median(same):.0%} ({min(same):.0%})"]) + " |"


def row(name: str, lines: Sequence[Line]) -> str:
    """A row of the table: one method of a model."""
    found = [line for line in lines if line["best"]["0.03"] is not None]
    cells = [name, f"{len(found)} of {len(lines)}"]
    for _, form, figure in FIGURES:
        values = [figure(line) for line in found]
        # A seed that found no such trial did worse than any that has a figure.
        worst = format(max(values), form) if len(found) == len(lines) else "–"
        cells.append(f"{median(values):{form}} ({worst})" if values else "–")
    cells.append(f"{median(spent(line, line['tokens']) + line['ready']['tokens'] for line in lines) / 1e6:.2f}")
    return "| " + " | ".join(cells) + " |"


def page(lines: Sequence[Line]) -> str:
    """The page in Markdown."""
    groups: dict[tuple[str, str], dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        groups[model_of(line), budget(line)][method(line)].append(line)
    command = "python scripts/methods_page.py LINES"
    kept = "from the output of `scripts/measure_refinement.py`, kept in methods.jsonl"
    parts = ["# Methods beside each other", "", f"Written by `{command}` {kept}.", "", *TEXT]
    for (model, spent_on), methods in sorted(groups.items()):
        heads = ["method", "found", *(heading for heading, _, _ in FIGURES), "M tokens"]
        parts += ["", f"## {model}, {spent_on}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        ordered = sorted(methods, key=lambda name: (name != BEFORE, name))
        parts += [row(name, methods[name]) for name in ordered]
        selected = {name: [line for line in methods[name] if line.get("selected")] for name in ordered}
        if any(selected.values()):
            heads = ["selected", "seeds", *(heading for heading, _, _ in SELECTED), "unchanged"]
            parts += ["", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            parts += [selected_row(name, lines) for name, lines in selected.items() if lines]
    return "\n".join(parts) + "\n"


def merged(stored: Sequence[Line], new: Sequence[Line]) -> dict[str, Mapping[str, Any]]:
    """All lines by what they are of; of two of one the later counts. Those whose lesson was spoiled aren't of a method."""
    every = (line for line in (*stored, *new) if not line.get("spoil"))
    return {identity(line): rounded(without_points(line)) for line in every}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lines", type=Path, nargs="*", help="output of measure_refinement.py --heldout")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "generated" / "methods.md")
    args = parser.parse_args()
    kept = args.out.with_suffix(".jsonl")
    stored, *new = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        for path in (kept, *args.lines)
    )
    lines = merged(stored, [line for read in new for line in read])
    kept.write_text("".join(json.dumps(lines[key], ensure_ascii=False) + "\n" for key in sorted(lines)), encoding="utf-8")
    args.out.write_text(page(list(lines.values())), encoding="utf-8")


if __name__ == "__main__":
    main()
