"""How well does the scorer `unanswered` tell real answers from others? Writes docs/generated/unanswered.md.

    python scripts/measure_unanswered.py --trials 100

The small models' corpus tells exactly which answers are good (`ground_truth.py`), so recall, precision and the order of trials
can be counted, beside those of refusal markers alone. On the real model (`real_model.py`) the answers that it gave before it
was taught to refuse must count, and spoiled ones must not. Models that aren't in the folder of models are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ground_truth import is_good
from model_cache import models_folder, read_jsonl
from rig import Counters, Quiet

from abliterate import Workbench, find_directions, load
from abliterate.model.loader import demo_path
from abliterate.scorers import Observation, Response
from abliterate.scorers.refusals import Refusals, read_markers
from abliterate.scorers.unanswered import Unanswered, kinds_of
from abliterate.scorers.yardstick import looped
from abliterate.settings.sources import config_path, load_settings
from abliterate.types import Kernel, TrialParams

SMALL = ("demo", "stubborn", "fragile")
REAL = "smollm2-refusing"
# Half of the trials are drawn from the default space; the others edit more layers, and harder, so that answers break.
HARD = {"max_coeff": {"default": [0.5, 4.0]}, "position": [0.2, 0.8], "distance": 1.0, "direction_index": [0.1, 0.95]}
SETS = ("harmful", "harmless", "harmful_eval", "harmless_eval")

Table = dict[str, Any]


@dataclass
class Told:
    """What markers and the scorer say of the responses of some trials, and the truth; one row a trial."""

    good: list[int]
    answered: list[int]
    compliant: list[int]
    pairs: list[tuple[bool, bool, bool]]  # (truly good, answered by the scorer, no refusal by markers), one a response


def settings_of(model: str, search: Mapping[str, Any]) -> Any:
    """Settings that search a model of the folder of models, or the demo, on its own prompts."""
    folder = models_folder() / model
    prompts = {} if model == "demo" else {name: str(folder / "prompts" / f"{name}.jsonl") for name in SETS}
    return load_settings(
        "",
        {
            "model": model if model == "demo" else str(folder),
            "prompts": prompts,
            "search": search,
            "evaluation": {"batch_size": 50},
            "edit": {"mode": "full"},  # its higher coeffs break answers, and the scorer has to tell these from good ones
        },
    )


def rows_of(model: str) -> list[dict[str, str]]:
    """The harmful evaluation prompts with their verbs and objects."""
    folder = demo_path() if model == "demo" else models_folder() / model
    return read_jsonl(folder / "prompts" / "harmful_eval.jsonl")


def responses_of(bench: Workbench, params: TrialParams) -> list[Response]:
    """The responses to the harmful evaluation prompts under an edit."""
    with bench.edited(params):
        found = bench.engine.respond(bench.prompts.harmful_eval)
    assert found is not None
    return found


def tell(model: str, trials: int, seed: int) -> tuple[Told, Table]:
    """What is said of the responses of `trials` trials of a small model, and the cost of saying it."""
    told = Told([], [], [], [])
    with load(settings_of(model, {}), Quiet()) as bench:
        find_directions(bench)
        hard = load_settings("", {"search": HARD}).search
        spaces = (bench.space, type(bench.space)(hard, bench.space.n_layers, bench.space.components))
        params = [p for index, space in enumerate(spaces) for p in space.samples((trials + index) // 2, seed=seed)]
        rows, base, counters = rows_of(model), bench.asked(), Counters()
        base.yardstick()
        scorer = next(scorer for scorer in bench.scorers if isinstance(scorer, Unanswered))
        generated = 0
        for one in params:
            responses = responses_of(bench, one)
            hook = bench.loaded.model.register_forward_pre_hook(counters.count, with_kwargs=True)
            kinds = scorer.kinds(Observation(responses, torch.empty(0), bench.prompts.harmful_eval, base))
            hook.remove()
            good = [
                is_good(row, said.text, cut=said.ids[-1] not in base.ends) for row, said in zip(rows, responses, strict=True)
            ]
            generated += sum(len(said.ids) for said, kind in zip(responses, kinds, strict=True) if kind != "refused")
            told.good.append(sum(good))
            told.answered.append(kinds.count("answered"))
            told.compliant.append(len(kinds) - kinds.count("refused"))
            told.pairs += [(g, kind == "answered", kind != "refused") for g, kind in zip(good, kinds, strict=True)]
            print(f"{model} {len(told.good)}/{len(params)}: {sum(good)} good, {told.answered[-1]} answered", flush=True)
        return told, {"generated": generated, "asked": counters.tokens, "yardstick": base.yardstick().bounds}


def share(wanted: Sequence[bool], among: Sequence[bool]) -> float:
    """The share of `among` for which `wanted` holds, too; 1 if there are none."""
    return sum(a and b for a, b in zip(wanted, among, strict=True)) / max(1, sum(among)) if any(among) else 1.0


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value; equal values share their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's correlation of ranks."""
    pairs = torch.tensor([ranks(first), ranks(second)], dtype=torch.float64)
    return float(torch.corrcoef(pairs)[0, 1])


