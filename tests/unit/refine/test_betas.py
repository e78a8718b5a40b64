"""The weights that refinement tries, on models whose refusals appear beyond a weight of their own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from abliterate.refine.betas import ALL, FALL, FAR, FIRST, LAST, LEAST_KL, NEAR, Next, Tried, first_beta, next_descent

LIMIT = 0.03


def tried_on(threshold: float, first: float, descents: int, growth: float = 1.0) -> list[Tried]:
    """The descents on a model that refuses beyond `threshold`, which grows by `growth` with every descent gone on from."""
    tried: list[Tried] = []
    length: list[int] = []
    for _ in range(descents):
        after = next_descent(tried, first, LIMIT)
        length.append(0 if after.after is None else length[after.after] + 1)
        excess = math.log(after.beta / (threshold * growth ** length[-1]))
        tried.append(Tried(after.beta, min(1.0, max(0.0, 0.5 * excess)), 1.0))
    return tried


@pytest.mark.parametrize("threshold", [0.01, 0.9, 1.0, 3.0, 17.0, 400.0])
@pytest.mark.parametrize("first", [0.2, 1.0, 30.0])
def test_weights_near_the_largest_that_removes_refusals_are_found(threshold: float, first: float) -> None:
    far = math.ceil(abs(math.log(threshold / first, FAR)))
    tried = tried_on(threshold, first, far + 4)
    found = max(one.beta for one in tried if one.refused <= LIMIT)
    assert 1 / FAR < found / threshold < 1.1


def test_weights_follow_what_more_steps_allow() -> None:
    """Where every descent lets the weight grow by `NEAR`, the descents after the first few rise with it."""
    tried = tried_on(1.0, 0.7, 12, growth=NEAR)
    assert tried[-1].beta > 20
    assert all(one.refused < ALL for one in tried)


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ([], Next(1.0, None)),
        ([Tried(1.0, LIMIT, 0.0)], Next(FAR, 0)),
        ([Tried(1.0, 0.1, 0.0)], Next(1 / (1 + 0.1 * FALL), 0)),
        ([Tried(1.0, 1.0, 0.0)], Next(1 / (1 + FALL), None)),
        ([Tried(1.0, 0.0, 0.0), Tried(2.0, 1.0, 0.0)], Next(2 / (1 + FALL), 0)),
        ([Tried(1.0, 0.0, 0.0), Tried(2.0, ALL, 0.0)], Next(2 / (1 + ALL * FALL), 1)),
        ([Tried(4.0, 0.5, 0.0), Tried(1.6, 0.0, 0.0)], Next(1.6 * NEAR, 1)),
        ([Tried(1.0, 0.0, 0.0), Tried(2.0, 0.0, 0.0), Tried(4.0, 1.0, 0.0)], Next(4 / (1 + FALL), 1)),
    ],
)
def test_where_the_next_descent_begins(tried: list[Tried], expected: Next) -> None:
    found = next_descent(tried, 1.0, LIMIT)
    assert (found.beta, found.after) == (pytest.approx(expected.beta), expected.after)


def test_a_weight_that_leaves_too_many_refusals_kept_no_margin() -> None:
    """With few validation prompts the weaker edit may happen to leave fewer than the edit itself."""
    tried = [Tried(1.0, 0.0, 0.0), Tried(3.0, LIMIT + 0.02, LIMIT), Tried(2.6, LIMIT + 0.02, 1.0)]
    assert next_descent(tried, 1.0, LIMIT, is_last=True) == Next(math.sqrt(2.6), 0)


@pytest.mark.parametrize("refused", [0.0, 0.1, 1.0])
def test_the_last_weight_is_beyond_the_largest_that_kept_a_margin(refused: float) -> None:
    tried = [Tried(1.0, 0.0, 0.0), Tried(3.0, 0.0, LIMIT), Tried(2.0, 0.1, 0.2), Tried(9.0, 0.0, 0.4)]
    tried.append(Tried(12.0, refused, 1.0))
    last = next_descent(tried, 1.0, LIMIT, is_last=True)
    assert last.beta == pytest.approx(math.sqrt(3.0 * 9.0))
    assert last.after == 1, "it goes on from the point that kept the margin"
    without = [replace(one, weaker=0.5) for one in tried]
    assert next_descent(without, 1.0, LIMIT, is_last=True) == Next(1.0 / LAST, None)
    falling = [Tried(4.0, 0.9, 1.0), Tried(1.0, 0.9, 1.0)]
    assert next_descent(falling, 4.0, LIMIT, is_last=True).beta == next_descent(falling, 4.0, LIMIT).beta < 1.0 / LAST
    assert next_descent([], 1.0, LIMIT, is_last=True) == Next(1.0, None)


def test_while_every_weight_keeps_its_margin_they_grow_to_the_end() -> None:
    tried = [Tried(1.0, 0.0, 0.0), Tried(3.0, 0.0, LIMIT)]
    assert next_descent(tried, 1.0, LIMIT, is_last=True) == next_descent(tried, 1.0, LIMIT) == Next(9.0, 1)


def test_the_first_weight_is_a_share_of_the_teachers_gain_per_nat() -> None:
    assert first_beta(0.5, 0.1) == pytest.approx(FIRST * 5)
    assert 0 < first_beta(-0.2, 0.1) < first_beta(0.0, 0.0) < math.inf
    assert first_beta(0.5, LEAST_KL) == first_beta(0.5, 0.001), "little KL gives no margin"
