"""Give a CPU's passes no more threads than the machine has free cores.

The threads of one product wait for each other. Beside another busy process, or above a container's quota, some of them wait
for a core, and all of them spin meanwhile: trials were seen to take up to 17 times as long.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from abliterate.model.cgroups import CGROUPS, OWN, group_folders

# Environment variables by which a person chooses the number of threads.
CHOSEN_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# The seconds for which other processes are watched.
WATCHED = 0.1


class Threads:
    """The process's number of threads, as it was at first, and as it was last set here."""

    def __init__(self) -> None:
        self._at_first = self._last = torch.get_num_threads()

    def fit(self, note: Callable[[str], None]) -> None:
        """Take as many threads as cores are free now; a number that somebody else chose stays."""
        if any(os.environ.get(name) for name in CHOSEN_BY) or torch.get_num_threads() != self._last or self._at_first == 1:
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
            note(f"{self._last} instead of {self._at_first} threads, because {why}; OMP_NUM_THREADS=N chooses another number")


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
