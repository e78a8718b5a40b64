"""Once per run, before anything is measured: batch size, response prefix, warm-up. Is handed callables, knows no engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Two sizes whose throughput differs by less are equally good; the smaller one needs less memory.
PLATEAU = 0.05
# Probes in all, and at most for the smallest size that is as fast.
_PROBES, _SHRINK_PROBES = 8, 4
# Sizes nearer to each other than this aren't told apart, and so many of such steps are taken at first: nearly a doubling.
_STEP, _FIRST_STEP = 1.2, 2


@dataclass(frozen=True)
class BatchTuning:
    """The chosen size and what was measured: {size: items per second, or None where it didn't fit}."""

    size: int
    probes: dict[int, float | None]


def even_sizes(items: int, maximum: int) -> list[int]:
    """Sizes worth a probe, ascending: equally full batches of `items`, at most `maximum` at a time, in steps of a fifth.

    100 items go as 100, 50, 34 or 25 at a time, never as 64 and 36.
    """
    found: list[int] = []
    for batches in range(math.ceil(items / maximum), items + 1):
        size = math.ceil(items / batches)
        if not found or size <= found[-1] / _STEP or (size == 1 and found[-1] > 1):
            found.append(size)
        if size == 1:
            break
    return found[::-1]


def tune_batch_size(
    probe: Callable[[int], float | None], sizes: Sequence[int], start: int, *, grow: bool = True, shrink: bool = True
) -> BatchTuning:
    """The smallest of `sizes` (ascending) that is as fast as any that fits, by binary search in at most eight probes.

    `probe(size)` gives items per second, None if the device runs out of memory. First from `start` (an estimate) to the
    largest size that fits, as long as growing gains speed; then to the smallest that is as fast. 1 where nothing fits.
    Without `grow`, larger sizes than `start` aren't tried; without `shrink`, smaller ones only if it doesn't fit.
    """
    probes: dict[int, float | None] = {}
    at = max((index for index, size in enumerate(sizes) if size <= start), default=0)
    fits, too_large, step = -1, len(sizes) if grow else at + 1, _FIRST_STEP
    while len(probes) < _PROBES and fits < at < too_large:
        before = probes[sizes[fits]] if fits >= 0 else None
        speed = probes[sizes[at]] = probe(sizes[at])
        fits, too_large = (fits, at) if speed is None else (at, too_large)
        if speed is not None and before is not None and speed < (1 + PLATEAU) * before:
            break
        # In growing steps away from the estimate, which is seldom far off; between what fits and what doesn't in the middle.
        if fits >= 0 and None in probes.values():
            at = (fits + too_large) // 2
        else:
            at, step = (max(0, at - step) if speed is None else min(len(sizes) - 1, at + step)), 2 * step
    slow, fast, step = -1, fits, _FIRST_STEP
    for _ in range(min(_SHRINK_PROBES, _PROBES - len(probes)) if shrink else 0):
        if fast - slow <= (1 if slow < 0 else _FIRST_STEP):
            break
        at, step = (max(0, fast - step) if slow < 0 else (slow + fast) // 2), 2 * step
        if sizes[at] not in probes:
            probes[sizes[at]] = probe(sizes[at])
        slow, fast = (slow, at) if sizes[at] in _as_fast_as_any(probes) else (at, fast)
    return BatchTuning(min(_as_fast_as_any(probes), default=1), probes)


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
