"""The scorer KL(base‖edited) of the first response token over the full vocabulary, per harmless prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.evaluation.base import Observation
from abliterate.evaluation.logprobs import LikelyTokens, RoundedLogprobs, kl_divergence, smallest_form
from abliterate.types import Goal, Score


class KL:
    """Scorer: mean KL over the harmless prompts, minimized; median and maximum beside it, the mean hides outliers."""

    name = "kl"
    goal: Goal = "minimize"
    reads_responses = False

    def __init__(self) -> None:
        self._base: Tensor | LikelyTokens | RoundedLogprobs | None = None

    def setup(self, base: Observation) -> None:
        """Keep the base model's log-probabilities (n_harmless, vocabulary), in the form that takes least."""
        self._base = smallest_form(_with_float64(base.first_logprobs))

    def score(self, observation: Observation) -> Score:
        """See `Scorer.score`; TrialError where the edited model's logits are not finite."""
        assert self._base is not None, "setup comes first"
        edited = _with_float64(observation.first_logprobs)
        if torch.isnan(edited).any():
            raise TrialError("the edited model's logits are not numbers")
        values = kl_divergence(self._base, edited) if isinstance(self._base, Tensor) else self._base.kl(edited)
        if not torch.isfinite(values).all():
            raise TrialError("the KL divergence is not finite")
        record = {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}
        return Score(self.name, record["mean"], self.goal, record)


def _with_float64(logprobs: Tensor) -> Tensor:
    return logprobs.cpu() if logprobs.device.type == "mps" else logprobs  # which has no float64


__all__ = ["KL", "kl_divergence"]
