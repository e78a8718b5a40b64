"""Work in batches that survives running out of memory: halve, retry, lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from abliterate.errors import TrialError
from abliterate.model.residuals import clear_device_cache

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batches:
    """At most `size` items at a time; halved for good when the device runs out of memory, unless `recover` is off."""

    def __init__(self, size: int, device: torch.device, *, recover: bool = True) -> None:
        self.size = size
        self._device = device
        self._recover = recover

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """`work` over all items, results in order.

        Raises:
            TrialError: one item alone doesn't fit.
        """
        results: list[Result] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.size]
            done: Sequence[Result] | None = None
            try:
                done = work(part)
            except torch.OutOfMemoryError:
                if not self._recover:
                    raise TrialError(f"the device is out of memory for a batch of {len(part)}") from None
                if len(part) == 1:
                    raise TrialError("the device is out of memory even for a single prompt") from None
            # Outside the `except` block: inside it the traceback keeps the batch's tensors alive.
            if done is None:
                clear_device_cache(self._device)
                self.size = max(1, len(part) // 2)
            else:
                results.extend(done)
        return results
