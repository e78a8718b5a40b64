"""Compare two searches for batch sizes, estimate with binary search and doubling: probes, seconds, result, estimate's error.

.venv/bin/python scripts/measure_tuning.py --models demo DIR     # writes the section "Batch sizes" of docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from pathlib import Path

import torch
from benchmark_page import command, counted, update_page
from rig import Quiet, timed

from abliterate.model.footprint import Shape, row_bytes
from abliterate.model.loader import demo_path, public_name
from abliterate.pipeline import batch_size
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.from_settings import plain_engine
from abliterate.pipeline.workbench import open_workbench
from abliterate.prompts.sets import DEMO_PROMPTS
from abliterate.settings.sources import load_settings

ROOT = Path(__file__).parents[1]


def measure(model: str, folder: Path) -> list[str]:
    """The rows of the table, one for each search."""
    prompts = {name: str(demo_path() / "prompts" / file) for name, file in DEMO_PROMPTS.items()}
    settings = load_settings("", {"model": model, "cache_dir": str(folder), "prompts": prompts, "edit": {"mode": "full"}})
    context = Context.of(settings, Quiet())
    sets = read_prompts(context)
    loaded = open_workbench(context).loaded
    engine = plain_engine(context, loaded)
    engine.generate_ids(sets.harmful_eval[:1], 2)
    shape = Shape.of(loaded.model.config.get_text_config(), loaded.model.dtype)
    lengths = batch_size.Probes(context, loaded, engine, sets).lengths
    rows = []
    for name, binary in (("estimate and binary search", True), ("doubling", False)):
        efficiency = settings.efficiency.model_copy(update={"use_binary_search_batch_tuning": binary})
        asked = context.with_settings(settings.model_copy(update={"efficiency": efficiency}))
        tuned, seconds = timed(lambda asked=asked: batch_size.tune(asked, loaded, engine, sets))
        probes = "+".join(str(len(result.probes)) for result in tuned if result.probes)
        tried = sum(sum(result.probes) for result in tuned)
        sizes = "/".join(str(result.size) for result in tuned)
        peaks = []
        for result in tuned:
            largest = max(result.probes, default=0)
            probe = result.probes.get(largest)
            if binary and probe is not None:
                # A decoding probe ends after a few tokens, so the estimate is for as many.
                estimate = row_bytes(shape, result.operation, lengths[result.operation][1], batch_size.PROBE_TOKENS)
                peaks.append(f"{largest * estimate / max(1, probe.peak_bytes):.2f}")
        rows.append(
            f"| {public_name(model)} | {name} | {probes} | {tried} | {seconds:.2f} | {sizes} | {', '.join(peaks) or '–'} |"
        )
    return rows


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for model in args.models for row in measure(model, Path(folder))]
    lines = [
        f"{datetime.date.today()}, `{command()}`: 200 + 200 prompts for directions,",
        f"100 + 100 for scores, {counted(args.threads, 'thread')}.",
        "",
        "| model | search | probes | prompts in them | s | residuals/prefill/decode | estimated memory by measured |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "Doubling finds one size and the estimate three, so the estimate isn't faster: the longest probe is the same.",
        "",
        "The last column divides the estimate for the largest probe of each operation, from the config, by the growth of the",
        "resident set in it.",
    ]
    print("\n".join(lines))
    update_page(ROOT / "docs" / "benchmarks.md", "Batch sizes", "\n".join(lines))


if __name__ == "__main__":
    main()
