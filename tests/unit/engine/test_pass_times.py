"""What a pass costs is learned from times that are noisy."""

from __future__ import annotations

import random

import pytest

from abliterate.engine.pass_times import PASS_COST, PassTimes


@pytest.mark.parametrize("cost", [0.0, 5.0, 64.0, 500.0])
@pytest.mark.parametrize("each", [1e-6, 0.02])
def test_the_cost_of_a_pass_is_learned_from_times(cost: float, each: float) -> None:
    times, draw = PassTimes(), random.Random(0)
    assert times.pass_cost == PASS_COST
    for _ in range(600):
        tokens = draw.choice([8, 16, 24, 40, 80])
        noise = draw.choice([1.0, 1.0, 1.0, 50.0]) if draw.random() < 0.1 else draw.uniform(0.9, 1.1)
        times.note(tokens, each * (cost + tokens) * noise)
    assert times.pass_cost == pytest.approx(cost, rel=0.25, abs=5)


def test_times_of_passes_of_one_size_leave_the_guess() -> None:
    times = PassTimes()
    for _ in range(100):
        times.note(40, 0.5)
    assert times.pass_cost == pytest.approx(PASS_COST)


def test_a_known_cost_stays() -> None:
    times = PassTimes(20.0)
    times.note(40, 0.5)
    times.note(80, 5.0)
    assert times.pass_cost == 20


def test_the_speed_of_passes() -> None:
    times = PassTimes()
    assert times.speed(40) == 0
    for tokens in [10, 20, 40, 80] * 200:
        times.note(tokens, 0.01 * (30 + tokens))
    assert times.speed(40) == pytest.approx(40 / 0.7, rel=0.05)


@pytest.mark.parametrize("slow", [20.0, 1000.0])
@pytest.mark.parametrize("first", [10, 100])
def test_slow_first_passes_say_little(slow: float, first: int) -> None:
    times, draw = PassTimes(), random.Random(2)
    for number in range(40):
        tokens = first if number < 2 else draw.choice([10, 20, 40, 80])
        times.note(tokens, 0.01 * (100 + tokens) * (slow if number < 2 else 1.0))
        assert 20 < times.pass_cost < 400
    assert times.speed(40) == pytest.approx(40 / 1.4, rel=0.2)
