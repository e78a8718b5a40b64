"""Work in batches that survives running out of memory: halve, retry, lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from abliterate.errors import TrialError
from abliterate.model.residuals import clear_device_cache

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_batches(
    items: Sequence[Item], size: int, work: Callable[[Sequence[Item]], Sequence[Result]], device: torch.device
) -> list[Result]:
    """`work` over all items, at most `size` at a time, results in order; halved when the device runs out of memory.

    Raises:
        TrialError: one item alone doesn't fit.
    """
    results: list[Result] = []
    while len(results) < len(items):
        part = items[len(results) : len(results) + size]
        done: Sequence[Result] | None = None
        try:
            done = work(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise TrialError("the device is out of memory even for a single prompt") from None
        # Outside the `except` block: inside it the traceback keeps the batch's tensors alive.
        if done is None:
            clear_device_cache(device)
            size = max(1, len(part) // 2)
        else:
            results.extend(done)
    return results
