"""Run work in batches that survive running out of memory: halve, retry, lose nothing, and grow back later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from abliterate.errors import TrialError
from abliterate.model.memory import affordable, clear_device_cache, memory_errors
from abliterate.types import BatchSizes

Item = TypeVar("Item")
Result = TypeVar("Result")

# A halved size is doubled again after this many full batches; the number doubles each time that growing was a mistake.
PATIENCE = 8


class Batches:
    """Runs at most `size` items at a time and halves that when the device is out of memory.

    Other processes come and go, so a halved size grows back step by step. A CPU raises no error before the kernel kills the
    process; there a batch is never larger than free memory and `row_bytes` (of one item; 0 if unknown) allow. If these are the
    bytes of an item of `row_tokens` tokens, `expect` says how long the longest of the next items is. Whenever a
    batch doesn't fit, it calls `free`, which frees what can be made again and says whether there was anything. A single item is
    given up if there was nothing, or if it doesn't fit then, either.
    """

    def __init__(self, size: int, device: torch.device, *, row_bytes: int = 0, row_tokens: int = 0) -> None:
        self.size = size
        self._full_size = size
        self._device = device
        self._row_bytes, self._row_tokens = row_bytes, row_tokens
        self._longer = 1.0  # the longest item to come has so many times `row_tokens` tokens
        self._full_batches = 0
        self._patience = PATIENCE
        self._has_grown = False
        self.free: Callable[[], bool] = lambda: False

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """The results of `work` over all items, in order.

        Raises:
            TrialError: a single item doesn't fit.
        """
        results: list[Result] = []
        freed = False  # whether memory was freed for a single item, the next one
        while len(results) < len(items):
            batch = items[len(results) : len(results) + self.affordable()]
            batch_results: Sequence[Result] | None = None
            try:
                with memory_errors():
                    batch_results = work(batch)
            except torch.OutOfMemoryError:
                pass
            # Outside the `except` block: inside it the traceback keeps the batch's tensors alive.
            if batch_results is not None:
                results.extend(batch_results)
                self._grow(len(batch))
                freed = False
                continue
            is_single = len(batch) == 1
            there_was_some = not (is_single and freed) and self.free()
            if is_single and not there_was_some:
                raise TrialError("the device is out of memory even for a single prompt")
            freed = is_single
            self.shrink(len(batch))
        return results

    def expect(self, tokens: int) -> None:
        """The longest of the next items has so many tokens: sizes are found by one set, and other prompts may be longer."""
        self._longer = max(1.0, tokens / self._row_tokens) if self._row_tokens else 1.0

    def affordable(self) -> int:
        """`size`, or fewer items if memory doesn't allow that many now."""
        return affordable(self.size, round(self._longer * self._row_bytes), self._device)

    def shrink(self, rows: int) -> None:
        """Halve the size after `rows` items didn't fit. Call it where no traceback keeps their tensors alive."""
        clear_device_cache(self._device)
        self.size = max(1, rows // 2)
        self._full_batches = 0
        if self._has_grown:
            self._patience, self._has_grown = 2 * self._patience, False

    def _grow(self, rows: int) -> None:
        if rows < self.size or self.size == self._full_size:
            return
        self._full_batches += 1
        if self._full_batches == self._patience:
            self.size, self._full_batches, self._has_grown = min(self._full_size, 2 * self.size), 0, True


def batches_of_trials(sizes: BatchSizes, device: torch.device) -> tuple[Batches, Batches]:
    """The batches for prefills and those for whole responses."""
    found = zip((sizes.prefill, sizes.decode), sizes.row_bytes[1:], sizes.row_tokens[1:], strict=True)
    prefills, decodes = (Batches(size, device, row_bytes=each, row_tokens=tokens) for size, each, tokens in found)
    return prefills, decodes
