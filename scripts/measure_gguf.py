"""Measure exports to GGUF of one trial of a run beside its merged export: KL from the base, bytes and seconds.

.venv/bin/python scripts/measure_gguf.py RUN --trial N    # writes the section "Exports to GGUF" of docs/benchmarks.md

The GGUF files to edit are written from the run's model, whose family `tests/support/gguf_files.py` must know. Models are loaded
from GGUF by transformers, in float32; KL is that of the first token after the harmless evaluation prompts.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_page import command, counted, update_page
from rig import Quiet
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the writer of GGUF files comes from there

# ruff: noqa: E402
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.model import loader
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.export_gguf import GgufRequest, export_gguf
from abliterate.pipeline.export_trial import export_trial
from abliterate.pipeline.from_settings import chat_of
from abliterate.scorers.kl import kl_divergence
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings
from support.gguf_files import write_gguf

# (type of the file's matrices, --gguf-type)
WAYS = (("BF16", ""), ("F16", ""), ("Q8_0", ""), ("Q5_0", ""), ("Q4_0", ""), ("Q4_0", "Q4_0"))


class Meter:
    """First-token log-probabilities (n, vocabulary) of models on the run's harmless evaluation prompts."""

    def __init__(self, settings: Settings, count: int) -> None:
        context = Context.of(settings, Quiet())
        source = loader.resolve_source(settings.model)
        tokenizer = loader.load_tokenizer(source, settings.load)
        chat = chat_of(
            settings, tokenizer, torch.device("cpu"), Result.read(RunDirectory(Path(settings.out))).response_prefix or ""
        )
        self._batch = chat.encode(read_prompts(context).harmless_eval[:count])

    @torch.inference_mode()
    def __call__(self, model: PreTrainedModel) -> Tensor:
        ids, mask = self._batch["input_ids"], self._batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)


def loaded(folder: Path, config: Any, gguf: str | None = None) -> PreTrainedModel:
    """A model in float32, as a user of transformers loads it."""
    options: dict[str, Any] = {"gguf_file": gguf, "config": config} if gguf else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def mean_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL(first‖second) over the prompts."""
    return float(kl_divergence(first, second).mean())


def row(name: str, base_kl: float, edit: float, beside: float, size: int, seconds: float, lost: float) -> str:
    """A row of the table."""
    return f"| {name} | {base_kl:.6f} | {edit:.6f} | {beside:.6f} | {lost:.1%} | {size / 1e6:.1f} | {seconds:.1f} |"


def measure(run: Path, number: int, count: int, folder: Path) -> list[str]:
    """The rows of the table."""
    directory = RunDirectory(run)
    settings = load_settings(str(directory.settings), {"out": str(run), "export": {"kind": "merged", "push": ""}})
    source = Path(loader.resolve_source(settings.model))
    meter = Meter(settings, count)
    base_model = loaded(source, None)
    base = meter(base_model)
    started = time.perf_counter()
    merged_record = export_trial(settings, Quiet(), directory, number, folder / "merged").export
    seconds = time.perf_counter() - started
    merged = meter(loaded(folder / "merged", None))
    size = (folder / "merged" / "model.safetensors").stat().st_size
    rows = [row("merged", 0.0, mean_kl(base, merged), 0.0, size, seconds, merged_record.verification["lost_to_storage"])]
    for kind, wanted in WAYS:
        file, out = write_gguf(base_model, folder / "base.gguf", kind), folder / "out.gguf"
        started = time.perf_counter()
        record = export_gguf(settings, Quiet(), directory, number, GgufRequest(file, out, wanted)).export
        seconds = time.perf_counter() - started
        before = meter(loaded(folder, base_model.config, file.name))
        after = meter(loaded(folder, base_model.config, out.name))
        changes = sorted({f"{change['base']} → {change['export']}" for change in record.tensor_types})
        values = (mean_kl(base, before), mean_kl(before, after), mean_kl(merged, after))
        rows.append(row(f"GGUF, {', '.join(changes)}", *values, record.bytes, seconds, record.verification["lost_to_storage"]))
        out.unlink()
    return rows


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--trial", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.run.parent) as folder:
        rows = measure(args.run, args.trial, args.prompts, Path(folder))
    model = Result.read(RunDirectory(args.run)).model
    assert model is not None
    body = [
        f"{datetime.date.today()}, `{command()}`: trial {args.trial} of a run of {model.id},",
        f"up to {args.prompts} harmless prompts, {counted(args.threads, 'thread')}. "
        "The seconds contain each export's own check.",
        "",
        "| export: matrices of the file → edited ones | KL model‖file before the edit | KL before‖after the edit "
        "| KL merged‖after | largest share of a module's edit lost to rounding | MB | s |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(body))
    update_page(args.page, "Exports to GGUF", "\n".join(body))


if __name__ == "__main__":
    main()
