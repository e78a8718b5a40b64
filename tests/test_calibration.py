"""Batch-size search on fake devices, response prefixes, and the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.calibration import (
    WarmUp,
    common_start,
    detect_prefix,
    double_batch_size,
    even_size,
    timed_probe,
    tune_batch_size,
)
from abliterate.settings import ResponseSettings

Speed = Callable[[int], float]
SPEEDS: dict[str, Speed] = {
    "linear": lambda size: float(size),
    "flat": lambda size: 100.0,
    "saturating": lambda size: size / (size + 8),
    "slow to saturate": lambda size: size / (size + 200),
    "plateau at 20": lambda size: float(min(size, 20)),
    "peak at 16": lambda size: size if size <= 16 else 256 / size,
    "falling": lambda size: 1 / size,
}


class FakeDevice:
    """Runs out of memory beyond `capacity` items; otherwise as fast as `speed` says."""

    def __init__(self, capacity: int, speed: Speed) -> None:
        self.capacity, self.speed = capacity, speed
        self.asked: list[int] = []

    def probe(self, size: int) -> float | None:
        self.asked.append(size)
        return self.speed(size) if size <= self.capacity else None


@pytest.mark.parametrize("name", SPEEDS)
def test_search_takes_few_probes_and_never_returns_what_failed(name: str) -> None:
    for capacity in range(1, 140):
        device = FakeDevice(capacity, SPEEDS[name])
        tuned = tune_batch_size(device.probe, 128)
        assert len(device.asked) <= 8
        assert len(set(device.asked)) == len(device.asked)
        assert 1 <= tuned.size <= min(capacity, 128)
        assert tuned.probes[tuned.size] is not None
        assert sorted(tuned.probes) == sorted(device.asked)


@given(st.integers(1, 1000), st.integers(0, 1100), st.sampled_from(sorted(SPEEDS)))
@settings(max_examples=300, deadline=None)
def test_search_for_any_maximum(maximum: int, capacity: int, name: str) -> None:
    device = FakeDevice(capacity, SPEEDS[name])
    tuned = tune_batch_size(device.probe, maximum)
    assert len(device.asked) <= 8
    assert min(device.asked) >= 1
    assert max(device.asked) <= maximum
    assert capacity == 0 or tuned.size <= capacity or tuned.probes[tuned.size] is None


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 20, 50, 100, 127, 128, 500])
def test_search_finds_almost_all_that_fits_where_more_is_faster(capacity: int) -> None:
    tuned = tune_batch_size(FakeDevice(capacity, SPEEDS["linear"]).probe, 128)
    assert tuned.size >= min(capacity, 128) / 1.36 - 1


@pytest.mark.parametrize("name", SPEEDS)
def test_what_is_chosen_is_as_fast_as_all_that_was_measured_and_the_smallest(name: str) -> None:
    tuned = tune_batch_size(FakeDevice(100, SPEEDS[name]).probe, 128)
    best = max(speed for speed in tuned.probes.values() if speed is not None)
    as_fast = [size for size, speed in tuned.probes.items() if speed is not None and speed >= 0.95 * best]
    assert tuned.size == min(as_fast)


def test_search_comes_down_where_size_gains_nothing() -> None:
    assert tune_batch_size(FakeDevice(500, SPEEDS["flat"]).probe, 128).size <= 4
    assert tune_batch_size(FakeDevice(500, SPEEDS["plateau at 20"]).probe, 128).size <= 40


@pytest.mark.parametrize("tune", [tune_batch_size, double_batch_size])
def test_nothing_fits(tune: Callable[..., object]) -> None:
    assert tune(FakeDevice(0, SPEEDS["flat"]).probe, 64).size == 1  # type: ignore[attr-defined]


def test_doubling_stops_at_the_first_failure() -> None:
    device = FakeDevice(20, SPEEDS["linear"])
    assert double_batch_size(device.probe, 128).size == 16
    assert device.asked == [1, 2, 4, 8, 16, 32]
    assert double_batch_size(FakeDevice(500, SPEEDS["peak at 16"]).probe, 100).size == 16


@pytest.mark.parametrize(
    ("size", "items", "even"), [(64, 100, 50), (128, 100, 100), (100, 100, 100), (33, 100, 25), (1, 7, 1), (4, 9, 3), (0, 5, 1)]
)
def test_even_size_by_hand(size: int, items: int, even: int) -> None:
    assert even_size(size, items) == even


@given(st.integers(1, 200), st.integers(1, 300))
def test_even_size_needs_no_more_batches(size: int, items: int) -> None:
    even = even_size(size, items)
    assert 1 <= even <= size
    assert -(-items // even) == -(-items // size)


def test_timed_probe_measures_and_survives_a_full_device() -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("full")

    speed = timed_probe(lambda: None, 5, torch.device("cpu"))
    assert speed is not None
    assert speed > 0
    assert timed_probe(too_much, 5, torch.device("cpu")) is None


def test_other_errors_of_a_probe_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        timed_probe(lambda: 1 / 0, 1, torch.device("cpu"))


BLOCKS = ResponseSettings().thinking_blocks


class Responder:
    """Answers by prefix, and keeps the prefixes that it was asked with."""

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, prefix: str) -> Sequence[str]:
        self.asked.append(prefix)
        return self.answers[prefix]


def test_a_common_start_is_the_prefix() -> None:
    responder = Responder({"": ["Answer: yes", "Answer: no", "Answer: perhaps"]})
    assert detect_prefix(responder, BLOCKS) == ("Answer:", [])
    assert responder.asked == [""]


def test_no_common_start_no_prefix() -> None:
    assert detect_prefix(Responder({"": ["Yes", "No"]}), BLOCKS) == ("", [])


@pytest.mark.parametrize("answers", [["Same", "Same"], ["Yes", "Yes, sure"], ["", "Yes"], ["Yes ", "Yes, sure"]])
def test_a_whole_response_is_no_prefix(answers: list[str]) -> None:
    assert detect_prefix(Responder({"": answers}), BLOCKS) == ("", [])


@pytest.mark.parametrize(("opening", "closed"), BLOCKS)
def test_thinking_is_closed_and_what_follows_is_looked_at_again(opening: str, closed: str) -> None:
    responder = Responder({"": [f"{opening}\nHm, a", f"{opening}\nHm, b"], closed: ["\n\nSure", "\n\nNo"]})
    prefix, notes = detect_prefix(responder, BLOCKS)
    assert prefix == closed + "\n\n"
    assert responder.asked == ["", closed]
    assert opening in notes[0]


def test_second_look_may_find_nothing() -> None:
    closed = "<think></think>"
    responder = Responder({"": ["<think>a", "<think>b"], closed: ["Sure", "No"]})
    assert detect_prefix(responder, BLOCKS)[0] == closed


def test_blocks_come_from_the_settings() -> None:
    responder = Responder({"": ["[a] x", "[a] y"], "[a][/a]": ["1", "2"]})
    assert detect_prefix(responder, [("[a]", "[a][/a]")])[0] == "[a][/a]"
    assert detect_prefix(Responder({"": ["[a] x", "[a] y"]}), [])[0] == "[a]"


def test_common_start_ends_before_a_space() -> None:
    assert common_start(["I am", "I was"]) == "I"
    assert common_start(["a\n b", "a\n c"]) == "a\n"
    assert common_start([]) == ""


def test_warm_up_runs_once() -> None:
    ran: list[int] = []
    warm_up = WarmUp(lambda: ran.append(1))
    assert warm_up.runs == 0
    for _ in range(3):
        warm_up()
    assert (len(ran), warm_up.runs) == (1, 1)


def test_warm_up_each_time_where_switched_off() -> None:
    ran: list[int] = []
    warm_up = WarmUp(lambda: ran.append(1), once=False)
    for _ in range(3):
        warm_up()
    assert (len(ran), warm_up.runs) == (3, 3)


def test_a_warm_up_that_failed_is_not_done() -> None:
    attempts: list[int] = []

    def work() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError

    warm_up = WarmUp(work)
    with pytest.raises(RuntimeError):
        warm_up()
    warm_up()
    warm_up()
    assert len(attempts) == 2
