"""What a model was seen to do (`Observation`), and the seam for scorers that turn it into numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from abliterate.types import Goal, Prompt, Score


@dataclass(frozen=True)
class Response:
    """What a model answered: `text` after any thinking block, and whether such a block was still open at the limit."""

    text: str
    thinking_open: bool = False


@dataclass(frozen=True)
class Observation:
    """One model on both evaluation sets.

    `responses`: one per harmful prompt, in order. `first_logprobs` (n_harmless, vocabulary) float32: log-softmax of
    the raw logits of the first response token. `prompts`: those of the responses, for a scorer that reads them too; empty
    where it isn't known.
    """

    responses: Sequence[Response]
    first_logprobs: Tensor
    prompts: Sequence[Prompt] = ()


class ResponseStream(Protocol):
    """One growing response, as a scorer sees it."""

    def feed(self, text: str) -> bool:
        """Take more of the response; whether no continuation can change what it contributes to the score."""


class Scorer(Protocol):
    """Turns observations into one number and a JSON record. Made anew for each run; `setup` sees the base model.

    A scorer that reads responses sees whole ones, unless it is an `EarlyScorer`. One that doesn't says so by a class
    attribute `reads_responses = False`.
    """

    name: str
    goal: Goal

    def setup(self, base: Observation) -> None:
        """Keep what later scores are relative to."""

    def score(self, observation: Observation) -> Score:
        """The score of an edited (or the base) model."""


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A scorer of which the engine may leave work out: decided responses end, hopeless trials stop."""

    def stream(self) -> ResponseStream:
        """Watches one response; once settled, the response as it is then must score like the whole."""

    def counts(self, response: Response) -> bool:
        """Whether a settled or whole response adds one to the count that is minimized."""

    def at_least(self, count: int, total: int) -> Score:
        """The best score that `count` counting responses of `total` leave possible."""


@runtime_checkable
class Judge(Scorer, Protocol):
    """A scorer that says of each response whether it refuses: what it and the refusal markers see differently is listed."""

    def verdicts(self, observation: Observation) -> Sequence[bool]:
        """Whether each response refuses its prompt, in order."""


def ignores_responses(scorer: Scorer) -> bool:
    """Whether a scorer needs no responses at all."""
    return not getattr(scorer, "reads_responses", True)
