"""How many threads a process takes beside others and in containers."""

from __future__ import annotations

import math
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.model import threads
from abliterate.model.threads import (
    PassSeconds,
    Threads,
    busy_cores,
    cpu_quota,
    fewer_are_faster,
    fitting,
    time_passes,
)


@pytest.mark.parametrize(
    ("now", "quota", "busy", "cores", "expected"),
    [
        (8, math.inf, 0.0, 8, 8),
        (8, math.inf, 0.4, 8, 8),
        (8, math.inf, 1.0, 8, 7),
        (2, math.inf, 1.1, 2, 1),
        (2, math.inf, 7.0, 2, 1),
        (4, math.inf, 4.0, 8, 4),  # four physical cores of eight: the others are free
        (64, 2.0, 40.0, 64, 2),
        (64, 2.5, 0.0, 64, 2),
        (64, 0.5, 0.0, 64, 1),
        (1, math.inf, 0.0, 8, 1),
    ],
)
def test_threads_that_fit(now: int, quota: float, busy: float, cores: int, expected: int) -> None:
    assert fitting(now, quota, busy, cores) == expected


@pytest.fixture
def groups(tmp_path: Path) -> tuple[Path, Path]:
    """(mounted root, the process's list of groups): the parent of the process's group allows two and a half cores."""
    (tmp_path / "cgroup").write_text("0::/slice/job\n", encoding="ascii")
    (tmp_path / "slice" / "job").mkdir(parents=True)
    (tmp_path / "slice" / "cpu.max").write_text("250000 100000\n", encoding="ascii")
    (tmp_path / "slice" / "job" / "cpu.max").write_text("max 100000\n", encoding="ascii")
    return tmp_path, tmp_path / "cgroup"


def test_the_tightest_quota_counts(groups: tuple[Path, Path]) -> None:
    root, own = groups
    assert cpu_quota(root, own) == 2.5
    (root / "slice" / "job" / "cpu.max").write_text("50000 100000", encoding="ascii")
    assert cpu_quota(root, own) == 0.5
    assert cpu_quota(root, root / "none") == math.inf


def test_quotas_of_the_first_version(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("4:cpu,cpuacct:/job\n3:memory:/job\n", encoding="ascii")
    (tmp_path / "cpu" / "job").mkdir(parents=True)
    for folder, quota in ((tmp_path / "cpu", "-1"), (tmp_path / "cpu" / "job", "150000")):
        (folder / "cpu.cfs_quota_us").write_text(quota, encoding="ascii")
        (folder / "cpu.cfs_period_us").write_text("100000", encoding="ascii")
    assert cpu_quota(tmp_path, tmp_path / "cgroup") == 1.5


def test_this_process_and_waiting_for_disks_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two seconds of two cores: one second idle, half a second waiting, one and a half of this process, one of others."""
    whole = iter([times(user=10, system=2, idle=50, iowait=1), times(user=12, system=2.5, idle=51, iowait=1.5)])
    own = iter([SimpleNamespace(user=3, system=1), SimpleNamespace(user=4, system=1.5)])
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(threads.psutil, "cpu_times", lambda: next(whole))
    monkeypatch.setattr(threads.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: next(own)))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)
    assert busy_cores() == pytest.approx((2.5 - 1.5) / 2)


def test_this_machine_is_watched() -> None:
    assert 0 <= busy_cores(0.05) < 10_000


def times(**seconds: float) -> Any:
    """What `psutil.cpu_times` gives on Linux; time of guests is part of that of users."""
    fields = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
    return namedtuple("times", fields)(**{name: float(seconds.get(name, 0)) for name in fields})  # type: ignore[misc]


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process with four threads on eight cores, of which five are busy; the numbers that are set."""
    now = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[-1])
    monkeypatch.setattr(torch, "set_num_threads", now.append)
    monkeypatch.setattr(threads, "busy_cores", lambda: 5.0)
    monkeypatch.setattr(threads, "cpu_quota", lambda: math.inf)
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda: 8)
    for name in threads.CHOSEN_BY:
        monkeypatch.delenv(name, raising=False)
    return now


