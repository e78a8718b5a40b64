"""Work in batches that survives running out of memory: halve, retry, lose nothing, and grow back later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from abliterate.errors import TrialError
from abliterate.model.memory import affordable, clear_device_cache, memory_errors
from abliterate.types import BatchSizes

Item = TypeVar("Item")
Result = TypeVar("Result")

# Full batches after which a size that was halved is doubled again; twice as many each time that doubling was a mistake.
PATIENCE = 8


class Batches:
    """At most `size` items at a time; halved where the device runs out of memory, unless `recover` is off.

    Other processes come and go: a halved size grows back step by step. On a CPU, whose killer asks nobody, a batch is never
    larger than free memory and `row_bytes` (of one item; 0: not known) allow.
    """

    def __init__(self, size: int, device: torch.device, *, recover: bool = True, row_bytes: int = 0) -> None:
        self.size = size
        self._wanted = size
        self._device = device
        self._recover = recover
        self._row_bytes = row_bytes
        self._fitted = 0
        self._patience = PATIENCE
        self._has_grown = False

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """`work` over all items, results in order.

        Raises:
            TrialError: one item alone doesn't fit.
        """
        results: list[Result] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + self.affordable()]
            done: Sequence[Result] | None = None
            try:
                with memory_errors():
                    done = work(part)
            except torch.OutOfMemoryError:
                if not self._recover:
                    raise TrialError(f"the device is out of memory for a batch of {len(part)}") from None
                if len(part) == 1:
                    raise TrialError("the device is out of memory even for a single prompt") from None
            # Outside the `except` block: inside it the traceback keeps the batch's tensors alive.
            if done is None:
                self.shrink(len(part))
            else:
                results.extend(done)
                self._grow(len(part))
        return results

    def affordable(self) -> int:
        """`size`, or what memory allows of it now."""
        return affordable(self.size, self._row_bytes, self._device)

    def shrink(self, rows: int) -> None:
        """So many items didn't fit. Call it where no traceback keeps their tensors."""
        clear_device_cache(self._device)
        self.size = max(1, rows // 2)
        self._fitted = 0
        if self._has_grown:
            self._patience, self._has_grown = 2 * self._patience, False

    def _grow(self, rows: int) -> None:
        if rows < self.size or self.size == self._wanted:
            return
        self._fitted += 1
        if self._fitted == self._patience:
            self.size, self._fitted, self._has_grown = min(self._wanted, 2 * self.size), 0, True


def batches_of_trials(sizes: BatchSizes, device: torch.device, *, recover: bool = True) -> tuple[Batches, Batches]:
    """Batches of prefills, and of whole responses."""
    prefills = Batches(sizes.prefill, device, recover=recover, row_bytes=sizes.row_bytes[1])
    return prefills, Batches(sizes.decode, device, recover=recover, row_bytes=sizes.row_bytes[2])
