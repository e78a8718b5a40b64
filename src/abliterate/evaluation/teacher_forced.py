"""Feed two models the same answers and compare them at every token: KL(base‖candidate) and both log-likelihoods.

A few rows are fed at a time, so that at most `BUDGET` bytes of logits are held, whatever the vocabulary and number of prompts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abliterate.engine.batching import Batches
from abliterate.engine.layout import positions
from abliterate.engine.reference import ReferenceEngine
from abliterate.errors import TrialError
from abliterate.model.memory import memory_errors
from abliterate.scorers.kl import kl_divergence

BUDGET = 2**29  # bytes


@dataclass(frozen=True)
class ModelView:
    """One of two models that are compared: its engine, which observes it while `active()`.

    Both may share one model object, once with an edit and once without.
    """

    engine: ReferenceEngine
    active: Callable[[], AbstractContextManager[None]]


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


def answer_logits(model: Any, rows: Sequence[TeacherForced], device: torch.device) -> list[Tensor]:
    """Raw logits (T, vocabulary) at each token of each row's answer, from one left-padded pass over prompt and answer.

    Pads carry the row's own first token, as in `Chat.encode`.
    """
    fed = [[*row.prompt, *row.answer[:-1]] for row in rows]
    width, longest = max(map(len, fed)), max(len(row.answer) for row in rows)
    ids = torch.tensor([[row_ids[0]] * (width - len(row_ids)) + row_ids for row_ids in fed], device=device)
    mask = torch.tensor([[0] * (width - len(row_ids)) + [1] * len(row_ids) for row_ids in fed], device=device)
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in accepted:
        kwargs["position_ids"] = positions(mask)
    if "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = longest
    with memory_errors():
        logits = model(**kwargs).logits
    return [logits[index, -len(row.answer) :] for index, row in enumerate(rows)]


def _drift(before: Tensor, after: Tensor, row: TeacherForced) -> Drift:
    with memory_errors():
        base = before.float().log_softmax(dim=-1)
        edited = after.to(base.device).float().log_softmax(dim=-1)
        if base.device.type == "mps":  # mps has no float64
            base, edited = base.cpu(), edited.cpu()
        if torch.isnan(edited).any():
            raise TrialError("the model's logits are not numbers")
        kl = kl_divergence(base, edited)
        tokens = torch.tensor(list(row.answer), device=base.device)[:, None]
        losses = [-logprobs.gather(1, tokens)[:, 0].double() for logprobs in (base, edited)]
    if not torch.isfinite(torch.stack([kl, *losses])).all():
        raise TrialError("the KL divergence is not finite")
    return Drift(*(values.cpu() for values in (kl, *losses)))
