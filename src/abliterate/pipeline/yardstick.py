"""Find the unedited model's yardstick: it answers harmless prompts, and the measures of its answers are kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.evaluation.likelihood import AskedBase, sampled_answers
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.loader import LoadedModel
from abliterate.pipeline.cache_keys import yardstick_key
from abliterate.pipeline.context import Context
from abliterate.scorers.unanswered import other_logprobs
from abliterate.scorers.yardstick import Yardstick, calibrate, measure
from abliterate.types import Prompt

# The harmless prompts whose answers are the yardstick. Of twice as many the bounds move by less than those of other draws.
ANSWERS = 128
_SEED = 0  # of the draws; the seed of the settings is that of the search


def find_yardstick(
    context: Context, loaded: LoadedModel, chat: PromptEncoder, harmless: Sequence[Prompt], base: AskedBase
) -> Yardstick:
    """The yardstick of the base's own answers to some of the `harmless` prompts, from the cache if it is there.

    The draws are seeded for each prompt, so every machine that computes it finds the same yardstick within rounding.
    """
    prompts = spread(harmless)
    key = yardstick_key(context.settings, loaded, chat, prompts)
    stored = context.store.get("yardstick", key)
    if stored is not None:
        return Yardstick.from_record(json.loads(from_bytes(stored["record"])))
    with base.model.active():
        progress = context.reporter.progress
        answers = sampled_answers(base.model.engine, prompts, _SEED, lambda done, total: progress(done, total, "prompts"))
    found = yardstick_of(base, prompts, answers)
    label = f"{loaded.info.id}: {found.answers} answers"
    context.store.put("yardstick", key, {"record": to_bytes(json.dumps(found.to_record()))}, label)
    return found


def yardstick_of(base: AskedBase, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Yardstick:
    """The yardstick of these answers of the base to these prompts."""
    own = base.logprobs(prompts, answers)
    others = other_logprobs(base, prompts, range(len(prompts)), answers)
    mine, exchanged = [], []
    for ids, at_home, away in zip(answers, own, others, strict=True):
        ended = ids[-1] in base.ends
        mine.append(measure(at_home, away, ids, ended=ended))
        if len(away):
            exchanged.append(measure(away[0], torch.stack([at_home, *away[1:]]), ids, ended=ended))
    return calibrate(mine, exchanged)


def spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """At most `ANSWERS` of the prompts, evenly spaced."""
    count = min(len(prompts), ANSWERS)
    return [prompts[index * len(prompts) // count] for index in range(count)]
