"""Give a CPU's passes no more threads than the machine has free cores, and no more than make them faster.

The threads of one product wait for each other. Beside another busy process, or above a container's quota, some of them wait
for a core, and all of them spin meanwhile: trials were seen to take up to 17 times as long. What is free is guessed when a
model is opened; a few passes of the loaded model then tell whether half as many threads are faster.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from abliterate.model.cgroups import CGROUPS, OWN, group_folders

# Environment variables by which a person chooses the number of threads.
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
OTHER_NUMBER = "OMP_NUM_THREADS=N chooses another number"
# The seconds for which other processes are watched.
WATCHED = 0.1
# The most seconds that comparing numbers of threads may take: this many, or this share of a trial if that is more.
SECONDS, SHARE = 1.0, 0.02
# The most rows and decoding passes of a probe, and the number of probes, two for each number of threads. For a large model,
# rows and passes are fewer, so that all probes fit into the seconds above.
ROWS, PASSES, PROBES = 32, 3, 4
# A batch of a trial is one prefill and about as many decoding passes (docs/performance.md: 18 passes of a survivor's).
PASSES_OF_A_TRIAL = 18
# Fewer threads are taken if they need at most this share of the time, each time they are compared. Where a machine is quiet,
# all threads are faster, and a wrong choice for a whole run costs more than the gain of a right one.
CLEARLY = 0.8

# Generates 1 + `passes` tokens of `rows` prompts, and calls back after each token of all rows: generate(rows, passes, after).
Generate = Callable[[int, int, Callable[[], None]], object]


@dataclass(frozen=True)
class PassSeconds:
    """The seconds of a prefill and of one decoding pass of the same rows."""

    prefill: float
    decoding: float

    @property
    def of_a_trial(self) -> float:
        """The seconds of a batch in a trial."""
        return self.prefill + PASSES_OF_A_TRIAL * self.decoding


def time_passes(generate: Generate, rows: int, passes: int, clock: Callable[[], float] = time.perf_counter) -> PassSeconds:
    """Time one prefill and the mean of some decoding passes. Where all rows end at once, decoding takes no time."""
    times = [clock()]
    generate(rows, passes, lambda: times.append(clock()))
    if len(times) < 3:
        return PassSeconds(times[-1] - times[0], 0.0)
    return PassSeconds(times[1] - times[0], (times[-1] - times[1]) / (len(times) - 2))


def fewer_are_faster(rounds: Sequence[tuple[PassSeconds, PassSeconds]]) -> bool:
    """Whether the second number of threads was clearly faster than the first each time both were timed."""
    return bool(rounds) and all(few.of_a_trial <= CLEARLY * many.of_a_trial for many, few in rounds)


class Threads:
    """The process's number of threads, as it was at first, and as it was last set here."""

    def __init__(self) -> None:
        self._at_first = self._last = torch.get_num_threads()

    def fit(self, note: Callable[[str], None]) -> None:
        """Take as many threads as cores are free now; a number that somebody else chose stays."""
        if self._is_chosen() or self._at_first == 1:
            return
        quota, busy = cpu_quota(), busy_cores()
        self._last = fitting(self._at_first, quota, busy, psutil.cpu_count() or 1)
        torch.set_num_threads(self._last)
        if self._last < self._at_first:
            why = (
                f"other processes use {busy:.1f} cores"
                if quota >= self._at_first
                else f"this process may use {quota:.1f} cores"
            )
            note(f"{self._last} instead of {self._at_first} threads, because {why}; {OTHER_NUMBER}")

    def compare(
        self,
        generate: Generate,
        prefills: float,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take half of the threads if passes are clearly faster with them; a number that somebody else chose stays.

        A trial's prompts have as many tokens as `prefills` prompts of those that `generate` takes. After two short
        generations, which tell what a pass costs, the probes take at most a second, or 2 % of a trial; where that is too
        little for two probes of each number, nothing is compared.
        """
        many, few = self._last, self._last // 2
        if self._is_chosen() or few == 0:
            return
        generate(1, 1, lambda: None)  # the first pass of all is slow
        one = time_passes(generate, 1, 1, clock)
        budget = max(SECONDS, SHARE * prefills * one.prefill)
        rows = max(1, min(ROWS, int(budget / (2 * PROBES * (one.prefill + PASSES * one.decoding + 1e-9)))))
        passes = PASSES if PROBES * (one.prefill + PASSES * one.decoding) <= budget else 1
        if PROBES * (one.prefill + passes * one.decoding) > budget:
            return
        rounds = []
        try:
            for order in ((many, few), (few, many)):  # interleaved, so that other work meets both alike
                found = {}
                for number in order:
                    torch.set_num_threads(number)
                    found[number] = time_passes(generate, rows, passes, clock)
                rounds.append((found[many], found[few]))
        finally:
            torch.set_num_threads(many)
        if fewer_are_faster(rounds):
            self._last = few
            torch.set_num_threads(few)
            gain = min(slow.of_a_trial / max(fast.of_a_trial, 1e-9) for slow, fast in rounds)
            note(f"{few} instead of {many} threads, because passes are {gain:.1f} times as fast; {OTHER_NUMBER}")

    def _is_chosen(self) -> bool:
        """Whether a person, or a program that uses this library, has chosen the number."""
        return any(os.environ.get(name) for name in CHOSEN_BY) or torch.get_num_threads() != self._last


def fitting(threads: int, quota: float, busy: float, cores: int) -> int:
    """At most `threads`, the whole cores of a `quota`, and the `cores` that aren't `busy`; at least 1."""
    return max(1, min(threads, math.floor(min(quota, cores) + 0.01), cores - round(busy)))


def busy_cores(seconds: float = WATCHED) -> float:
    """The cores that other processes keep busy, watched for some seconds."""
    process = psutil.Process()

    def used() -> float:
        times, own = psutil.cpu_times(), process.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return float(sum(times[:8]) - idle - own.user - own.system)  # later fields are counted in the first ones, too

    begin, started = used(), time.perf_counter()
    time.sleep(seconds)
    return max(0.0, (used() - begin) / (time.perf_counter() - started))


def cpu_quota(root: Path = CGROUPS, own: Path = OWN) -> float:
    """The cores that this process's control groups allow it; infinite without a limit."""
    quota = math.inf
    for folder, version in group_folders("cpu", root, own):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            if version == 2:
                most, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            else:
                most, period = ((folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period"))
            if int(most) > 0:  # −1: no limit
                quota = min(quota, int(most) / int(period))
    return quota


THREADS = Threads()
