"""Decoding passes over buffers that stay where they are, so that a decoding pass has few shapes and fixed addresses.

A pass is over a bucket of rows and columns: the rows of the batch and copies of some, and the columns so far and some that the
mask still hides. Nothing in a pass depends on how many of them count, so it can be captured (`graphs.py`), and a compiler sees
few shapes. It needs a cache in which a mask may hide any column (`sharing_of` is "between").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from abliterate.engine.forward import Passes

# A bucket's rows are one of the first sizes, or a multiple of the last one; its columns are a multiple of COLUMNS.
ROWS = (1, 2, 4, 8, 16)
COLUMNS = 64

# (rows, columns) of a pass.
Bucket = tuple[int, int]


def row_bucket(rows: int) -> int:
    """The rows of the smallest bucket that holds so many."""
    return next((size for size in ROWS if size >= rows), -(-rows // ROWS[-1]) * ROWS[-1])


def column_bucket(columns: int) -> int:
    """The columns of the smallest bucket that holds so many."""
    return -(-columns // COLUMNS) * COLUMNS


class Runner(Protocol):
    """Runs a bucket's pass, which is always the same function of the same buffers."""

    def __call__(self, bucket: Bucket, work: Callable[[], Tensor]) -> Tensor:
        """The logits (rows, vocabulary) that `work` returns."""

    def forget(self) -> None:
        """The buffers are about to go."""


class Plain:
    """Runs every pass as it is."""

    def __call__(self, bucket: Bucket, work: Callable[[], Tensor]) -> Tensor:
        return work()

    def forget(self) -> None:
        """Nothing is remembered."""


class FixedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer of given buffers (rows, heads, columns, d); a pass writes into column `column`, a tensor of one number."""

    # The model then makes its mask without looking at values, which would wait for the device.
    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers exist already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states (rows, heads, 1, d) of the pass's token; all columns."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, from the first on."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        """As if all columns but the token's own came before it: the mask alone says which of them count."""
        return self.get_max_length() - 1

    def get_max_length(self) -> int:
        """The bucket's columns."""
        assert self.keys is not None
        return self.keys.shape[2]


