"""Once per run, before anything is measured: batch size, response prefix, warm-up. Is handed callables, knows no engine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from abliterate.model.residuals import clear_device_cache

# Two sizes whose throughput differs by less are equally good; the smaller one needs less memory.
PLATEAU = 0.05
# Probes for the largest size that fits (five find it to within 35 % of 128), and for the smallest that is as fast.
_FIT_PROBES, _PLATEAU_PROBES = 5, 3


@dataclass(frozen=True)
class BatchTuning:
    """The chosen size and what was measured: {size: items per second, or None where it didn't fit}."""

    size: int
    probes: dict[int, float | None]


def tune_batch_size(probe: Callable[[int], float | None], maximum: int) -> BatchTuning:
    """The smallest measured batch size that is as fast as any that fits, by binary search in at most eight probes.

    `probe(size)` gives items per second, None if the device runs out of memory. First the largest size that fits
    (between the largest known to fit and the smallest known not to), then the smallest that is as fast. Both searches
    bisect the logarithm: capacities and gains differ by factors. 1 where nothing fits.
    """
    probes: dict[int, float | None] = {}
    fits, too_large = 0, maximum + 1
    size = maximum
    for _ in range(_FIT_PROBES):
        probes[size] = probe(size)
        fits, too_large = (fits, size) if probes[size] is None else (size, too_large)
        if too_large - fits <= max(1, fits // 8):  # to within 12 %: finer steps gain nothing
            break
        size = _between(fits, too_large)
    slow, fast = 0, fits
    for _ in range(_PLATEAU_PROBES):
        if fast - slow <= max(1, fast // 8):
            break
        size = _between(slow, fast)
        if size not in probes:
            probes[size] = probe(size)
        slow, fast = (slow, size) if size in _as_fast_as_any(probes) else (size, fast)
    return BatchTuning(min(_as_fast_as_any(probes), default=1), probes)


def _between(low: int, high: int) -> int:
    """The geometric middle, strictly between: low + 2 ≤ high."""
    return min(max(round(math.sqrt(max(1, low) * high)), low + 1), high - 1)


def _as_fast_as_any(probes: Mapping[int, float | None]) -> list[int]:
    speeds = {size: speed for size, speed in probes.items() if speed is not None}
    return [size for size, speed in speeds.items() if speed >= (1 - PLATEAU) * max(speeds.values())]


def double_batch_size(probe: Callable[[int], float | None], maximum: int) -> BatchTuning:
    """The fastest of 1, 2, 4, … up to `maximum` or the first that doesn't fit: the plain way, as peers do it."""
    probes: dict[int, float | None] = {}
    size = 1
    while size <= maximum:
        probes[size] = probe(size)
        if probes[size] is None:
            break
        size *= 2
    fitting = {size: speed for size, speed in probes.items() if speed is not None}
    return BatchTuning(max(fitting, key=lambda size: fitting[size]) if fitting else 1, probes)


def timed_probe(work: Callable[[], object], items: int, device: torch.device) -> float | None:
    """Items per second of `work`, or None if the device runs out of memory in it."""
    started = time.perf_counter()
    try:
        work()
        return items / max(time.perf_counter() - started, 1e-9)
    except torch.OutOfMemoryError:
        pass
    # Outside the `except` block: inside it the traceback keeps the tensors alive.
    clear_device_cache(device)
    return None


def even_size(size: int, items: int) -> int:
    """The size ≤ `size` that divides `items` into equally full batches: 100 items at most 64 at a time are 50 + 50."""
    return math.ceil(items / math.ceil(items / max(1, size)))


def detect_prefix(respond: Callable[[str], Sequence[str]], blocks: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
    """What all responses begin with, so that the first *response* token comes after it, and notes on what was found.

    `respond(prefix)` gives raw responses of prompts from both sets, continued after `prefix`. Where the common start
    opens a thinking block (`blocks`: opening, closed form), the block is closed and what follows is looked at again.
    A start that is some response as a whole is no prefix: nothing would be left to score.
    """
    notes: list[str] = []
    prefix = _shared_start(respond(""))
    for opening, closed in blocks:
        if prefix.startswith(opening):
            notes.append(f"thinking block {opening} is skipped")
            # Some templates put white space or a marker after the block; the second look finds it.
            prefix = closed + _shared_start(respond(closed))
            break
    return prefix, notes


def _shared_start(texts: Sequence[str]) -> str:
    start = common_start(texts)
    return "" if any(text.rstrip() == start.rstrip() for text in texts) else start


def common_start(texts: Sequence[str]) -> str:
    """The longest common start without trailing spaces: a space would change how the next word is tokenized."""
    return os.path.commonprefix(list(texts)).rstrip(" ")


class WarmUp:
    """Runs a throw-away pass once per process, so that no measurement pays for lazy initialization.

    With `once` off it runs at every call, as peers do before each probe.
    """

    def __init__(self, work: Callable[[], object], *, once: bool = True) -> None:
        self._work = work
        self._once = once
        self.runs = 0

    def __call__(self) -> None:
        if self.runs == 0 or not self._once:
            self._work()
            self.runs += 1
