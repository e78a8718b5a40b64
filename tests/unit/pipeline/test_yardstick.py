"""Which prompts the yardstick is made of, and what it measures of their answers."""

from __future__ import annotations

import itertools
import math

import torch

from abliterate.evaluation.likelihood import OwnAnswers
from abliterate.pipeline.yardstick import ANSWERS, LOOKED, measured, usual_end, yardstick_of, yardstick_prompts
from abliterate.types import Prompt
from support.asked import END, MadeBase

GREEDY = [(1, 2, 3), (1, 1, 1, 1), (1, 2), (3,)]
PROMPTS = tuple(Prompt(f"What is number {index}?") for index in range(200))


def test_the_prompts_are_spaced_and_so_are_those_that_are_looked_at() -> None:
    found = yardstick_prompts(PROMPTS)
    places = [PROMPTS.index(prompt) for prompt in found]
    assert sorted(places) == [index * 200 // ANSWERS for index in range(ANSWERS)]
    steps = {later - before for before, later in itertools.pairwise(places[:LOOKED])}
    assert steps <= {3, 4, 5}
    assert set(yardstick_prompts(PROMPTS[:60])) == set(PROMPTS[:60])


def test_only_answers_with_a_greedy_one_have_a_topic() -> None:
    """An end token in the middle of an answer is as likely here as at its end."""

    def logprob(prompt: Prompt, token: int) -> float:
        return -3.0 if token == END else -1.0

    base = MadeBase(logprob, harmless=PROMPTS[:5])
    answers = [(*range(1, 9), END)] * 5
    own, spoiled = measured(base, OwnAnswers(answers, GREEDY))
    assert [math.isnan(one.topic) for one in own] == [False] * 4 + [True]
    assert (len(spoiled.greedy), len(spoiled.looped), len(spoiled.exchanged)) == (4, 4, 4)
    assert spoiled.greedy == [1.0, 1 / 3, 1.0, 1.0]
    assert (spoiled.ends, spoiled.cut) == ([3.0] * 5, [3.0] * 5)
    assert usual_end(base, answers) == END
    found = yardstick_of(base, OwnAnswers(answers, GREEDY))
    assert found.answers == 5
    assert all(math.isfinite(value) for column in found.quantiles.values() for value in column.values())
    assert torch.tensor(list(found.bounds.values())).isfinite().all()