class StaticCache:
    """Static buffers, and one batch of rows in them at a time.

    The buffers grow to the largest batch and stay until `release`. All buckets are views of the same buffers, so a pass may be
    over another bucket than the pass before.
    """

    def __init__(self, passes: Passes, run: Runner | None = None) -> None:
        self._passes = passes
        self._run: Runner = run or Plain()
        self._states: list[tuple[Tensor, Tensor]] = []  # keys and values (rows, heads, columns, d) of each layer
        self._mask = torch.empty(0, 0)
        self._ids = torch.empty(0, 1)
        self._columns: dict[torch.device, Tensor] = {}  # the column that a pass fills, for the layers on each device
        self._caches: dict[Bucket, Cache] = {}
        self._rows = self._used = 0

    def take(self, cache: Cache, mask: Tensor, more: int) -> None:
        """Take the rows (n) of `cache` with `mask` (n, C), which at most `more` tokens will follow.

        The layers of `cache` are emptied one after the other, and hold nothing until `give_back`.
        """
        n, used = mask.shape
        rows = row_bucket(n)
        layers: list[Any] = cache.layers
        self._allocate(layers, rows, column_bucket(used + more), mask)
        self._rows, self._used = n, used
        for layer, (keys, values) in zip(layers, self._states, strict=True):
            _fill(keys, layer.keys, rows)
            _fill(values, layer.values, rows)
            layer.keys = layer.values = None
        _fill(_as_states(self._mask), _as_states(mask), rows)
        for column in self._columns.values():
            column.fill_(used)

    def feed(self, tokens: Tensor) -> Tensor:
        """Feed a token of each row (n, 1); logits (n, vocabulary) of the next one."""
        bucket = row_bucket(self._rows), column_bucket(self._used + 1)
        self._ids[: self._rows].copy_(tokens)
        self._ids[self._rows : bucket[0]] = tokens[:1]
        logits = self._run(bucket, partial(self._pass, bucket))
        self._used += 1
        return logits[: self._rows]

    def shrinks(self, rows: int) -> bool:
        """Whether a smaller bucket holds so many rows; otherwise rows that leave would save nothing."""
        return row_bucket(rows) < row_bucket(self._rows)

    def keep(self, stay: Tensor) -> None:
        """Keep only the rows `stay` (m), in this order; there is a row at least."""
        for buffer in (*(states for pair in self._states for states in pair), _as_states(self._mask)):
            held = buffer[: self._rows, :, : self._used]
            held[: len(stay)].copy_(held.index_select(0, stay.to(held.device)))
        self._rows = len(stay)

    def give_back(self, cache: Cache) -> Tensor:
        """Put the rows' states into the layers of `cache`; their mask (n, C)."""
        layers: list[Any] = cache.layers
        for layer, (keys, values) in zip(layers, self._states, strict=True):
            layer.keys = keys[: self._rows, :, : self._used].clone()
            layer.values = values[: self._rows, :, : self._used].clone()
        return self._mask[: self._rows, : self._used].clone()

    def release(self) -> bool:
        """Give up the buffers and the rows in them. Whether there were any."""
        held = bool(self._states or self._caches)
        self._run.forget()
        self._states, self._caches, self._columns = [], {}, {}
        self._rows = self._used = 0
        return held

    def _pass(self, bucket: Bucket) -> Tensor:
        """One pass over a bucket: every shape in it follows from the bucket, and every value from the buffers."""
        rows, columns = bucket
        mask = self._mask[:rows, :columns]
        mask.index_fill_(1, self._columns[mask.device], 1)
        logits, _ = self._passes(self._ids[:rows], mask, self._cache(bucket))
        for column in self._columns.values():
            column.add_(1)
        return logits[:, -1]

    def _cache(self, bucket: Bucket) -> Cache:
        if bucket not in self._caches:
            rows, columns = bucket
            self._caches[bucket] = Cache(
                layers=[
                    FixedLayer(keys[:rows, :, :columns], values[:rows, :, :columns], self._columns[keys.device])
                    for keys, values in self._states
                ]
            )
        return self._caches[bucket]

    def _allocate(self, layers: Sequence[Any], rows: int, columns: int, mask: Tensor) -> None:
        """Make buffers for so many rows and columns, unless there are some."""
        have = tuple(self._mask.shape)
        alike = [_kind(states) for pair in self._states for states in pair] == [
            _kind(states) for layer in layers for states in (layer.keys, layer.values)
        ]
        if alike and rows <= have[0] and columns <= have[1]:
            return
        if alike:
            rows, columns = max(rows, have[0]), max(columns, have[1])
        self.release()  # first, so that old and new buffers are never in memory together
        # Zeros: a hidden column counts 0 times its value, which is not a number if the value isn't.
        self._states = [
            tuple(states.new_zeros(rows, states.shape[1], columns, states.shape[3]) for states in (layer.keys, layer.values))  # type: ignore[misc]
            for layer in layers
        ]
        self._mask = mask.new_zeros(rows, columns)
        self._ids = torch.zeros(rows, 1, dtype=torch.long, device=mask.device)
        devices = {mask.device, *(keys.device for keys, _ in self._states)}
        self._columns = {device: torch.zeros(1, dtype=torch.long, device=device) for device in devices}


def _fill(buffer: Tensor, states: Tensor, rows: int) -> None:
    """Write states (n, heads, C, d) into a buffer; rows up to `rows` are copies of the first one, and other columns 0.

    What an earlier batch left in those columns may be infinite, and 0 times infinity is not a number.
    """
    n, _, used, _ = states.shape
    buffer[:n, :, :used] = states
    buffer[n:rows, :, :used] = states[:1]
    buffer[:rows, :, used:] = 0


def _as_states(mask: Tensor) -> Tensor:
    """A mask (n, C) in the shape of a layer's states."""
    return mask[:, None, :, None]


def _kind(states: Tensor) -> tuple[Any, ...]:
    return states.device, states.dtype, states.shape[1], states.shape[3]
