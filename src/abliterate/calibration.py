"""Once per run, before anything is measured: batch size, response prefix, warm-up. Is handed callables, knows no engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from abliterate.model.markup import Markup

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


def detect_prefix(
    respond: Callable[[str], Sequence[str]], markup: Markup, tails: Sequence[str] = (), *, skip: bool = True
) -> tuple[str, list[str]]:
    """What all responses begin with, so that the first *response* token comes after it, and notes on what was found.

    `respond(prefix)` gives raw responses of prompts from both sets, continued after `prefix`; `tails` are what the chat
    template puts after each of them. Unless `skip` is off, a thinking block that a template or a response opens is closed
    for all, and what follows is looked at again: some put white space or a tag there.
    """
    closed, notes = _closed_by_prompts(markup, tails, skip=skip)
    texts = respond(closed)
    start = _shared_start(texts, markup)
    if closed == "":
        inside = markup.open_block(start)
        begin = [block for text in texts if (block := markup.begins_with(text[len(start) :]))]
        if inside is not None or begin:
            place, block = inside or (len(start), begin[0])
            who = "all" if inside else f"{len(begin)} of {len(texts)}"
            notes.append(f"{who} responses open a thinking block {block.opening}, which is {_what_happens(skip)}")
            if skip:
                closed = start[:place] + block.closed
                start = _shared_start(respond(closed), markup)
    if skip and (again := markup.open_block(start)) is not None:
        notes.append("the model begins to think again after the thinking block was closed; responses are read from after it")
        start = start[: again[0]].rstrip(" ")
    return closed + start, notes


def _closed_by_prompts(markup: Markup, tails: Sequence[str], *, skip: bool) -> tuple[str, list[str]]:
    """What closes the thinking block in which the chat template leaves the prompts."""
    opened = [markup.open_block(tail) for tail in tails]
    blocks = {found[1] for found in opened if found is not None}
    if not blocks:
        return "", []
    block = sorted(blocks, key=lambda block: block.opening)[0]
    if len(blocks) > 1 or None in opened:  # one prefix can't be right for all
        return "", ["the chat template opens a thinking block for some prompts; their responses are read from after it"]
    notes = [f"the chat template opens a thinking block {block.opening}, which is {_what_happens(skip)}"]
    # After a line break: an empty block, as models are trained on it, has two.
    return ("\n" * tails[0].endswith("\n") + block.closing) if skip else "", notes


def _what_happens(skip: bool) -> str:
    return "skipped: closed at once" if skip else "kept: a response is what follows it, within response.max_new_tokens"


def _shared_start(texts: Sequence[str], markup: Markup) -> str:
    """The common start; none where it is a whole response, which would leave nothing to score, and no part of a tag."""
    start = common_start(texts)
    return "" if any(text.rstrip() == start.rstrip() for text in texts) else markup.without_partial(start).rstrip(" ")


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
