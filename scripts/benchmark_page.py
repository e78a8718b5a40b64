"""Write the page docs/benchmarks.md, one section per title; a section is replaced when it is measured again."""

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
    """The medians of one variant, in seconds and bytes. `edit`: the share of the trials' time that adapter updates take."""

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
        """The figures as JSON."""
        return asdict(self)


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 thread, 2 threads."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def update_page(path: Path, title: str, body: str) -> None:
    """Replace or append the section `title`."""
    text = path.read_text(encoding="utf-8") if path.exists() else _HEAD
    section = f"## {title}\n\n{body.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.S | re.M)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    path.write_text(text.rstrip() + "\n", encoding="utf-8")


def variants_section(measured: Mapping[str, Measured], second: float, threads: int, count: int, repeats: int) -> str:
    """The table of variants and the figures that follow from it."""
    full, reference = measured["all"], measured["reference"]
    lines = [
        f"{datetime.date.today()}, `{command()}`: {counted(count, 'trial')}, "
        f"{counted(repeats, 'repeat')}, {counted(threads, 'thread')},",
        f"torch {torch.__version__}.",
        "",
        "| variant | s, all trials | × of all on | s a trial (median) | mean | start-up s | peak MB (RSS) above weights "
        "| peak device MB | passes | tokens | stopped | batch | mean KL | refusals |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, variant in measured.items():
        sizes = "/".join(map(str, variant.batch_sizes.values()))
        lines.append(
            f"| {name} | {variant.total:.1f} | {variant.total / full.total:.2f} | {variant.median_trial:.3f} "
            f"| {variant.mean_trial:.3f} | {variant.startup:.1f} | {variant.rss_above / 1e6:.0f} "
            f"| {variant.device / 1e6:.0f} | {variant.passes} | {variant.tokens} | {variant.stopped} | {sizes} "
            f"| {variant.kl:.6f} | {variant.refusals} |"
        )
    hits = ", ".join(f"{name} {c['hits']} of {c['hits'] + c['misses']}" for name, c in full.hits.items())
    start_up = sum(seconds for stage, seconds in full.stages.items() if stage not in ("load", "prompts"))
    lines += [
        "",
        f"- Everything on against the reference: {reference.total / full.total:.2f}× in total, "
        f"{reference.median_trial / full.median_trial:.2f}× by the median trial.",
        f"- Adapter update: {full.edit:.2%} of the trials' time.",
        f"- Peak memory above the weights: {full.rss_above / max(1, reference.rss_above):.2f} of the reference's.",
        f"- Start-up without loading: {start_up:.2f} s, {start_up / reference.mean_trial:.1f} reference trials "
        f"({', '.join(f'{stage} {seconds:.2f}' for stage, seconds in full.stages.items())}).",
        f"- A second run starts its first trial after {second:.2f} s, the first after {full.startup:.2f} s: "
        f"{second / full.startup:.2f}.",
        f"- Memo hits (all on): {hits}.",
        "- The refusals of a pruned trial are the bound at which it was stopped, so their sum is smaller with pruning.",
    ]
    return "\n".join(lines)


def command() -> str:
    """The command line of this process, without this machine's paths."""
    return "python scripts/" + shlex.join(re.sub(r"[^=]*/", "", part) for part in sys.argv)
