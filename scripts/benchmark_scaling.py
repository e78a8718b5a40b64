"""Measure how cost grows with prompts, response length, layers, width and trials, each doubled three times on random models.

    .venv/bin/python scripts/benchmark_scaling.py      # writes the section "Scaling" of docs/benchmarks.md

Random models answer up to the length limit, so every trial is full work. Beside the seconds stands the work, in multiply-adds
of the weights for all prompt and response tokens; the cost must not grow faster.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from benchmark_page import command, counted, update_page
from rig import make_rig
from transformers import AutoTokenizer

from abliterate.model.loader import demo_path
from abliterate.search.pruner import DominancePruner
from abliterate.search.space import Space
from abliterate.search.study import open_study
from abliterate.settings.schema import SearchSettings
from abliterate.settings.sources import load_settings
from abliterate.types import Trial

ROOT = Path(__file__).parents[1]
VOCABULARY = 1024
NEVER = DominancePruner(((0.0, 10**9),))


@dataclass(frozen=True)
class Size:
    """The size of one synthetic model and its prompts."""

    prompts: int = 50
    length: int = 50
    layers: int = 6
    width: int = 128

    def work(self) -> float:
        """Multiply-adds of all matrices over all tokens; each of two prompts has about 15 tokens after the shared prefix."""
        per_token = self.layers * self.width**2 * (4 + 3 * 2)
        head = VOCABULARY * self.width
        return self.prompts * (per_token * (15 * 2 + self.length) + head * (2 + self.length))


DOUBLED = {
    "prompts": [Size(prompts=count) for count in (25, 50, 100, 200)],
    "response length": [Size(length=count) for count in (25, 50, 100, 200)],
    "layers": [Size(layers=count) for count in (6, 12, 24, 48)],
    "width": [Size(width=count) for count in (128, 256, 512, 1024)],
}


def make_model(size: Size, folder: Path) -> Path:
    """A random model with the demo's tokenizer that never ends a response."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path() / "model")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt_files(count: int, folder: Path) -> dict[str, str]:
    """`count` of the demo's prompts for each set."""
    files = {}
    for kind in ("harmful", "harmless"):
        lines = (demo_path() / "prompts" / f"{kind}_train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        for name, chosen in ((kind, lines[:25]), (f"{kind}_eval", lines)):
            files[name] = str(folder / f"{name}.jsonl")
            Path(files[name]).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return files


def seconds(size: Size, repeats: int) -> float:
    """Median seconds of a trial with everything on, without pruning."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_model(size, folder / "model")
        options = {
            "model": str(model),
            "cache_dir": str(folder / "cache"),
            "prompts": prompt_files(size.prompts, folder),
            "response": {"max_new_tokens": size.length, "detect_prefix": False},
            "evaluation": {"batch_size": 50},
        }
        rig = make_rig(load_settings("", options), with_baseline=False)
        times = []
        for params in rig.bench.space.samples(repeats, seed=1):
            started = time.perf_counter()
            rig.evaluate(0, params, NEVER)
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def study_seconds(trials: int) -> float:
    """The cost of the search itself: seconds to ask for and tell `trials` trials."""
    space = Space(SearchSettings(trials=trials), 32, ("attn.o_proj", "mlp.down_proj"))
    with tempfile.TemporaryDirectory() as folder:
        study = open_study("", Path(folder) / "study.journal", space, 0)
        study.claim({})
        started = time.perf_counter()
        for number in range(trials):
            asked = study.ask()
            kl = {"mean": asked.params.direction_index / 100, "median": 0.0, "max": 0.0}
            scores = {"kl": kl, "refusals": number % 50, "unanswered": {"count": number % 50}}
            study.tell(asked, Trial(number, asked.params, "complete", scores, 1.0), 100)
        return time.perf_counter() - started


def rows(repeats: int) -> Iterator[str]:
    """The rows of the table."""
    for name, sizes in DOUBLED.items():
        costs = [(size, seconds(size, repeats)) for size in sizes]
        for (before, cost_before), (size, cost) in itertools.pairwise([(replace(sizes[0]), costs[0][1]), *costs]):
            field = {"response length": "length"}.get(name, name)
            grown = f"{cost / cost_before:.2f} | {size.work() / before.work():.2f}" if size != before else "| "
            yield f"| {name} | {getattr(size, field)} | {cost:.3f} | {grown} |"
    cost_before = 0.0
    for count in (25, 50, 100, 200):
        cost = study_seconds(count)
        grown = f"{cost / cost_before:.2f} | 2.00" if cost_before else "| "
        yield f"| trials (ask and tell alone) | {count} | {cost:.3f} | {grown} |"
        cost_before = cost


def main() -> None:
    """Measure and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [
        f"{datetime.date.today()}, `{command()}`: seconds of one trial (or of the search alone), "
        f"{counted(args.threads, 'thread')}.",
        "",
        "| doubled | value | s | × the row before | work × |",
        "|---|---|---|---|---|",
    ]
    for line in rows(args.repeats):
        print(line, flush=True)
        lines.append(line)
    update_page(ROOT / "docs" / "benchmarks.md", "Scaling", "\n".join(lines))


if __name__ == "__main__":
    main()
