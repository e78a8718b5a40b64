"""The page docs/benchmarks.md: one section per title; a section is replaced when it is measured again."""

from __future__ import annotations

import datetime
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_HEAD = """# Benchmarks

Scripts write the tables of this page; each section names its command. Every variant evaluates the same trials with the same
metrics (the script fails otherwise); runs are interleaved, and figures are medians over repeats. Ratios count, not seconds.
"""


@dataclass(frozen=True)
class Measured:
    """Medians of one variant. Seconds and bytes; `edit`: the adapter update's share of the time of trials."""

    total: float
    median_trial: float
    mean_trial: float
    startup: float
    edit: float
    rss: float
    rss_above: float
    device: float
    passes: int
    tokens: int
    batch_sizes: Mapping[str, int]
    kl: float
    refusals: int
    stopped: int
    hits: Mapping[str, Mapping[str, int]]
    stages: Mapping[str, float]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def update_page(path: Path, title: str, body: str) -> None:
    """Replace or append the section `title`."""
    text = path.read_text(encoding="utf-8") if path.exists() else _HEAD
    section = f"## {title}\n\n{body.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.S | re.M)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def variants_section(measured: Mapping[str, Measured], second: float, threads: int, count: int, repeats: int) -> str:
    """The table of variants and what follows from it."""
    full, reference = measured["all"], measured["reference"]
    lines = [
        f"{datetime.date.today()}, `{command()}`: {count} trials, {repeats} repeats, {threads} threads,",
        f"torch {torch.__version__}.",
        "",
        "| variant | s, all trials | × of all on | s a trial (median) | mean | start-up s | peak MB (RSS) above weights "
        "| peak device MB | passes | tokens | stopped | batch | mean KL | refusals |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in measured.items():
        lines.append(
            f"| {name} | {one.total:.1f} | {one.total / full.total:.2f} | {one.median_trial:.3f} | {one.mean_trial:.3f} "
            f"| {one.startup:.1f} | {one.rss_above / 1e6:.0f} | {one.device / 1e6:.0f} | {one.passes} | {one.tokens} "
            f"| {one.stopped} | {'/'.join(map(str, one.batch_sizes.values()))} | {one.kl:.6f} | {one.refusals} |"
        )
    hits = ", ".join(f"{name} {c['hits']} of {c['hits'] + c['misses']}" for name, c in full.hits.items())
    excluding = {
        name: sum(s for stage, s in one.stages.items() if stage not in ("load", "prompts")) for name, one in measured.items()
    }
    lines += [
        "",
        f"- Everything on against the reference: {reference.total / full.total:.2f}× in total, "
        f"{reference.median_trial / full.median_trial:.2f}× by the median trial.",
        f"- Adapter update: {full.edit:.2%} of the trials' time.",
        f"- Peak memory above the weights: {full.rss_above / max(1, reference.rss_above):.2f} of the reference's.",
        f"- Start-up without loading: {excluding['all']:.2f} s, {excluding['all'] / reference.mean_trial:.1f} reference trials "
        f"({', '.join(f'{stage} {seconds:.2f}' for stage, seconds in full.stages.items())}).",
        f"- A second run starts its first trial after {second:.2f} s, the first after {full.startup:.2f} s: "
        f"{second / full.startup:.2f}.",
        f"- Memo hits (all on): {hits}.",
        "- Refusals of a stopped trial are the bound at which it stopped, so their sum is smaller where trials stop.",
    ]
    return "\n".join(lines)


def command() -> str:
    """As it was called, without this machine's paths."""
    return "python scripts/" + shlex.join(re.sub(r"[^=]*/", "", part) for part in sys.argv)