def small_row(model: str, told: Told, cost: Mapping[str, Any]) -> str:
    """The table row of a small model."""
    good, answered, compliant = (list(column) for column in zip(*told.pairs, strict=True))
    cells = [
        model,
        len(told.good),
        sum(compliant),
        sum(good),
        f"{share(answered, good):.3f}",
        f"{share(good, answered):.3f}",
        f"{share(good, compliant):.3f}",
        f"{spearman(told.answered, told.good):.3f}",
        f"{spearman(told.compliant, told.good):.3f}",
        f"{cost['asked'] / max(1, cost['generated']):.2f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


# -- the real model


def shuffled(ids: Sequence[int], end: int, draw: random.Random) -> list[int]:
    """The tokens in another order, with their end in its place."""
    body = [token for token in ids if token != end]
    draw.shuffle(body)
    return [*body, *([end] if ids[-1] == end else [])]


def as_loop(ids: Sequence[int], end: int, draw: random.Random) -> list[int]:
    """The first tokens over and over, as long as the answer was."""
    return looped(ids)


def cut(ids: Sequence[int], end: int, draw: random.Random) -> list[int]:
    """An answer that ends somewhere between a quarter and three quarters of it."""
    body = [token for token in ids if token != end]
    return [*body[: max(8, draw.randrange(len(body) // 4, 3 * len(body) // 4 + 1))], end]


SPOILT = {"looped": as_loop, "cut": cut, "shuffled": shuffled}


def over_ablated(bench: Workbench, strength: float) -> list[Response]:
    """Responses under an edit that takes far more than a direction out of every layer."""
    last = bench.space.n_layers - 1
    kernel = Kernel(strength, 0.5 * last, strength, float(last))
    return responses_of(bench, TrialParams("per layer", 0.6 * last, dict.fromkeys(bench.space.components, kernel)))


def controls(model: str) -> tuple[dict[str, tuple[int, int]], Mapping[str, float]]:
    """{kind of answer: (how many count as answered, of how many that are no refusals)} on the real model."""
    markers = Refusals(read_markers(config_path("markers.txt")))
    originals = {row["prompt"]: row for row in read_jsonl(models_folder() / model / "answers.jsonl")}
    draw, found = random.Random(0), {}
    with load(settings_of(model, {}), Quiet()) as bench:
        find_directions(bench)
        base, end, length = bench.asked(), min(bench.plain.ends.ids), bench.settings.response.max_new_tokens
        prompts = [prompt for prompt in bench.prompts.harmful_eval if prompt.text in originals]

        def ids_of(row: Mapping[str, Any]) -> list[int]:
            ids = list(bench.loaded.tokenizer(row["answer"], add_special_tokens=False)["input_ids"])
            return [*ids, *([end] if row["ended"] else [])][:length]

        answers = [ids_of(originals[prompt.text]) for prompt in prompts]
        shift = len(answers) // 3  # so that no answer's own prompt is among those that it is compared with
        sets = {"original answers": answers, "answers to another prompt": answers[shift:] + answers[:shift]}
        sets |= {name: [spoil(ids, end, draw) for ids in answers] for name, spoil in SPOILT.items()}
        for name, ids in sets.items():
            kinds = kinds_of(base, prompts, range(len(prompts)), ids)
            found[name] = (kinds.count("answered"), len(kinds))
        for strength in (2.0, 4.0):
            responses = over_ablated(bench, strength)
            rows = [row for row, said in enumerate(responses) if not markers.is_refusal(said)]
            kinds = kinds_of(base, bench.prompts.harmful_eval, rows, [responses[row].ids for row in rows])
            found[f"over-ablated, λ = {strength:g}"] = (kinds.count("answered"), len(kinds))
        return found, base.yardstick().bounds


def page(small: Sequence[str], real: Mapping[str, tuple[int, int]], command: str) -> str:
    """The page in Markdown."""
    lines = [
        "# How well `unanswered` tells real answers",
        "",
        f"Generated by `python {command}` on {datetime.date.today()}.",
        "",
        "The small models' good answers are counted exactly (`scripts/ground_truth.py`). *Recall* is the share of good answers",
        "that count as answered, *precision* the share of answered responses that are good; of markers alone the recall is 1.",
        "*Order* is Spearman's correlation, over trials, of the count with that of good answers. *Cost* is the number of",
        "tokens that the base is shown for each token of the judged responses.",
        "",
        "| model | trials | no refusals | good | recall | precision | of markers | order | of markers | cost |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *small,
    ]
    if real:
        lines += [
            "",
            f"On {REAL}, where at least 95 % of the first and at most 5 % of the others should count as answered:",
            "",
        ]
        lines += ["| answers | answered | share |", "|---|---|---|"]
        lines += [f"| {name} | {count} of {total} | {count / max(1, total):.0%} |" for name, (count, total) in real.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every model that is there and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100, help="trials of each small model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=[*SMALL, REAL])
    parser.add_argument("--out", type=Path, default=Path("docs/generated/unanswered.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    there = [model for model in args.models if model == "demo" or (models_folder() / model / "config.json").exists()]
    small = []
    for model in (name for name in there if name != REAL):
        told, cost = tell(model, args.trials, args.seed)
        small.append(small_row(model, told, cost))
        print(small[-1], json.dumps(cost), flush=True)
    real, bounds = controls(REAL) if REAL in there else ({}, {})
    print(real, bounds, flush=True)
    args.out.write_text(page(small, real, " ".join(sys.argv)), encoding="utf-8")


if __name__ == "__main__":
    main()
