"""Measure the memory and time of exports: streamed, as an adapter, and as other tools do it (load, edit, save).

.venv/bin/python scripts/measure_export.py        # writes the section "Exports" of docs/benchmarks.md

The model is random and has about a gigabyte in bfloat16; the run directory is as a run leaves it. Every export has a process of
its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmark_page import command, counted, update_page
from rig import Quiet
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from abliterate.artifacts.result import ModelRecord, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.model import loader
from abliterate.model.loader import demo_path
from abliterate.model.memory import PeakMeter
from abliterate.objectives import BY_MARKERS
from abliterate.pipeline.export_trial import export_trial
from abliterate.pipeline.stages import directions_file, directions_record
from abliterate.settings.sources import load_settings
from abliterate.types import Baseline, Kernel, Trial, TrialParams

ROOT = Path(__file__).parents[1]
COMPONENTS = ("attn.o_proj", "mlp.down_proj")


def make_base(folder: Path, width: int, layers: int) -> None:
    """Write a random model in files of 256 MB."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path() / "model")
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="256MB")
    torch.set_default_dtype(torch.float32)
    tokenizer.save_pretrained(folder)


def make_run(folder: Path, base: Path, width: int, layers: int) -> None:
    """Write a run directory with one trial that edits the upper half of the layers; its scores are invented."""
    settings = load_settings("", {"model": str(base), "edit": {"mode": "full"}})
    directory = RunDirectory(folder)
    folder.mkdir()
    config = loader.load_config(str(base), settings.load)
    fingerprint = loader.fingerprint(str(base), config)
    result = Result(
        model=ModelRecord(id=base.name, revision="", fingerprint=fingerprint, dtype="bfloat16"),
        batch_sizes={"residuals": 1, "prefill": 1, "decode": 1},
        response_prefix="",
        rendering="",
        identity={},
        startup_trials=1,
    )
    kernel = Kernel(max_coeff=1.0, position=0.75 * layers, min_coeff=0.5, distance=0.25 * layers)
    scores = {"refusals": 0, "kl": {"mean": 0.0, "median": 0.0, "max": 0.0}}
    trial = Trial(0, TrialParams("per layer", 0.0, dict.fromkeys(COMPONENTS, kernel)), "complete", scores)
    result.searched([trial], [trial], Baseline(1, 1), BY_MARKERS)
    directions = Directions(torch.nn.functional.normalize(torch.randn(layers + 1, width), dim=1))
    result.directions = directions_record(directions)
    result.write(directory)
    directory.directions.write_bytes(directions_file(directions))


def export(kind: str, folder: Path) -> dict[str, Any]:
    """Make one export in this process: its seconds, and its peak resident memory above the memory before it."""
    base, run = folder / "base", folder / "run"
    options = {"model": str(base), "edit": {"mode": "full"}, "export": {"kind": kind if kind != "whole" else "merged"}}
    settings = load_settings("", options)
    before, meter, started = psutil.Process().memory_info().rss, PeakMeter(), time.perf_counter()
    verified = None
    if kind == "whole":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        v = torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)
        for layer in model.model.layers[len(model.model.layers) // 2 :]:
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                weight = module.weight.data.float()
                module.weight.data = (weight - torch.outer(v, v @ weight)).bfloat16()
        model.save_pretrained(folder / kind)
    else:
        verified = export_trial(settings, Quiet(), RunDirectory(run), 0, folder / kind).export.verified
    return {"seconds": time.perf_counter() - started, "peak": meter.rss() - before, "verified": verified}


def main() -> None:
    """Make the model, export it in every way and write the section; with --kind, make one of these exports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind:
        print(json.dumps(export(args.kind, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", args.width, args.layers)
        make_run(folder / "run", folder / "base", args.width, args.layers)
        files = list((folder / "base").glob("*.safetensors"))
        total, largest = sum(file.stat().st_size for file in files), max(file.stat().st_size for file in files)
        exports = {}
        for kind in ("merged", "adapter", "whole"):
            call = [sys.executable, __file__, "--kind", kind, "--folder", str(folder), "--threads", str(args.threads)]
            done = subprocess.run(call, check=True, capture_output=True, text=True)
            exports[kind] = json.loads(done.stdout.splitlines()[-1])
    names = {
        "merged": "`abliterate export --kind merged`, checked",
        "adapter": "`abliterate export --kind adapter`, checked",
        "whole": "load, edit, save (as peers do), unchecked",
    }
    matrix = 4 * args.width * 3 * args.width
    lines = [
        f"{datetime.date.today()}, `{command()}`: a random model of {total / 1e6:.0f} MB in {len(files)} files (the largest",
        f"{largest / 1e6:.0f} MB), its largest edited matrix {matrix / 1e6:.0f} MB in float32, "
        f"{counted(args.threads, 'thread')}.",
        "",
        "| way | peak MB above the start | of the model | s |",
        "|---|---|---|---|",
        *(
            f"| {names[kind]} | {cost['peak'] / 1e6:.0f} | {cost['peak'] / total:.2f} | {cost['seconds']:.1f} |"
            for kind, cost in exports.items()
        ),
    ]
    assert exports["merged"]["verified"]
    assert exports["adapter"]["verified"]
    print("\n".join(lines))
    update_page(ROOT / "docs" / "benchmarks.md", "Exports", "\n".join(lines))


if __name__ == "__main__":
    main()
