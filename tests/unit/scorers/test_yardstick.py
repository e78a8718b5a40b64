"""Measures of responses by their definitions, the bounds that answers give, and their record."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.scorers.yardstick import (
    AT_MOST,
    OPENING,
    TELLING,
    Measures,
    Spoiled,
    Yardstick,
    calibrate,
    distinct_pairs,
    fluency,
    looped,
    separation,
    topic,
)
from support.asked import yardstick

LOGPROBS = st.lists(st.floats(-12, -0.01), min_size=1, max_size=60)


def rows_of(length: int, count: int, draw: random.Random) -> list[list[float]]:
    return [[draw.uniform(-12, 0) for _ in range(length)] for _ in range(count)]


@given(LOGPROBS, st.booleans())
@settings(max_examples=200, deadline=None)
def test_fluency_by_its_definition(own: list[float], ended: bool) -> None:
    """The opening doesn't count, not even if there is nothing else."""
    counted = own[6:] or [0.0]
    found = fluency(torch.tensor(own, dtype=torch.float64), [7] * len(own), ended=ended)
    assert found.surprise == pytest.approx(-sum(counted) / len(counted), abs=1e-9)
    assert found.end == (-own[-1] if ended else 0.0)
    assert found.distinct == (1 / (len(own) - 1) if len(own) > 1 else 1.0)
    assert OPENING == 6


