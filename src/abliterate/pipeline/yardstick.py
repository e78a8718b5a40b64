"""Find the unedited model's yardstick: it answers harmless prompts, and the measures of its answers are kept in the cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.evaluation.likelihood import AskedBase, sampled_answers
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.loader import LoadedModel
from abliterate.pipeline.cache_keys import yardstick_key
from abliterate.pipeline.context import Context
from abliterate.scorers.base import BaseView
from abliterate.scorers.unanswered import ALIKE, measure_fluency, other_logprobs
from abliterate.scorers.yardstick import Spoiled, Yardstick, calibrate, distinct_pairs, looped, topic
from abliterate.types import Prompt

# The harmless prompts whose answers are the yardstick. Of twice as many the bounds move by less than those of other draws.
ANSWERS = 128
_SEED = 0  # of the draws; the seed of the settings is that of the search


def yardstick_prompts(harmless: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """At most `ANSWERS` of the prompts, evenly spaced."""
    count = min(len(harmless), ANSWERS)
    return tuple(harmless[index * len(harmless) // count] for index in range(count))


def find_yardstick(context: Context, loaded: LoadedModel, chat: PromptEncoder, base: AskedBase) -> Yardstick:
    """The yardstick of the base's own answers to its harmless prompts, from the cache if it is there.

    The draws are seeded for each prompt, so every machine that computes it finds the same yardstick within rounding.
    """
    key = yardstick_key(context.settings, loaded, chat, base.harmless)
    stored = context.store.get("yardstick", key)
    if stored is not None:
        return Yardstick.from_record(json.loads(from_bytes(stored["record"])))
    total = 2 * len(base.harmless)

    def progress(done: int, before: int) -> None:
        context.reporter.progress(before + done, total, "answers")

    with base.model.active():
        engine = base.model.engine
        sampled = sampled_answers(engine, base.harmless, _SEED, lambda done, _: progress(done, 0))
        greedy = engine.respond(base.harmless, lambda done, _: progress(done, len(sampled)))
    assert greedy is not None  # only a limit can stop it
    found = yardstick_of(base, sampled, [response.ids for response in greedy])
    label = f"{loaded.info.id}: {found.answers} answers"
    context.store.put("yardstick", key, {"record": to_bytes(json.dumps(found.to_record()))}, label)
    return found


def yardstick_of(base: BaseView, answers: Sequence[Sequence[int]], greedy: Sequence[Sequence[int]]) -> Yardstick:
    """The yardstick of these sampled answers of the base to its harmless prompts, and of its greedy answers."""
    prompts, rows = base.harmless, range(len(base.harmless))
    measured = measure_fluency(base, prompts, rows, answers)
    # One prompt more than a topic is compared with: the first stands for a prompt that the answer isn't to.
    others = other_logprobs(base, prompts, rows, answers, ALIKE + 1)
    own = [replace(one, topic=topic(logprobs, away[1:])) for (one, logprobs), away in zip(measured, others, strict=True)]
    exchanged = [topic(away[0], away[1:]) for away in others if len(away) > 1]
    ends = [one.end for one, ids in zip(own, answers, strict=True) if ids[-1] in base.ends]
    distinct, loops = ([distinct_pairs(ids) for ids in some] for some in (greedy, map(looped, greedy)))
    return calibrate(own, Spoiled(distinct, loops, exchanged, ends, _cut(base, answers)))


def _cut(base: BaseView, answers: Sequence[Sequence[int]]) -> list[float]:
    """−log p of an end token in the middle of each answer; none for a model without end tokens."""
    used = Counter(ids[-1] for ids in answers if ids[-1] in base.ends) or Counter(sorted(base.ends)[:1])
    if not used:
        return []
    end = used.most_common(1)[0][0]
    found = base.logprobs(base.harmless, [(*ids[: len(ids) // 2], end) for ids in answers])
    return [-float(logprobs[-1]) for logprobs in found]
