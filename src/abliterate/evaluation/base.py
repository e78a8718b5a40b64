"""What a model was seen to do (`Observation`), and the seam for scorers that turn it into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from abliterate.types import Goal, Score


@dataclass(frozen=True)
class Response:
    """What a model answered: `text` after any thinking block, and whether such a block was still open at the limit."""

    text: str
    thinking_open: bool = False


@dataclass(frozen=True)
class Observation:
    """One model on both evaluation sets.

    `responses`: one per harmful prompt, in order. `first_logprobs` (n_harmless, vocabulary) float32: log-softmax of
    the raw logits of the first response token.
    """

    responses: Sequence[Response]
    first_logprobs: Tensor


class Scorer(Protocol):
    """Turns observations into one number and a JSON record. Made anew for each run; `setup` sees the base model."""

    name: str
    goal: Goal

    def setup(self, base: Observation) -> None:
        """Keep what later scores are relative to."""

    def score(self, observation: Observation) -> Score:
        """The score of an edited (or the base) model."""