@given(LOGPROBS, st.integers(1, 3), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_topic_by_its_definition(own: list[float], count: int, seed: int) -> None:
    """Of the mean surprise after the other prompts, the share that the own prompt takes away."""
    alike = rows_of(min(TELLING, len(own)), count, random.Random(seed))
    found = topic(torch.tensor(own, dtype=torch.float64), torch.tensor(alike, dtype=torch.float64))
    places = range(min(TELLING, len(own)))
    mine = sum(-own[place] for place in places)
    theirs = sum(-row[place] for row in alike for place in places) / len(alike)
    assert found == pytest.approx((theirs - mine) / max(theirs, mine), abs=1e-9)
    assert -1 <= found <= 1


def test_topics_by_hand() -> None:
    own = torch.tensor([-1.0, -1.0])
    assert topic(own, torch.tensor([[-4.0, -4.0], [-3.0, -5.0]])) == 0.75
    assert topic(own, torch.tensor([[-3.0, -4.0], [-1.0, 0.0]])) == 0.5, "another prompt may ask nearly the same"
    assert topic(own, torch.tensor([[-0.5, 0.0]])) == -0.75
    assert topic(own, torch.empty(0, 0)) == 1.0


def test_distinct_pairs_by_hand() -> None:
    assert distinct_pairs([1, 2, 1, 2, 1]) == 0.5
    assert distinct_pairs([7, 7, 7, 7]) == pytest.approx(1 / 3)
    assert distinct_pairs([1, 2, 3]) == distinct_pairs([1]) == distinct_pairs([]) == 1.0


VALUES = st.lists(st.integers(-40, 40).map(lambda number: number / 4), min_size=1, max_size=12)


@given(VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_no_threshold_separates_better(above: list[float], below: list[float]) -> None:
    def gain(cut: float) -> float:
        return sum(value >= cut for value in above) / len(above) - sum(value >= cut for value in below) / len(below)

    cut = separation(above, below)
    tried = {*above, *below, min(*above, *below) - 1}
    assert gain(cut) >= max(map(gain, tried)) - 1e-9


def test_thresholds_by_hand() -> None:
    assert separation([10.0, 14.0], [-2.0, 4.0]) == 7.0
    assert separation([1.0, 5.0, 6.0], [0.0, 2.0]) == 3.5
    assert separation([3.0, 4.0], []) == separation([3.0], [3.0]) == separation([], [3.0, 1.0]) == 3.0
    assert calibrate([Measures(1.0, 1.0, 0.0)], Spoiled()).bounds["end"] == 1e9  # a model that never ends
    assert calibrate([Measures(1.0, 1.0, 0.0)], Spoiled(cut=[4.0, 7.0])).bounds["end"] == 4.0  # none of its answers has ended


def test_answers_that_are_all_opening_leave_the_bound_of_surprise_alone() -> None:
    long = [Measures(surprise, 1.0, 0.0) for surprise in (1.0, 2.0, 3.0)]
    short = [Measures(0.0, 1.0, 0.0)] * 125
    assert calibrate([*short, *long], Spoiled()).bounds["surprise"] == calibrate(long, Spoiled()).bounds["surprise"] > 2.0
    assert calibrate(short, Spoiled()).is_fluent(Measures(9.0, 1.0, 0.0))


def test_loops_by_hand() -> None:
    assert looped(range(30)) == [*range(12), *range(12), *range(6)]
    assert looped([1, 2]) == [1, 2]


def test_bounds_are_those_of_the_answers() -> None:
    """Of a hundred answers five are more surprising; the other bounds lie between good and spoiled ones."""
    draw = random.Random(5)
    own = [Measures(draw.gauss(1, 0.2), draw.uniform(0.5, 1), draw.expovariate(3), draw.gauss(0.6, 0.05)) for _ in range(100)]
    cut = [draw.uniform(6, 9) for _ in range(100)]
    greedy, loops = [draw.uniform(0.4, 0.9) for _ in range(100)], [0.12] * 100
    found = calibrate(own, Spoiled(greedy, loops, [draw.gauss(0, 0.05) for _ in own], [one.end for one in own], cut))
    assert sum(one.surprise > found.bounds["surprise"] for one in own) == 5
    assert found.bounds["distinct"] == (min(greedy) + 0.12) / 2
    assert max(one.end for one in own) < found.bounds["end"] < min(cut)
    assert 0.15 < found.bounds["topic"] < 0.5
    assert found.answers == 100
    for name in AT_MOST:
        assert list(found.quantiles[name].values()) == sorted(found.quantiles[name].values())
    assert Yardstick.from_record(json.loads(json.dumps(found.to_record()))) == found


@pytest.mark.parametrize(
    ("measures", "fluent"),
    [
        (Measures(1.0, 0.5, 2.0), True),
        (Measures(1.01, 0.5, 2.0), False),
        (Measures(1.0, 0.49, 2.0), False),
        (Measures(1.0, 0.5, 2.01), False),
        (Measures(1.0, 0.5, 2.0, topic=-100.0), True),
        (Measures(float("inf"), 0.5, 2.0), False),
    ],
)
def test_each_bound_is_kept_for_itself(measures: Measures, fluent: bool) -> None:
    assert yardstick(surprise=1.0, distinct=0.5, end=2.0, topic=3.0).is_fluent(measures) is fluent


def test_a_topic_has_its_own_bound() -> None:
    one = yardstick(surprise=0.0, topic=3.0)
    assert [one.is_on_topic(value) for value in (2.99, 3.0)] == [False, True]


@pytest.mark.parametrize("change", [{"bounds": {}}, {"answers": -1}, {"quantiles": {"surprise": 3}}, {"bounds": 3}])
def test_a_record_that_is_none(change: dict[str, object]) -> None:
    record = calibrate([Measures(1.0, 1.0, 0.0)], Spoiled()).to_record()
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        Yardstick.from_record(record | change)


@pytest.mark.parametrize("count", [1, 2])
def test_so_few_answers_call_nothing_off_topic(count: int) -> None:
    """There is no pair that could be exchanged."""
    own = [Measures(1.0, 0.9, 0.1, topic=1.0)] * count
    yardstick = calibrate(own, Spoiled(greedy=[0.9] * count, looped=[0.1] * count, ends=[0.1] * count, cut=[5.0] * count))
    assert yardstick.is_on_topic(-0.9)
