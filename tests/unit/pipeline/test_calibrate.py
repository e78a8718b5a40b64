"""Batch-size search on fake devices, response prefixes, and the warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.model.thinking import Markup
from abliterate.model.threads import Generate
from abliterate.pipeline import calibrate
from abliterate.pipeline.batch_size import BatchTuning, double_batch_size, even_sizes, tune_batch_size
from abliterate.pipeline.calibrate import WarmUp, common_start, detect_prefix
from abliterate.prompts.sets import PromptSets
from abliterate.settings.schema import ResponseSettings
from support.engine import HARMFUL, HARMLESS, make_engine
from support.models import make_model

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


def tune(device: FakeDevice, start: int = 128, items: int = 128, maximum: int = 128) -> BatchTuning:
    """The search among equally full batches."""
    return tune_batch_size(device.probe, even_sizes(items, maximum), start)


@pytest.mark.parametrize("name", SPEEDS)
@pytest.mark.parametrize("start", [1, 3, 30, 128])
def test_search_takes_few_probes_and_never_returns_what_failed(name: str, start: int) -> None:
    for capacity in range(1, 140):
        device = FakeDevice(capacity, SPEEDS[name])
        tuned = tune(device, start)
        assert len(set(device.asked)) <= 8
        assert len(device.asked) - len(set(device.asked)) in (0, 2, 4), "two sizes that decide are measured again"
        assert 1 <= tuned.size <= min(capacity, 128)
        assert tuned.probes[tuned.size] is not None
        assert sorted(tuned.probes) == sorted(set(device.asked))


@given(st.integers(1, 2000), st.integers(1, 1000), st.integers(0, 1100), st.integers(0, 1200), st.sampled_from(sorted(SPEEDS)))
@settings(max_examples=300, deadline=None)
def test_search_for_any_work(items: int, maximum: int, capacity: int, start: int, name: str) -> None:
    device = FakeDevice(capacity, SPEEDS[name])
    tuned = tune(device, start, items, maximum)
    assert len(set(device.asked)) <= 8
    assert min(device.asked) >= 1
    assert max(device.asked) <= min(items, maximum)
    assert capacity == 0 or tuned.size <= capacity


@pytest.mark.parametrize("capacity", [1, 2, 3, 7, 20, 50, 100, 127, 128, 500])
@pytest.mark.parametrize("start", [1, 10, 128])
def test_search_finds_almost_all_that_fits_where_more_is_faster(capacity: int, start: int) -> None:
    """What is lost are steps that even batches don't have, and the last bisections."""
    tuned = tune(FakeDevice(capacity, SPEEDS["linear"]), start, items=1000)
    assert tuned.size >= min(capacity, 128) / 1.45 - 1


@pytest.mark.parametrize("estimate", [0.5, 1.0])
def test_a_good_estimate_needs_few_probes(estimate: float) -> None:
    """An estimate at or below what fits: at most three probes upward, and the look whether less is as fast."""
    for capacity in (5, 17, 40, 100):
        device = FakeDevice(capacity, SPEEDS["linear"])
        tuned = tune(device, int(estimate * capacity), items=1000)
        failed = [size for size in device.asked if size > capacity]
        assert len(failed) <= 3
        assert device.asked[0] <= estimate * capacity
        assert tuned.size >= device.asked[0]


def test_growing_stops_where_it_gains_nothing() -> None:
    device = FakeDevice(1000, SPEEDS["flat"])
    tune(device, start=10)
    assert len({size for size in device.asked if size > 10}) == 1


@pytest.mark.parametrize("name", SPEEDS)
def test_the_largest_is_chosen_unless_a_smaller_size_is_clearly_faster(name: str) -> None:
    tuned = tune(FakeDevice(100, SPEEDS[name]))
    speeds = {size: speed for size, speed in tuned.probes.items() if speed is not None}
    as_fast = [size for size, speed in speeds.items() if speed >= 0.95 * max(speeds.values())]
    assert tuned.size == max(as_fast)


def test_search_comes_down_where_size_costs_speed() -> None:
    assert tune(FakeDevice(500, SPEEDS["flat"])).size == 128
    assert tune(FakeDevice(500, SPEEDS["falling"])).size == 1
    assert 8 <= tune(FakeDevice(500, SPEEDS["peak at 16"])).size <= 32


@pytest.mark.parametrize("start", [1, 4, 16, 40, 128])
@pytest.mark.parametrize("slow", range(12))
def test_one_slow_probe_decides_nothing(slow: int, start: int) -> None:
    """Another process takes a machine's time during one probe, whichever that is."""
    device, calls = FakeDevice(128, SPEEDS["slow to saturate"]), list[int]()

    def probe(size: int) -> float | None:
        calls.append(size)
        speed = device.probe(size)
        return speed / 4 if speed is not None and len(calls) == slow + 1 else speed

    assert tune_batch_size(probe, even_sizes(128, 128), start).size >= 100


def test_a_size_that_does_not_fit_any_more_is_not_chosen() -> None:
    asked = list[int]()

    def probe(size: int) -> float | None:
        asked.append(size)
        return None if asked.count(128) > 1 and size == 128 else 1.0 if size == 128 else 0.98

    tuned = tune_batch_size(probe, even_sizes(128, 128), 128)
    assert asked.count(128) == 2
    assert tuned.probes[128] is None
    assert tuned.size < 128


