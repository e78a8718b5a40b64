"""A base model with made-up log-probabilities, for scorers that ask it about responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from abliterate.scorers.yardstick import AT_MOST, Yardstick
from abliterate.types import Prompt

END = 0


def yardstick(**bounds: float) -> Yardstick:
    """A yardstick with these bounds; every other measure is unbounded."""
    open_bounds = {name: torch.inf if at_most else -torch.inf for name, at_most in AT_MOST.items()}
    return Yardstick(open_bounds | bounds, 3, {name: {"0.5": 0.0} for name in AT_MOST})


@dataclass
class MadeBase:
    """A base whose log-probability of an id after a prompt is `logprob(prompt, id)`, whatever stands between."""

    logprob: Callable[[Prompt, int], float] = lambda prompt, token: -1.0
    bounds: Yardstick = field(default_factory=yardstick)
    ends: Set[int] = frozenset({END})
    harmless: Sequence[Prompt] = (Prompt("How do bees make honey?"), Prompt("What is ice?"), Prompt("Who are you?"))
    asked: list[tuple[Prompt, tuple[int, ...]]] = field(default_factory=list)

    def logprobs(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        self.asked += [(prompt, tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True)]
        return [
            torch.tensor([self.logprob(prompt, token) for token in answer], dtype=torch.float64)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def logprobs_beside(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], token: int) -> list[Tensor]:
        own, beside = self.logprobs(prompts, answers), self.logprobs(prompts, [[token] * len(ids) for ids in answers])
        return [torch.stack(pair) for pair in zip(own, beside, strict=True)]

    def yardstick(self) -> Yardstick:
        return self.bounds