def test_fewer_threads_are_taken_and_told(four: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    notes, process = list[str](), Threads()
    process.fit(notes.append)
    assert four[-1] == 3
    assert "3 instead of 4 threads, because other processes use 5.0 cores" in notes[0]
    monkeypatch.setattr(threads, "busy_cores", lambda: 0.0)
    process.fit(notes.append)
    assert four[-1] == 4, "a later model gets what is free by then"
    assert len(notes) == 1


def test_a_number_that_somebody_chose_stays(four: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    process = Threads()
    four.append(2)
    process.fit(pytest.fail)
    assert four[-1] == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    Threads().fit(pytest.fail)
    assert four[-1] == 2


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        # (prefill, decoding pass) with all threads, and with half of them, in each round
        ([((0.1, 0.010), (0.2, 0.02)), ((0.1, 0.010), (0.2, 0.02))], False),  # a quiet machine
        ([((0.9, 0.200), (0.2, 0.02)), ((0.8, 0.150), (0.2, 0.02))], True),  # threads that wait for each other
        ([((0.9, 0.200), (0.2, 0.02)), ((0.1, 0.010), (0.2, 0.02))], False),  # other work for a moment
        ([((0.1, 0.010), (0.1, 0.009)), ((0.1, 0.010), (0.1, 0.009))], False),  # faster, but not clearly
        ([((0.1, 0.030), (0.2, 0.015)), ((0.1, 0.030), (0.2, 0.015))], True),  # decoding is most of a trial
        ([((2.0, 0.010), (4.0, 0.005)), ((2.0, 0.010), (4.0, 0.005))], False),  # long prompts: the prefill is
        ([((0.1, 0.0), (0.05, 0.0)), ((0.1, 0.0), (0.05, 0.0))], True),  # responses of one token
        ([], False),
    ],
)
def test_fewer_threads_only_if_clearly_faster(rounds: list[Any], expected: bool) -> None:
    assert fewer_are_faster([(PassSeconds(*many), PassSeconds(*few)) for many, few in rounds]) is expected


class Clock:
    """A fake clock with passes that take `seconds` a row, by the number of threads, and a hundredth of that a decoded row."""

    def __init__(self, threads: list[int], seconds: dict[int, float]) -> None:
        self.now, self.threads, self.seconds = 0.0, threads, seconds
        self.asked: list[tuple[int, int, int]] = []  # threads, rows, passes

    def __call__(self) -> float:
        return self.now

    def generate(self, rows: int, passes: int, after_token: Any) -> None:
        self.asked.append((self.threads[-1], rows, passes))
        for index in range(1 + passes):
            self.now += self.seconds[self.threads[-1]] * rows * (1 if index == 0 else 0.01)
            after_token()


def test_passes_are_timed_apart(four: list[int]) -> None:
    clock = Clock(four, {4: 0.5})
    found = time_passes(clock.generate, 2, 3, clock)
    assert (found.prefill, found.decoding) == (pytest.approx(1.0), pytest.approx(0.01))
    assert time_passes(clock.generate, 2, 0, clock) == PassSeconds(pytest.approx(1.0), 0.0)


def test_half_of_the_threads_are_taken_where_they_are_faster(four: list[int]) -> None:
    notes, clock, process = list[str](), Clock(four, {4: 0.008, 2: 0.002}), Threads()
    process.compare(clock.generate, 200.0, notes.append, clock)
    assert four[-1] == 2
    assert notes == ["2 instead of 4 threads, because passes are 4.0 times as fast; OMP_NUM_THREADS=N chooses another number"]
    assert [threads for threads, _, _ in clock.asked] == [4, 4, 4, 2, 2, 4]
    assert clock.asked[-1][1:] == (15, 3)
    assert clock.now < threads.SECONDS
    process.fit(notes.append)
    assert len(notes) == 2, "a later model gets what is free by then"


@pytest.mark.parametrize("seconds", [{4: 0.001, 2: 0.002}, {4: 0.001, 2: 0.0009}])
def test_all_threads_stay_where_fewer_are_no_faster(four: list[int], seconds: dict[int, float]) -> None:
    clock = Clock(four, seconds)
    Threads().compare(clock.generate, 200.0, pytest.fail, clock)
    assert four[-1] == 4
    assert clock.now < threads.SECONDS


def test_a_large_model_is_probed_for_two_percent_of_a_trial(four: list[int]) -> None:
    clock = Clock(four, {4: 10.0, 2: 3.0})
    Threads().compare(clock.generate, 400.0, lambda note: None, clock)
    assert four[-1] == 2
    assert {rows for _, rows, _ in clock.asked} == {1}
    assert clock.now - 20.5 < 0.02 * 400 * 10, "the first two passes are those that warm a model up"
    slow = Clock(four := [4], {4: 10.0, 2: 3.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: four[-1])
        patch.setattr(torch, "set_num_threads", four.append)
        Threads().compare(slow.generate, 100.0, pytest.fail, slow)
    assert [asked[1] for asked in slow.asked] == [1, 1], "a trial is so short that nothing can be compared"
    assert four == [4]


def test_a_number_that_somebody_chose_is_not_compared(four: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    process = Threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    process.compare(pytest.fail, 200.0, pytest.fail)
    monkeypatch.delenv("OMP_NUM_THREADS")
    four.append(3)
    process.compare(pytest.fail, 200.0, pytest.fail)
    four.append(1)
    Threads().compare(pytest.fail, 200.0, pytest.fail)


def test_a_failing_pass_leaves_all_threads(four: list[int]) -> None:
    clock = Clock(four, {4: 0.01})  # no time with two threads: KeyError
    with pytest.raises(KeyError):
        Threads().compare(clock.generate, 200.0, pytest.fail, clock)
    assert four[-1] == 4