def test_from_a_plateau_smaller_sizes_are_not_tried() -> None:
    device = FakeDevice(500, SPEEDS["flat"])
    assert tune_batch_size(device.probe, even_sizes(100, 100), 15, shrink=False).size == 15
    assert device.asked == [15, 25]


@pytest.mark.parametrize(("capacity", "found"), [(200, 100), (40, 34), (1, 1), (0, 1)])
def test_a_look_whether_it_fits_needs_no_speeds(capacity: int, found: int) -> None:
    device = FakeDevice(capacity, SPEEDS["falling"])
    tuned = tune_batch_size(device.probe, even_sizes(100, 100), 100, grow=False, shrink=False)
    assert tuned.size == found
    assert len(set(device.asked)) <= 8
    assert capacity < 100 or device.asked == [100]


def test_doubling_stops_at_the_first_that_does_not_fit() -> None:
    device = FakeDevice(20, SPEEDS["linear"])
    assert double_batch_size(device.probe, 128).size == 16
    assert device.asked == [1, 2, 4, 8, 16, 32]
    assert double_batch_size(FakeDevice(500, SPEEDS["peak at 16"]).probe, 100).size == 16
    assert double_batch_size(FakeDevice(0, SPEEDS["flat"]).probe, 8).size == 1


def test_even_sizes_by_hand() -> None:
    assert even_sizes(100, 128) == [1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 34, 50, 100]
    assert even_sizes(100, 64)[-1] == 50
    assert even_sizes(12, 5) == [1, 2, 3, 4]
    assert even_sizes(1, 128) == [1]
    assert even_sizes(9, 1) == [1]


@given(st.integers(1, 3000), st.integers(1, 400))
def test_even_sizes_fill_their_batches(items: int, maximum: int) -> None:
    """Each is the smallest that needs no more batches, and they begin with 1 and are no more than a factor apart."""
    sizes = even_sizes(items, maximum)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] <= maximum
    for size in sizes:
        batches = -(-items // size)
        assert size == -(-items // batches)
    assert -(-items // sizes[-1]) == -(-items // min(items, maximum)), "no batch more than the largest allowed needs"


BLOCKS = ResponseSettings().thinking_blocks
MARKUP = Markup(BLOCKS, ResponseSettings().answer_tags)


class Responder:
    """Answers by prefix, and keeps the prefixes that it was asked with."""

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, prefix: str) -> Sequence[str]:
        self.asked.append(prefix)
        return self.answers[prefix]


def test_a_common_start_is_the_prefix() -> None:
    responder = Responder({"": ["Answer: yes", "Answer: no", "Answer: perhaps"]})
    assert detect_prefix(responder, MARKUP) == ("Answer:", [])
    assert responder.asked == [""]


def test_no_common_start_no_prefix() -> None:
    assert detect_prefix(Responder({"": ["Yes", "No"]}), MARKUP) == ("", [])


@pytest.mark.parametrize("answers", [["Same", "Same"], ["Yes", "Yes, sure"], ["", "Yes"], ["Yes ", "Yes, sure"]])
def test_a_whole_response_is_no_prefix(answers: list[str]) -> None:
    assert detect_prefix(Responder({"": answers}), MARKUP) == ("", [])


@pytest.mark.parametrize(("opening", "closed"), BLOCKS)
def test_thinking_is_closed_and_what_follows_is_looked_at_again(opening: str, closed: str) -> None:
    responder = Responder({"": [f"{opening}\nHm, a", f"{opening}\nHm, b"], closed: ["\n\nSure", "\n\nNo"]})
    prefix, notes = detect_prefix(responder, MARKUP)
    assert prefix == closed + "\n\n"
    assert responder.asked == ["", closed]
    assert opening in notes[0]


def test_second_look_may_find_nothing() -> None:
    closed = "<think></think>"
    responder = Responder({"": ["<think>a", "<think>b"], closed: ["Sure", "No"]})
    assert detect_prefix(responder, MARKUP)[0] == closed


def test_blocks_come_from_the_settings() -> None:
    responder = Responder({"": ["[a] x", "[a] y"], "[a][/a]": ["1", "2"]})
    assert detect_prefix(responder, Markup([("[a]", "[a][/a]")]))[0] == "[a][/a]"
    assert detect_prefix(Responder({"": ["[a] x", "[a] y"]}), Markup([]))[0] == "[a]"


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


def test_threads_are_compared_by_passes_of_the_shortest_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_model("llama"), 3)
    asked: list[float] = []

    def compare(generate: Generate, prefills: float, note: Callable[[str], None]) -> None:
        tokens = list[int]()
        generate(2, 3, lambda: tokens.append(1))
        asked.extend((prefills, len(tokens)))

    monkeypatch.setattr(calibrate.THREADS, "compare", compare)
    fed: list[tuple[int, ...]] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    calibrate.choose_threads(engine, PromptSets(HARMFUL, HARMLESS, HARMFUL, HARMLESS), pytest.fail)
    lengths = [len(engine.chat.token_ids(prompt)) for prompt in (*HARMFUL, *HARMLESS)]
    assert fed == [(2, min(lengths)), (2, 1), (2, 1), (2, 1)]
    assert asked == [sum(lengths) / min(lengths), 4]
    engine.chat.device = torch.device("meta")
    calibrate.choose_threads(engine, PromptSets(HARMFUL, HARMLESS, HARMFUL, HARMLESS), pytest.fail)
    engine.chat.device = torch.device("cpu")
    assert len(asked) == 2
