"""Captures the decoding pass of each bucket as a CUDA graph, which starts all its kernels at once.

A graph holds the addresses of everything that it read, the factors of an edit included, and which modules have an edit at all.
So graphs are captured anew whenever the edit changes, which takes about one pass a bucket. To write factors in place instead,
every module would need factors of the same shape in every trial, and modules without an edit would no longer cost nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from abliterate import ranks
from abliterate.engine.prefill import EditState
from abliterate.engine.static_cache import Bucket
from abliterate.errors import first_line


class Graph(Protocol):
    """A function that was recorded, to be run again on the same addresses."""

    def replay(self) -> None:
        """Run it again."""


# Records a function: the graph, and the tensor that holds the function's result after each replay. Recording computes nothing.
Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


class Graphs:
    """Runs the passes of buckets: the first one of a bucket under an edit as it is, and later ones by its graph.

    The first pass also makes what libraries allocate once, and recasts factors, neither of which may happen in a capture. If a
    capture fails, `tell` gets a sentence, and all passes run as they are.
    """

    def __init__(self, edits: EditState, capture: Capture, tell: Callable[[str], None]) -> None:
        self._edits = edits
        self._capture = capture
        self._tell = tell
        self._captured: dict[Bucket, tuple[Graph, Tensor]] = {}
        self._seen: set[Bucket] = set()
        self._version = -1
        self._failed = False

    def __call__(self, bucket: Bucket, work: Callable[[], Tensor]) -> Tensor:
        if self._version != self._edits.version:
            self.forget()
            self._version = self._edits.version
        if self._failed or bucket not in self._seen:
            self._seen.add(bucket)
            return work()
        if bucket not in self._captured:
            try:
                self._captured[bucket] = self._capture(work)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # an operation that must wait for the device, or that memory is not left for
                self.forget()
                self._failed = True
                self._tell(f"decoding passes can't be captured as CUDA graphs ({first_line(error)}), so each is launched anew")
                return work()
        graph, output = self._captured[bucket]
        graph.replay()
        return output.clone()  # the next replay, of whichever bucket, may write over it

    def forget(self) -> None:
        """Drop all graphs."""
        self._captured.clear()
        self._seen.clear()


class CudaCapture:
    """Captures functions on one CUDA device.

    `torch.cuda.graph` isn't used, because it empties the allocator's cache before each capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._index = self._stream.device_index
        # Graphs share a pool of memory, and a graph that is never replayed keeps the pool when all others have gone.
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper = self(lambda: torch.zeros(1, device=device))

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # Other threads may use the device meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it only repeats that the capture has failed
                    graph.capture_end()
                # If it fails, some versions of torch leave the allocator in the state of a capture, in which memory can't be
                # returned to the device. After a capture that has ended this call only raises an error.
                with contextlib.suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(self._index, self._pool)
                raise
            graph.capture_end()
        before.wait_stream(self._stream)
        return graph, output


def capture_of(model: torch.nn.Module, device: torch.device) -> Capture | None:
    """How passes of the model can be captured; None if they can't: not on CUDA, or on several devices or ranks."""
    places = set((getattr(model, "hf_device_map", None) or {"": device}).values())
    return CudaCapture(device) if device.type == "cuda" and len(places) == ranks.size() == 1 else None
