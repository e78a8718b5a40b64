"""Arrange rows of tokens for a pass: the shared prefix in the cache, the pads, and the tokens that are fed.

Pads carry the row's own first token. They are masked, but a repetition penalty sees them; this way it sees no token that the
prompt doesn't contain, and a row's response doesn't depend on its neighbours' lengths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Where pads may stand. "between" prefix and suffix is right if every layer attends to all positions, as masks then hide the
# pads. "left" is also right for sliding windows, which count slots. "none" is for states that can't be cut: no sharing.
Sharing = Literal["between", "left", "none"]


@dataclass(frozen=True)
class Layout:
    """The layout of n rows.

    First `prefix_ids` (m, P) with `prefix_mask` fill a cache; row i continues from cache row `prefix_of[i]`. Then `ids` (n, S)
    are fed. `mask` (n, P+S) covers cached and fed tokens; `whole` (n, P+S) holds all tokens with pads at the left, as logits
    processors see them. P is 0 if nothing is shared. `lengths` are the rows' numbers of tokens, and layouts with equal
    `prefix_key` have the same prefix rows; both are known without waiting for the device.
    """

    prefix_ids: Tensor
    prefix_mask: Tensor
    prefix_of: Tensor
    ids: Tensor
    mask: Tensor
    whole: Tensor
    lengths: tuple[int, ...]
    prefix_key: tuple[tuple[int, ...], ...]

    @property
    def prefix_length(self) -> int:
        """P, the number of cached tokens per row."""
        return self.prefix_ids.shape[1]

    @property
    def width(self) -> int:
        """P+S, the number of cache slots after the prompts."""
        return self.mask.shape[1]


def positions(mask: Tensor) -> Tensor:
    """Position ids of a mask (n, T); pads don't count."""
    return (mask.cumsum(dim=-1) - 1).clamp_min(0)


def shared_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The beginning that all rows share, shorter than every row, because each row must have a token left to feed."""
    shared = os.path.commonprefix([list(row) for row in rows])
    return list(shared[: min(len(row) for row in rows) - 1])


def lay_out(rows: Sequence[Sequence[int]], prefix: Sequence[int], sharing: Sharing, device: torch.device) -> Layout:
    """Arrange `rows`, which all begin with `prefix` (it may be empty)."""
    prefix = list(prefix) if sharing != "none" else []
    longest = max(len(row) for row in rows) - len(prefix)
    shifts = [longest - (len(row) - len(prefix)) for row in rows]
    if sharing == "left" and max(shifts) >= len(prefix):
        prefix, longest = [], max(len(row) for row in rows)  # a shift must leave a token of the prefix in the cache
        shifts = [longest - len(row) for row in rows]
    prefix_shifts, prefix_of = _prefix_rows(prefix, shifts, sharing)
    ids, mask = [], []
    for row, shift in zip(rows, shifts, strict=True):
        suffix = list(row[len(prefix) :])
        if sharing == "left" and prefix:
            ids.append(prefix[len(prefix) - shift :] + suffix)
            mask.append([0] * shift + [1] * (len(prefix) + longest - shift))
        else:
            ids.append([row[0]] * shift + suffix)
            mask.append([1] * len(prefix) + [0] * shift + [1] * len(suffix))
    whole = [[row[0]] * shift + list(row) for row, shift in zip(rows, shifts, strict=True)]
    prefix_mask = [[0] * shift + [1] * (len(prefix) - shift) for shift in prefix_shifts]
    prefix_ids = [[prefix[0]] * shift + prefix[: len(prefix) - shift] if prefix else [] for shift in prefix_shifts]

    def tensor(values: list[list[int]], width: int) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device).reshape(len(values), width)

    total = len(prefix) + longest
    return Layout(
        tensor(prefix_ids, len(prefix)),
        tensor(prefix_mask, len(prefix)),
        torch.tensor(prefix_of, dtype=torch.long, device=device),
        tensor(ids, longest),
        tensor(mask, total),
        tensor(whole, total),
        tuple(map(len, rows)),
        (*map(tuple, prefix_ids), *map(tuple, prefix_mask)),
    )


def _prefix_rows(prefix: Sequence[int], shifts: Sequence[int], sharing: Sharing) -> tuple[list[int], list[int]]:
    """The shifts of the prefix rows to compute, and the prefix row that each row continues."""
    if not prefix:
        return [], [0] * len(shifts)
    if sharing == "between":
        return [0], [0] * len(shifts)
    distinct = sorted(set(shifts))
    return distinct, [distinct.index(shift) for shift in shifts]
