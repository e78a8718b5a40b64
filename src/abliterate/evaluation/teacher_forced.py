"""Feed two models the same answers and compare them at every token: KL(base‖candidate) and both log-likelihoods.

A few rows are fed at a time, so that at most `BUDGET` bytes of logits are held, whatever the vocabulary and number of prompts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from abliterate.engine.batching import Batches
from abliterate.engine.forward import accepted, feed
from abliterate.engine.kv_cache import select_rows
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import TrialError
from abliterate.model.memory import memory_errors
from abliterate.scorers.kl import kl_divergence, with_float64

BUDGET = 2**29  # bytes


@dataclass(frozen=True)
class ModelView:
    """One of two models that are compared: its engine, which observes it while `active()`.

    Both may share one model object, once with an edit and once without. With `share`, rows may share prompts (`may_share`).
    """

    engine: ReferenceEngine
    active: Callable[[], AbstractContextManager[None]]
    share: bool = False


@dataclass(frozen=True)
class TeacherForced:
    """A prompt's ids and the ids of the answer that is fed after it; the answer has at least one token."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True)
class Drift:
    """For each token (T) of one answer, float64: KL(base‖candidate), and the token's −log p under either model, in nats."""

    kl: Tensor
    base: Tensor
    candidate: Tensor


def drift(
    base: ModelView,
    candidate: ModelView,
    rows: Sequence[TeacherForced],
    progress: Callable[[int], None],
    *,
    budget: int = BUDGET,
) -> list[Drift]:
    """One `Drift` per row, on the CPU. `progress(done)` counts rows; `budget` is the most bytes of logits held.

    Raises:
        TrialError: a logit is not a number, a KL is not finite, or a single row doesn't fit.
    """
    longest = max(len(row.answer) for row in rows)
    config = base.engine.model.config.get_text_config()
    # Both models' logits in their own dtype, and one row's logits three times in float32.
    per_row = 2 * longest * config.vocab_size * 4
    size = max(1, min(base.engine.sizes.prefill, budget // per_row))
    batches = Batches(size, base.engine.chat.device, row_bytes=per_row)
    done = 0

    def work(batch: Sequence[TeacherForced]) -> Sequence[Drift]:
        nonlocal done
        with base.active(), torch.inference_mode():
            before = answer_logits(base.engine.model, batch, base.engine.chat.device)
        with candidate.active(), torch.inference_mode():
            after = answer_logits(candidate.engine.model, batch, candidate.engine.chat.device)
        drifts = [_drift(base_row, edited_row, row) for base_row, edited_row, row in zip(before, after, batch, strict=True)]
        done += len(batch)
        progress(done)
        base.engine.check()
        return drifts

    return batches.run(rows, work)


def answer_logits(model: Any, rows: Sequence[TeacherForced], device: torch.device, *, share: bool = False) -> list[Tensor]:
    """Raw logits (T, vocabulary) at each token of each row's answer, teacher-forced.

    Without `share`, one pass feeds prompts and answers. With it (`may_share`), a pass of its own feeds the beginning of all
    prompts once, and another one each prompt that several rows have; the logits are the same within rounding. Pads are on the
    left of what a pass feeds, and carry the row's own first token, as in `Chat.encode`.
    """
    longest, takes = max(len(row.answer) for row in rows), accepted(model)
    cache: Cache | None = None
    mask = torch.empty(1, 0, dtype=torch.long, device=device)
    passes = _passes(rows, share=share)
    for number, (segments, after) in enumerate(passes, start=1):
        is_last, width = number == len(passes), max(map(len, segments))
        pads = [width - len(segment) for segment in segments]
        ids = [[segment[0]] * count + segment for segment, count in zip(segments, pads, strict=True)]
        own = [[0] * count + [1] * len(segment) for segment, count in zip(segments, pads, strict=True)]
        chosen = torch.tensor(after, device=device)
        mask = torch.cat([mask[chosen], torch.tensor(own, device=device)], dim=1)
        cache = None if cache is None else select_rows(cache, chosen)
        last = longest if is_last else 1
        logits, cache = feed(model, takes, torch.tensor(ids, device=device), mask, cache, last=last, keep_cache=not is_last)
    return [logits[index, -len(row.answer) :] for index, row in enumerate(rows)]


def fed_tokens(rows: Sequence[TeacherForced], *, share: bool) -> int:
    """The number of tokens, without pads, that `answer_logits` feeds."""
    return sum(len(segment) for segments, _ in _passes(rows, share=share) for segment in segments)


def may_share(engine: object) -> bool:
    """Whether rows may share prompts: a trial engine has found that this model's cache allows it, and checked the numbers."""
    return isinstance(engine, TrialEngine) and engine.sharing == "between" and engine.passes.takes_positions


def _passes(rows: Sequence[TeacherForced], *, share: bool) -> list[tuple[list[list[int]], list[int]]]:
    """The passes of `answer_logits`: each feeds segments of tokens, and each segment follows one of the pass before."""
    whole = [[*row.prompt, *row.answer[:-1]] for row in rows]
    if not share:
        return [(whole, [0] * len(rows))]
    # The last token of a prompt is fed with the answer, because its logits are those of the answer's first token.
    stems = [tuple(row.prompt[:-1]) for row in rows]
    common = len(os.path.commonprefix(stems))
    passes: list[tuple[list[list[int]], list[int]]] = []
    after, begun = [0] * len(rows), 0
    if common and len(rows) > 1:
        passes.append(([list(stems[0][:common])], [0]))
        begun = common
    distinct = list(dict.fromkeys(stems))
    if len(distinct) < len(stems) and min(map(len, stems)) > begun:
        passes.append(([list(stem[begun:]) for stem in distinct], [0] * len(distinct)))
        after = [distinct.index(stem) for stem in stems]
        rest = [tokens[len(stem) :] for tokens, stem in zip(whole, stems, strict=True)]
    else:
        rest = [tokens[begun:] for tokens in whole]
    return [*passes, (rest, after)]


def _drift(before: Tensor, after: Tensor, row: TeacherForced) -> Drift:
    with memory_errors():
        base = before.float().log_softmax(dim=-1)
        edited = after.to(base.device).float().log_softmax(dim=-1)
        base, edited = with_float64(base), with_float64(edited)
        if torch.isnan(edited).any():
            raise TrialError("the model's logits are not numbers")
        kl = kl_divergence(base, edited)
        tokens = torch.tensor(list(row.answer), device=base.device)[:, None]
        losses = [-logprobs.gather(1, tokens)[:, 0].double() for logprobs in (base, edited)]
    if not torch.isfinite(torch.stack([kl, *losses])).all():
        raise TrialError("the KL divergence is not finite")
    return Drift(*(values.cpu() for values in (kl, *losses)))
