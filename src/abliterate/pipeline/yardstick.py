"""Find the unedited model's yardstick: it answers harmless prompts, and the measures of its answers are kept in the cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import TypeVar

import torch

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.engine.self_check import Engine
from abliterate.evaluation.likelihood import AskedBase, OwnAnswers, own_answers
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.loader import LoadedModel
from abliterate.pipeline.cache_keys import yardstick_key
from abliterate.pipeline.context import Context
from abliterate.scorers.base import BaseView
from abliterate.scorers.unanswered import ALIKE, other_logprobs
from abliterate.scorers.yardstick import Measures, Spoiled, Yardstick, calibrate, distinct_pairs, fluency, looped, topic
from abliterate.types import Prompt

# The harmless prompts whose answers are the yardstick. Of twice as many the bounds move by less than those of other draws.
ANSWERS = 128
# The first of them, evenly spaced, that are also answered greedily and looked at for their topic, which is most of the work.
# With all of them these two bounds have the same means and hardly less spread (`scripts/measure_yardstick.py`).
LOOKED = 48
Item = TypeVar("Item")
_SEED = 0  # of the draws; the seed of the settings is that of the search


def yardstick_prompts(harmless: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """At most `ANSWERS` of the prompts, evenly spaced, and so are the first `LOOKED` of them."""
    prompts = spaced(harmless, ANSWERS)
    first = spaced(range(len(prompts)), LOOKED)
    rest = sorted(set(range(len(prompts))) - set(first))
    return tuple(prompts[index] for index in (*first, *rest))


def spaced(items: Sequence[Item], most: int) -> tuple[Item, ...]:
    """At most so many of the items, evenly spaced."""
    count = min(len(items), most)
    return tuple(items[index * len(items) // count] for index in range(count))


def find_yardstick(context: Context, loaded: LoadedModel, chat: PromptEncoder, base: AskedBase, engine: Engine) -> Yardstick:
    """The yardstick of the base's own answers to its harmless prompts, by `engine`, or from the cache if it is there.

    The draws are seeded for each prompt, so every machine and engine finds the same yardstick within rounding.
    """
    key = yardstick_key(context.settings, loaded, chat, base.harmless)
    stored = context.store.get("yardstick", key)
    if stored is not None:
        return Yardstick.from_record(json.loads(from_bytes(stored["record"])))
    with base.model.active():
        own = own_answers(
            engine, base.harmless, LOOKED, _SEED, lambda done, total: context.reporter.progress(done, total, "answers")
        )
    found = yardstick_of(base, own)
    label = f"{loaded.info.id}: {found.answers} answers"
    context.store.put("yardstick", key, {"record": to_bytes(json.dumps(found.to_record()))}, label)
    return found


def yardstick_of(base: BaseView, answers: OwnAnswers) -> Yardstick:
    """The yardstick of these answers of the base to its harmless prompts."""
    own, spoiled = measured(base, answers)
    return calibrate(own, spoiled)


def measured(base: BaseView, given: OwnAnswers) -> tuple[list[Measures], Spoiled]:
    """The measures of sampled answers of the base to its harmless prompts, and of what they are told from.

    As many of the first answers as there are greedy ones have a topic; that of the others isn't a number.
    """
    answers, greedy = given.sampled, given.greedy
    prompts, end, looked = base.harmless, usual_end(base, answers), range(len(greedy))
    # An end in the middle of an answer is measured in the answer's own pass.
    if given.noted is not None:
        found = [torch.stack([values[None], values[end]]) for values in given.noted]
    else:
        found = base.logprobs_beside(prompts, answers, 0 if end is None else end)
    own = [
        replace(fluency(both[0], ids, ended=ids[-1] in base.ends), topic=nan) for both, ids in zip(found, answers, strict=True)
    ]
    # One prompt more than a topic is compared with: the first stands for a prompt that the answer isn't to.
    others = other_logprobs(base, prompts[: len(greedy)], looked, answers[: len(greedy)], ALIKE + 1)
    for index, away in enumerate(others):
        own[index] = replace(own[index], topic=topic(found[index][0], away[1:]))
    exchanged = [topic(away[0], away[1:]) for away in others if len(away) > 1]
    ends = [one.end for one, ids in zip(own, answers, strict=True) if ids[-1] in base.ends]
    cut = [] if end is None else [-float(both[1, len(ids) // 2]) for both, ids in zip(found, answers, strict=True)]
    distinct, loops = ([distinct_pairs(ids) for ids in some] for some in (greedy, map(looped, greedy)))
    return own, Spoiled(distinct, loops, exchanged, ends, cut)


def usual_end(base: BaseView, answers: Sequence[Sequence[int]]) -> int | None:
    """The end token of most answers, or of the model; None for a model without end tokens."""
    used = Counter(ids[-1] for ids in answers if ids[-1] in base.ends) or Counter(sorted(base.ends)[:1])
    return used.most_common(1)[0][0] if used else None
