"""Times the trial engine against the reference and with each efficiency off. Writes docs/benchmarks.md.

The same figures go to docs/generated/benchmarks.json.

    .venv/bin/python scripts/benchmark.py                       # the demo model
    .venv/bin/python scripts/benchmark.py --model DIR --study FILE --variants all reference

The trials are a fixed list, evenly spaced from a study of 200 trials that is made once with everything on (or read from
--study); each trial has the pruning limit that it had in that study. Every variant evaluates the same list in a process of its
own. The runs are interleaved and repeated, and the figures are medians. The script fails unless all variants give the same
metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_page import Measured, update_page, variants_section
from peer import run_heretic, sentence
from rig import settings_of

ROOT = Path(__file__).parents[1]
VARIANTS: dict[str, tuple[str, ...]] = {
    "all": (),
    "reference": (),
    "no trial engine": ("use_trial_engine",),
    "no shared prefix": ("use_shared_prefix",),
    "no layer skip": ("use_layer_skip",),
    "no certified stop": ("use_certified_stop",),
    "settled rows stay": ("use_settled_rows",),
    "no drafts": ("use_drafts",),
    "adapters reset per trial": ("use_incremental_adapter_updates",),
    "residuals on the device": ("offload_residuals_to_cpu",),
    "residuals streamed": ("max_residuals_mb",),  # off is 0, here and below
    "nothing kept between trials": ("max_kept_mb",),
    "one search per marker": ("use_efficient_refusal_detection",),
    "batch size by doubling": ("use_binary_search_batch_tuning",),
    "warm-up per probe": ("use_global_warmup",),
    "no residual cache": ("enable_residual_cache", "cache_residuals_in_memory"),
}
NEVER_STOPS = ("reference", "no trial engine", "no certified stop")
# These variants measure their own batch sizes. All others take the sizes of "all", so that they differ in one thing only.
OWN_BATCH_SIZES = ("all", "reference", "batch size by doubling", "warm-up per probe")
KL_TOLERANCE = 1e-5  # float32


def call(options: argparse.Namespace, out: Path, cache: Path, *more: str) -> dict[str, Any]:
    """Run scripts/benchmark_variant.py in a process of its own and return the JSON that it wrote."""
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_variant.py"), "--model", options.model, "--out", str(out)]
    command += ["--cache", str(cache), "--threads", str(options.threads), "--edit-mode", options.edit_mode, *more]
    command += ["--set", *options.prompts] if options.prompts else []
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
    return json.loads(out.read_text(encoding="utf-8"))


def measure(options: argparse.Namespace, name: str, study: Path, folder: Path, cache: Path, sizes: list[int]) -> dict[str, Any]:
    """Measure one variant once; `sizes`: the batch sizes of "all"."""
    switches = ["--reference"] if name == "reference" else ["--off", *VARIANTS[name]] if VARIANTS[name] else []
    batch = [] if name in OWN_BATCH_SIZES else ["--batch-sizes", *map(str, sizes)]
    return call(
        options, folder / "measured.json", cache, "--study", str(study), "--count", str(options.count), *switches, *batch
    )


def record_study(options: argparse.Namespace, folder: Path) -> Path:
    """Record a study with everything on, from which the list of trials is taken."""
    if options.study:
        return options.study
    path = folder / "study.json"
    call(options, path, folder / "cache", "--record", str(options.study_trials))
    if options.keep_study:
        shutil.copy(path, options.keep_study)
    return path


def check_metrics(results: dict[str, dict[str, Any]]) -> None:
    """Fail unless every variant gives the reference's KL and refusals; a pruned trial's full count must reach its limit."""
    full = results["reference"]["trials"]
    for name, result in results.items():
        for trial, other in zip(result["trials"], full, strict=True):
            assert abs(trial["kl"] - other["kl"]) <= KL_TOLERANCE, (name, trial, other)
            if trial["state"] == "stopped":
                assert trial["refusals"] == trial["limit"] <= other["refusals"], (name, trial, other)
            else:
                assert trial["refusals"] == other["refusals"], (name, trial, other)
                assert name in NEVER_STOPS or other["refusals"] < trial["limit"], (name, trial, other)


def medians(results: list[dict[str, Any]]) -> Measured:
    """The median figures of one variant from its repeated runs."""

    def median(key: str) -> float:
        return statistics.median(result[key] for result in results)

    per_trial = [statistics.median(trial["seconds"] for trial in result["trials"]) for result in results]
    mean = [statistics.mean(trial["seconds"] for trial in result["trials"]) for result in results]
    last = results[-1]
    return Measured(
        total=median("seconds"),
        median_trial=statistics.median(per_trial),
        mean_trial=statistics.median(mean),
        startup=median("startup"),
        edit=median("edit_seconds") / median("seconds"),
        rss=median("rss"),
        rss_above=median("rss_above"),
        device=median("device"),
        passes=int(median("passes")),
        tokens=int(median("tokens")),
        batch_sizes=results[-1]["batch_sizes"],
        kl=statistics.mean(trial["kl"] for trial in last["trials"]),
        refusals=sum(trial["refusals"] for trial in last["trials"]),
        stopped=sum(trial["state"] == "stopped" for trial in last["trials"]),
        hits=last["hits"],
        stages=last["stages"],
    )


def main() -> None:
    """Record the study, run all variants interleaved, check their metrics, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--study", type=Path, help="trials recorded before, instead of a study now")
    parser.add_argument("--keep-study", type=Path, help="where to keep the recorded trials")
    parser.add_argument("--study-trials", type=int, default=200)
    parser.add_argument("--count", type=int, default=40, help="trials of the list")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--edit-mode", default="full", help="of the recorded trials; auto: a run's default")
    parser.add_argument("--peer", choices=["heretic"])
    parser.add_argument("--title", default="")
    parser.add_argument("--prompts", nargs="*", default=[], help="prompt sources as name=path, for a model other than demo")
    options = parser.parse_args()
    names = list(dict.fromkeys(["all", "reference", *options.variants]))
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    second: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        study = record_study(options, folder)
        for repeat in range(options.repeats):
            for name in names:
                cache = folder / f"cache-{repeat}-{names.index(name)}"
                sizes = list(results["all"][-1]["batch_sizes"].values()) if results["all"] else []
                results[name].append(measure(options, name, study, folder, cache, sizes))
                print(repeat, name, round(results[name][-1]["seconds"], 1), "s", flush=True)
                if name == "all":  # a second time, with the cache that the first run has filled
                    second.append(measure(options, name, study, folder, cache, sizes)["startup"])
            check_metrics({name: results[name][-1] for name in names})
        ours = statistics.mean(trial["seconds"] for trial in results["all"][-1]["trials"])
        peer = ""
        if options.peer:
            (folder / "peer").mkdir()
            peer_settings = settings_of(options.model, 0, [f"prompts.{source}" for source in options.prompts])
            peer = sentence(run_heretic(peer_settings, options.count, options.threads, folder / "peer"), ours)
    measured = {name: medians(repeats) for name, repeats in results.items()}
    title = options.title or f"Variants: {options.model}"
    body = variants_section(measured, statistics.median(second), options.threads, options.count, options.repeats)
    update_page(ROOT / "docs" / "benchmarks.md", title, f"{body}\n- {peer}" if peer else body)
    path = ROOT / "docs" / "generated" / "benchmarks.json"
    everything = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = {name: value.record() for name, value in measured.items()}
    path.write_text(json.dumps(everything | {title: record}, indent=1) + "\n", encoding="utf-8")
    print(body, peer, sep="\n")


if __name__ == "__main__":
    main()
