"""KL(base‖edited) of the first response token over the full vocabulary, per harmless prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.evaluation.base import Observation
from abliterate.types import Goal, Score


def kl_divergence(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base‖edited) in nats per row, (n) float64 ≥ 0, of log-probabilities (n, vocabulary) float32.

    Tokens of base probability 0 (−inf in the model's raw logits) contribute 0, not NaN.
    """
    difference = torch.where(base == -torch.inf, torch.zeros_like(base), base - edited)
    # Rounding gives about −1e-9 for equal distributions; KL is never negative.
    return (base.exp() * difference).sum(dim=-1, dtype=torch.float64).clamp_min(0)


class KL:
    """Scorer: mean KL over the harmless prompts, minimized; median and maximum beside it, the mean hides outliers."""

    name = "kl"
    goal: Goal = "minimize"
    reads_responses = False

    def __init__(self) -> None:
        self._base: Tensor | None = None

    def setup(self, base: Observation) -> None:
        """Keep the base model's log-probabilities (n_harmless, vocabulary)."""
        self._base = base.first_logprobs

    def score(self, observation: Observation) -> Score:
        """See `Scorer.score`; TrialError where the edited model's logits are not finite."""
        assert self._base is not None, "setup comes first"
        if torch.isnan(observation.first_logprobs).any():
            raise TrialError("the edited model's logits are not numbers")
        values = kl_divergence(self._base, observation.first_logprobs)
        if not torch.isfinite(values).all():
            raise TrialError("the KL divergence is not finite")
        record = {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}
        return Score(self.name, record["mean"], self.goal, record)
