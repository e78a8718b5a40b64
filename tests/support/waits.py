"""Count where Python waits for the device: a GPU runs ahead of it until a value is read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from support.places import place

# Functions that read a tensor's values, or whose result's shape depends on them.
READS = frozenset(
    (
        *("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__"),
        *("nonzero", "equal", "allclose", "unique", "masked_select", "bincount"),
    )
)


class Waits(TorchFunctionMode):
    """While active, counts every wait by the file and the function of this package that it happens in.

    A wait inside a model's own code counts as the model's: its place is "model".
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READS or _moves_to_host(func, args, kwargs or {}) or _picks_by_mask(func, args):
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


def _moves_to_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is `tensor.to("cpu")`; the device of another tensor doesn't tell here whether it differs."""
    return getattr(func, "__name__", "") == "to" and any(
        isinstance(value, str) and value == "cpu" for value in (*args[1:], *kwargs.values())
    )


def _picks_by_mask(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is `tensor[mask]`, whose shape depends on the mask."""
    if getattr(func, "__name__", "") != "__getitem__":
        return False
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)
