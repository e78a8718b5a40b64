"""A graph of recorded operations on a CPU, which behaves as a CUDA graph does.

Recording computes nothing that lasts. A replay runs the recorded operations on the recorded tensors; no line of Python that
called them runs again, so whatever a pass took from Python is as it was when it was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraph(TorchDispatchMode):
    """Records every operation that is called while it is active; `waiting` makes operations of that name fail."""

    def __init__(self, waiting: str = "") -> None:
        super().__init__()
        self.replays = 0
        self._waiting = waiting
        self._calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []  # written tensors, and what was in them

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        # A device's capture fails where a value would have to be read back.
        if name in ("_local_scalar_dense", "nonzero", "equal") or name == self._waiting:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))
        result = func(*args, **kwargs)
        # A view needs no replay, but `reshape` and `contiguous` may copy.
        if not (func.is_view and _storage(result) in map(_storage, args)):
            self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        """Put back what was in the tensors that were written while recording."""
        for tensor, value in reversed(self._before):
            tensor.copy_(value)
        self._before.clear()

    def replay(self) -> None:
        """Run the recorded operations again, each into the tensors that it made when it was recorded."""
        self.replays += 1
        for func, args, kwargs, result in self._calls:
            written = {id(value) for value in tree_leaves((args, kwargs))}
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and id(old) not in written:
                    old.copy_(new)


def _storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


class Recorder:
    """Captures functions as recorded graphs, which are in `graphs`."""

    def __init__(self, waiting: str = "") -> None:
        self.graphs: list[RecordedGraph] = []
        self._waiting = waiting

    def __call__(self, work: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        graph = RecordedGraph(self._waiting)
        try:
            with graph:
                output = work()
        finally:
            graph.undo()
        output.fill_(torch.nan)  # nothing has been computed
        self.graphs.append(graph)
        return graph, output
