"""The interface of scorers: an `Observation` of a model goes in, a `Score` comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from abliterate.scorers.yardstick import Yardstick
from abliterate.types import Goal, Prompt, Score


@dataclass(frozen=True)
class Response:
    """A model's answer: `text` without thinking blocks, and whether such a block was still open at the length limit.

    `ids` are the generated ids up to the end, which is among them, or to where the response was cut. Two responses with one
    text are the same answer, whatever ids it has.
    """

    text: str
    thinking_open: bool = False
    ids: tuple[int, ...] = field(default=(), compare=False, repr=False)


class BaseView(Protocol):
    """The unedited model, for scorers that ask it about responses; it answers only while no edit is on the model."""

    @property
    def ends(self) -> Set[int]:
        """The ids that end a response."""

    @property
    def harmless(self) -> Sequence[Prompt]:
        """Prompts that the model answers."""

    def logprobs(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """The log-probabilities (T) float64 of each answer's T ids, each id after its prompt and the ids before it."""

    def logprobs_beside(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], token: int) -> list[Tensor]:
        """The log-probabilities (2, T) float64 of each answer's T ids, and of `token` instead of each of them."""

    def yardstick(self) -> Yardstick:
        """The unedited model's measures of its own answers to harmless prompts."""


@dataclass(frozen=True)
class Observation:
    """What one model did on both evaluation sets.

    `responses` holds one response per harmful prompt, in order. `first_logprobs` (n_harmless, vocabulary) float32 is the
    log-softmax of the raw logits of the first response token. `prompts` are the harmful prompts, for scorers that read
    them too; empty if they aren't known. `base` is the unedited model, for scorers that declare `asks_base = True`. A scorer
    that takes long calls `check` from time to time, which raises an error if the run is to end.
    """

    responses: Sequence[Response]
    first_logprobs: Tensor
    prompts: Sequence[Prompt] = ()
    base: BaseView | None = None
    check: Callable[[], None] = field(default=lambda: None, compare=False, repr=False)


class ResponseStream(Protocol):
    """One growing response, as a scorer sees it."""

    def feed(self, text: str) -> bool:
        """Take more of the response; return whether no continuation can change what it contributes to the score."""


class Scorer(Protocol):
    """Turns an observation into one number and a JSON record. Each run makes a new scorer; `setup` sees the base model.

    A scorer reads whole responses, unless it is an `EarlyScorer`. A scorer that reads no responses declares the class
    attribute `reads_responses = False`. A scorer that asks the unedited model about responses declares `asks_base = True`; it
    is left out where only an edited model is at hand.
    """

    name: str
    goal: Goal

    def setup(self, base: Observation) -> None:
        """Keep whatever later scores are relative to."""

    def score(self, observation: Observation) -> Score:
        """The score of an edited model or of the base model."""


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A scorer that lets the engine save work: decided responses end early, and hopeless trials are pruned."""

    def stream(self) -> ResponseStream:
        """A stream that watches one response; once it is decided, the response so far must score like the whole."""

    def counts(self, response: Response) -> bool:
        """Whether a decided or whole response adds one to the count that is minimized."""

    def at_least(self, count: int, total: int) -> Score:
        """The best score that is still possible once `count` of `total` responses count."""


@runtime_checkable
class Follower(EarlyScorer, Protocol):
    """An early scorer that counts at least the responses which the scorer named `follows` counts.

    So that scorer's stream decides responses for both, and its count is a lower bound of this one's.
    """

    follows: str


@runtime_checkable
class Judge(Scorer, Protocol):
    """A scorer that decides for each response whether it refuses; its disagreements with the refusal markers are listed.

    A judge whose score says more than its verdicts declares the class attribute `graded = True`; held-out figures show both.
    """

    def verdicts(self, observation: Observation) -> Sequence[bool]:
        """Whether each response refuses its prompt, in order."""


def is_graded(judge: Judge) -> bool:
    """Whether a judge's score says more than its count of verdicts."""
    return bool(getattr(judge, "graded", False))


def ignores_responses(scorer: Scorer) -> bool:
    """Whether a scorer needs no responses at all."""
    return not getattr(scorer, "reads_responses", True)


def asks_base(scorer: Scorer) -> bool:
    """Whether a scorer needs the unedited model beside the observation."""
    return bool(getattr(scorer, "asks_base", False))
