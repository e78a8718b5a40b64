"""Count the operations that Python hands to the device: on a GPU each is a kernel's launch, which takes some microseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from support.places import place

# They give a tensor a new face, or take memory, and start nothing.
FREE = frozenset(("detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"))


class Launches(TorchDispatchMode):
    """While active, counts every operation that reads or writes values, by the file and function it was called from.

    Views are free. What a model's own code calls counts as the model's: its place is "model".
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def own(self) -> Counter[str]:
        """Those of this package."""
        return Counter({place: count for place, count in self.places.items() if place != "model"})
