"""Measure the memory of residuals, held and streamed, and of everything that is kept between trials.

The model is random, with the demo's tokenizer and prompts.

.venv/bin/python scripts/measure_memory.py --layers 24 --width 2048
.venv/bin/python scripts/measure_memory.py --forms      # of log-probabilities over a large vocabulary
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rig import PeakMemory, Quiet, timed
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from abliterate import load
from abliterate.model.loader import demo_path
from abliterate.pipeline import stages
from abliterate.scorers.kl import kl_divergence, small_forms, smallest_form
from abliterate.settings.sources import load_settings

MIB = 2**20
SETS = ("harmful", "harmless")
FILES = {f"{name}{use}": f"{name}{file}.jsonl" for name in SETS for use, file in (("", "_train"), ("_eval", "_eval"))}
VARIANTS = {"residuals held": 10**6, "residuals streamed": 0}  # efficiency.max_residuals_mb


def random_model(folder: Path, layers: int, width: int) -> None:
    """A model whose residuals are large beside its weights: narrow MLPs, the demo's small vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path() / "model")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 128, "num_key_value_heads": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **ids, **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(model: str, limit: int) -> dict[str, float]:
    """In MiB: the peak of the residuals stage above the resident memory before it, and the memory held when trials begin."""
    prompts = {name: str(demo_path() / "prompts" / file) for name, file in FILES.items()}
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"model": model, "cache_dir": folder, "prompts": prompts}
        options |= {"efficiency": {"max_residuals_mb": limit}, "edit": {"mode": "full"}}
        options |= {"evaluation": {"batch_size": 16}, "response": {"max_new_tokens": 8, "detect_prefix": False}}
        bench = load(load_settings("", options), Quiet())
        bench.engine.first_logprobs(bench.prompts.harmful[:16])  # a first pass's lasting allocations are not the residuals'
        gc.collect()
        peak = PeakMemory()
        peak.start()
        needed = stages.residuals(bench)
        residuals = {"residuals, peak": peak.stop()["rss_above"] / MIB}
        bench.prepare(stages.directions(bench.context, needed))
        engine: Any = bench.engine
        prepared = list(bench.editor._prepared.values())
        tables = {edit.directions.data_ptr(): edit.directions.nbytes for edit in prepared}
        base = engine.first_logprobs(bench.prompts.harmless_eval)
        return residuals | {
            "prepared edits": sum(edit.nbytes for edit in prepared) / MIB,
            "directions": sum(tables.values()) / MIB,
            "directions, one a module": sum(edit.directions.nbytes for edit in prepared) / MIB,
            "base model's states": engine._prefill.nbytes / MIB,
            "log-probabilities, dense": base.nbytes / MIB,
            "log-probabilities, kept": smallest_form(base).nbytes / MIB,
        }


def measure_forms(top: float, rows: int = 50, vocabulary: int = 150_000) -> None:
    """Print bytes and KL of each form beside the dense form, for random logits with 20 of up to `top` nats above noise."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, vocabulary, generator=generator)
    logits[:, :20] = torch.linspace(top, top * 0.24, 20)
    base = logits.log_softmax(-1)
    edited = (logits + 0.3 * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
    forms, setup = timed(lambda: small_forms(base))
    dense, seconds = timed(lambda: kl_divergence(base, edited))
    print(f"top {top}: dense {1000 * seconds:.0f} ms a trial; {setup:.2f} s to choose")
    for form in forms or [smallest_form(base)]:
        if isinstance(form, torch.Tensor):
            print("  kept as it is")
            continue
        divergences, seconds = timed(lambda form=form: form.kl(edited))
        error = float((divergences - dense).abs().max())
        share = form.nbytes / base.nbytes
        print(f"  {type(form).__name__}: {share:.4f} of the bytes, {1000 * seconds:.0f} ms, KL off by {error:.0e}")


def main() -> None:
    """Measure every variant in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "LIMIT"), help="used by the script itself")
    parser.add_argument("--forms", action="store_true")
    args = parser.parse_args()
    if args.forms:
        measure_forms(20.0)
        measure_forms(40.0)
        return
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder), args.layers, args.width)
        for name, limit in VARIANTS.items():
            command = [sys.executable, __file__, "--one", folder, str(limit)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
