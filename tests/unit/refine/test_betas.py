"""The weights that refinement tries, on models whose refusals appear beyond a weight of their own."""

from __future__ import annotations

import itertools
import math

import pytest

from abliterate.refine.betas import FACTOR, FIRST, NEAR, Tried, first_beta, next_beta


def tried_on(threshold: float, first: float, most: int = 20, limit: float = 0.03) -> list[Tried]:
    """All weights that are tried on a model that refuses half of the prompts beyond `threshold`."""
    tried: list[Tried] = []
    while (beta := next_beta(tried, first, limit, most)) is not None:
        tried.append(Tried(beta, 0.5 if beta > threshold else 0.02))
    return tried


@pytest.mark.parametrize("threshold", [0.01, 0.9, 1.0, 3.0, 17.0, 400.0])
@pytest.mark.parametrize("first", [0.2, 1.0, 30.0])
def test_the_largest_weight_that_removes_refusals_is_found(threshold: float, first: float) -> None:
    tried = tried_on(threshold, first)
    found = max(one.beta for one in tried if one.beta <= threshold)
    assert threshold / found < NEAR
    assert len(tried) <= 3 + abs(math.log(threshold / first, FACTOR)) + math.log2(math.log(FACTOR) / math.log(NEAR)) + 1
    assert len({one.beta for one in tried}) == len(tried)


def test_weights_grow_until_refusals_come_back_and_then_come_between() -> None:
    betas = [one.beta for one in tried_on(5.0, 1.0)]
    assert betas[:3] == [1.0, 4.0, 16.0]
    assert betas[3] == pytest.approx(8.0)
    assert betas[4] == pytest.approx(math.sqrt(32))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_weights_than_allowed(most: int) -> None:
    assert len(tried_on(1e9, 1.0, most)) == most


def test_a_share_at_the_limit_is_enough() -> None:
    assert next_beta([Tried(2.0, 0.03)], 2.0, 0.03, 5) == 2.0 * FACTOR
    assert next_beta([Tried(2.0, 0.031)], 2.0, 0.03, 5) == 2.0 / FACTOR


def test_shares_that_contradict_each_other_end_the_search() -> None:
    """A small weight may refuse more than a larger one by chance."""
    tried = [Tried(1.0, 0.5), Tried(0.25, 0.0), Tried(0.5, 0.0), Tried(0.7, 0.1)]
    assert next_beta(tried, 1.0, 0.03, 9) is None
    for order in itertools.permutations(tried):
        assert next_beta(order, 1.0, 0.03, 9) is None


def test_the_first_weight_is_a_share_of_the_teachers_gain_per_nat() -> None:
    assert first_beta(0.5, 0.1) == pytest.approx(FIRST * 5)
    assert 0 < first_beta(-0.2, 0.1) < first_beta(0.0, 0.0) < math.inf
