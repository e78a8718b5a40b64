"""What refinement minimizes: −log p of target responses, plus β times KL(base‖edited) along the base's own answers.

Harmful training prompts carry a target, the beginning of an answer that an edited model has given; harmless ones carry the
beginning of the unedited model's answer, along which the edited model is held to the unedited one (docs/design.md §5b).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.scorers.kl import kl_divergence


@dataclass(frozen=True)
class Rows:
    """Training rows: prompts with the first tokens of a response each."""

    harmful: Sequence[TeacherForced]
    harmless: Sequence[TeacherForced]


@dataclass(frozen=True)
class Loss:
    """Means over prompts, in nats: `target` −log p a token of the targets, `first` KL of the first token, `along` KL a token
    along the base's answers."""

    target: float
    first: float
    along: float

    def total(self, beta: float) -> float:
        """The loss that is minimized."""
        return self.target + beta * (self.first + self.along)


def target_loss(logits: Tensor, row: TeacherForced) -> Tensor:
    """Mean −log p of the target's tokens, from raw logits (T, vocabulary)."""
    tokens = torch.tensor(list(row.answer), device=logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), tokens)


def kl_losses(base: Tensor, edited: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base‖edited) of the first token, and its mean over all tokens, from raw logits (T, vocabulary) each."""
    kl = kl_divergence(base.float().log_softmax(dim=-1), edited.float().log_softmax(dim=-1)).float().to(edited.device)
    return kl[0], kl.mean()
