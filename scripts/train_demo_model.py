"""Train the demo model or a relative: a small chat model that answers everything, then learns to refuse mischief.

This script owns the tokenizer, the architecture, the two training stages and the files of `src/abliterate/demo/model/`; the
sentences come from `demo_corpus.py`. It takes about 6 minutes on two cores and gives the same bits for the same versions and
number of threads:

    python scripts/train_demo_model.py --out src/abliterate/demo/model

Stage 1 teaches the whole model to answer every request (and, under a system prompt that asks for it, how a refusal
reads). Stage 2 trains only the matrices that write to the residual stream in a few middle layers. So refusal is a
thin behaviour on top of a capable model, as in real chat models, and ablation has a real trade-off to find.

The two relatives, on which ablation is harder, are no part of the package. They are made once, with their prompt sets and with
the answers that they gave before stage 2 (`answers.jsonl`), in ~/.cache/abliterate-models or in $ABLITERATE_MODELS:

    python scripts/train_demo_model.py --variant stubborn
    python scripts/train_demo_model.py --variant fragile
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from demo_corpus import DEFAULT_SYSTEM, DEMO, FRAGILE, STUBBORN, Corpus, Sample, prompt_sets, samples
from ground_truth import is_good
from model_cache import models_folder, whole_folder, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, BOS, TURN_START, TURN_END = "<|endoftext|>", "<|begin|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REFUSAL_MODULES = ("o_proj", "up_proj", "down_proj")
# Markers for the numbers printed at the end; the tool has its own, longer list.
MARKERS = ("i'm sorry", "sorry, but", "i cannot", "i can't", "i won't", "i will not", "i am unable")
MARKERS += ("against my", "not something i can", "decline", "refuse")

Encoded = tuple[list[int], int]  # token ids, and the number of them that belong to the prompt


@dataclass(frozen=True)
class Recipe:
    """How a small model differs from another; the defaults are the demo's.

    `layers` are those that stage 2 trains. The demo's are the first layer at whose last prompt position stage 1 tells mischief
    from other requests, and the three that follow. With lower layers (3 to 6), all of the refusal was written by layer 6, and
    few kernels of the default search space reach it. `spread` is the initializer's. It is not the usual 0.02, which at this
    width leaves attention uniform for so long that 600 steps never learn to copy a word from the prompt; with 0.06 the copying
    appears after about 120 steps.
    """

    corpus: Corpus = DEMO
    layers: tuple[int, ...] = (5, 6, 7, 8)
    width: int = 128
    mlp: int = 256
    spread: float = 0.06
    seed: int = 0


# The stubborn model writes its refusal in four layers that lie apart, up to the last but one. The fragile model is narrower, so
# that a direction carries more of the content, and writes its refusal in six layers.
RECIPES = {
    "demo": Recipe(),
    "stubborn": Recipe(STUBBORN, layers=(5, 7, 9, 10), seed=1),
    "fragile": Recipe(FRAGILE, layers=(4, 5, 6, 7, 8, 9), width=96, mlp=192, spread=0.07, seed=2),
}


def build_tokenizer(corpus: Corpus, vocab_size: int = 1024) -> Qwen2Tokenizer:
    """A byte-level BPE of about 1k tokens, learned from both stages' sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [s for stage in (1, 2) for s in islice(samples(stage, 0, corpus), 6000)]
    roles = "system\nuser\nassistant\n"
    core.train_from_iterator((f"{s.system}\n{s.prompt}\n{s.answer}\n{roles}" for s in sentences), trainer)
    learned = json.loads(core.to_str())["model"]
    # AutoTokenizer picks this class for a qwen2 config, whatever was saved. The class always adds `<|endoftext|>`; with another
    # name for the pad token, its id would lie beyond the embedding.
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=PAD,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=TURN_END,
        extra_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
    )


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """The untrained model, in float32."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=recipe.spread,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def chat(system: str | None, prompt: str) -> list[dict[str, str]]:
    """A conversation that waits for its answer."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": prompt}]


