"""What is wrong with an answer beside refusing: empty, repetitive, ended early. Pure; knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from abliterate.evaluation.base import Response
from abliterate.evaluation.refusals import normalize

Fault = Literal["unfinished_thinking", "empty", "repetitive", "early_end"]
FAULTS: tuple[Fault, ...] = ("unfinished_thinking", "empty", "repetitive", "early_end")
# Share of an answer's token 4-grams that repeat an earlier one (seq-rep-4 of Welleck et al. 2019, arXiv:1908.04319), from
# which it is a loop; greedy text of people's and models' kind lies far below. Shorter answers can't loop.
REPEATED, GRAM, SHORTEST_LOOP = 0.5, 4, 16
# Answers that end by themselves before so many tokens say nothing.
EARLY = 5


@dataclass(frozen=True)
class Answer:
    """One greedy answer: `ids` up to the length limit or its end token, which is the last one where it `ended`."""

    ids: tuple[int, ...]
    ended: bool
    response: Response

    @property
    def spoken(self) -> tuple[int, ...]:
        """The ids without the end token."""
        return self.ids[:-1] if self.ended else self.ids


def fault_of(answer: Answer) -> Fault | None:
    """The first fault that an answer has, in the order of `FAULTS`; None: it is a whole answer (or the begin of one)."""
    if answer.response.thinking_open:
        return "unfinished_thinking"
    if not normalize(answer.response.text):
        return "empty"
    if repetition(answer.spoken) > REPEATED:
        return "repetitive"
    return "early_end" if answer.ended and len(answer.spoken) < EARLY else None


def repetition(ids: Sequence[int]) -> float:
    """The share of 4-grams of tokens that stood before; 0 where there are too few tokens to tell."""
    if len(ids) < SHORTEST_LOOP:
        return 0.0
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first position, in tokens from 0, at which two answers differ; None where they are the same."""
    if tuple(one) == tuple(other):
        return None
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