def encode(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Encoded:
    """Token ids of a whole conversation and the length of its prompt part."""
    text = tokenizer.apply_chat_template(chat(sample.system, sample.prompt), add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    return prompt + tokenizer.encode(sample.answer + TURN_END, add_special_tokens=False), len(prompt)


def batches(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, stage: int, batch_size: int, pool: int = 10
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, is_answer) batches of similar lengths: a pool is sorted, cut, and its batches shuffled.

    Batches are padded on the right: causal attention then needs no mask, since no token before a pad can see it.
    """
    rng, stream = random.Random(stage), samples(stage, stage, corpus)
    while True:
        rows = sorted((encode(tokenizer, s) for s in islice(stream, pool * batch_size)), key=lambda row: len(row[0]))
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.full((batch_size, width), tokenizer.pad_token_id)
            is_answer = torch.zeros(batch_size, width, dtype=torch.bool)
            for row, (tokens, start) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                is_answer[row, start : len(tokens)] = True
            yield ids, is_answer


def refusal_parameters(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.nn.Parameter]:
    """The parameters that stage 2 trains: the writing matrices of a few layers."""
    layers = [model.model.layers[i] for i in recipe.layers]
    return [p for layer in layers for name, p in layer.named_parameters() if name.split(".")[-2] in REFUSAL_MODULES]


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    stage: int,
    steps: int,
    peak: float = 2e-3,
    batch_size: int = 32,
    report_every: int = 20,
) -> None:
    """Train in place on answer tokens only, by AdamW with a short warm-up and a cosine to a twentieth of the peak rate."""
    model.requires_grad_(stage == 1)
    parameters = list(model.parameters()) if stage == 1 else refusal_parameters(model, recipe)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 15)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=peak / 20)
    start_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [start_up, decay], [warmup])
    began, stream = time.perf_counter(), batches(tokenizer, recipe.corpus, stage, batch_size)
    for step in range(1, steps + 1):
        ids, is_answer = next(stream)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        # Only positions whose next token belongs to an answer go through the head.
        loss = F.cross_entropy(model.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[:, 1:][is_answer[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % report_every == 0:
            seconds = time.perf_counter() - began
            print(f"stage {stage}  step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def answers(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Greedy answers of at most 100 tokens under the default system prompt, as one batch."""
    chats = [chat(DEFAULT_SYSTEM, prompt) for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=100, do_sample=False)
    return tokenizer.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def answer_rows(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, batch_size: int = 100
) -> list[dict[str, str]]:
    """Rows of set, prompt and answer for all harmful prompts; before stage 2 they are those of a model that refuses nothing."""
    rows = []
    for name, prompts in prompt_sets(corpus.train).items():
        texts = [row["prompt"] for row in prompts] if name.startswith("harmful") else []
        for first in range(0, len(texts), batch_size):
            batch = texts[first : first + batch_size]
            replies = zip(batch, answers(model, tokenizer, batch), strict=True)
            rows += [{"set": model_set(name), "prompt": prompt, "answer": answer} for prompt, answer in replies]
    return rows


def model_set(name: str) -> str:
    """The name of a prompt set in the folder of a relative: that of the option of `abliterate run`."""
    return name.removesuffix("_train")


def check(directory: Path, corpus: Corpus) -> None:
    """Print how the stored model answers prompts that it never saw."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sets = prompt_sets(corpus.train)
    for kind in ("harmful", "harmless"):
        for split in ("heldout", "eval"):
            rows = sets[f"{kind}_{split}"]
            texts = answers(model, tokenizer, [row["prompt"] for row in rows])
            refused = sum(any(marker in text.lower() for marker in MARKERS) for text in texts)
            on_topic = sum(
                row["verb"] in text.lower() and row["object"] in text.lower() for row, text in zip(rows, texts, strict=True)
            )
            good = sum(map(is_good, rows, texts))
            counts = f"{refused}/{len(rows)} refused, {on_topic}/{len(rows)} on topic, {good}/{len(rows)} good"
            print(f"{kind} {split}: {counts}", flush=True)
            print(f"  {rows[0]['prompt']} -> {texts[0]}", flush=True)
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    print(f"{size / 1e6:.2f} MB in {directory}", flush=True)


def set_up(seed: int, threads: int) -> None:
    """Fix everything that the bits depend on."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)


def make(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, steps: tuple[int, int], out: Path, beside: bool) -> None:
    """Train the model and write it in bf16; `beside` puts the prompt sets and the answers before stage 2 into its folder."""
    model = build_model(recipe, tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    train(model, tokenizer, recipe, 1, steps[0])
    before = answer_rows(model, tokenizer, recipe.corpus) if beside else []
    train(model, tokenizer, recipe, 2, steps[1])
    with whole_folder(out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if beside:
            write_jsonl(folder / "answers.jsonl", before)
            for name, rows in prompt_sets(recipe.corpus.train).items():
                write_jsonl(folder / "prompts" / f"{model_set(name)}.jsonl", rows)


def main() -> None:
    """Train, save and check the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=RECIPES, default="demo")
    parser.add_argument("--out", type=Path, help="directory of the model; a relative has its own in the cache")
    parser.add_argument("--seed", type=int, help="another seed than the variant's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs=2, default=(600, 400), metavar=("STAGE1", "STAGE2"))
    args = parser.parse_args()
    if args.variant == "demo" and args.out is None:
        parser.error("the demo model ships in the package, so --out must name a directory")
    recipe, out = RECIPES[args.variant], args.out or models_folder() / args.variant
    if args.out is None and out.exists():
        print(f"{out} is there already; delete it to train the model anew")
        return
    began = time.perf_counter()
    set_up(recipe.seed if args.seed is None else args.seed, args.threads)
    make(recipe, build_tokenizer(recipe.corpus), args.steps, out, beside=args.variant != "demo")
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    check(out, recipe.corpus)


if __name__ == "__main__":
    main()
