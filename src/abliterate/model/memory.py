"""Measures the memory of the machine and its devices: free memory, peak use, and the errors that mean it ran out."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import torch

from abliterate import ranks
from abliterate.errors import AbliterateError
from abliterate.model.cgroups import CGROUPS, OWN, group_folders

Result = TypeVar("Result")

# Phrases of out-of-memory errors without a class of their own: the CPU's allocator, MPS, XPU, cuBLAS.
_PHRASES = (
    *("out of memory", "can't allocate memory", "not enough memory", "invalid buffer size", "status_alloc_failed"),
    *("out_of_device_memory", "out_of_host_memory", "out_of_resources", "can't start new thread"),
)
# The share of free memory that we use. A full accelerator raises an error; a machine without memory kills the process.
SHARE = {"cpu": 0.5, "mps": 0.5}
_OTHER_SHARE = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device has no memory left, in any device's words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every device's out-of-memory error into `torch.OutOfMemoryError`.

    Of several ranks, only some may run out of memory, and the others would wait for them: that ends the run.
    """
    try:
        with ranks.lost_ranks():
            yield
    except (MemoryError, RuntimeError) as error:
        if ranks.size() > 1 and is_out_of_memory(error):
            raise AbliterateError(
                "The device of one process is out of memory, and all processes need batches of one size; continue with "
                "--resume and a smaller --batch-size, or with more processes."
            ) from error
        if isinstance(error, torch.OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error) or "out of memory") from error


def unless_full(work: Callable[[], Result], device: torch.device) -> Result | None:
    """The result of `work`, which is never None; None if memory ran out, after freeing as much as possible."""
    try:
        with memory_errors():
            return work()
    except torch.OutOfMemoryError:
        pass
    # Outside the `except` block: inside it, the traceback keeps the tensors alive.
    clear_device_cache(device)
    return None


def clear_device_cache(device: torch.device) -> None:
    """Collect garbage, then return freed memory to the device or the system."""
    gc.collect()
    return_freed(device)


def return_freed(device: torch.device) -> None:
    """Return freed memory from the allocator's cache to the device or the system."""
    if device.type == "cpu":
        _trim_heap()
        return
    empty_cache = getattr(_backend(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, or on a CPU within this process's limits."""
    backend = _backend(device)
    own = min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroups())])
    if device.type == "mps":  # it shares the machine's memory
        # Not what the driver has allocated: of that, the allocator's cache is free for us.
        return min(own, int(backend.recommended_max_memory() - backend.current_allocated_memory()))
    device_memory = _mem_get_info(device)
    if device_memory is None:
        return own
    # Memory that the caching allocator has reserved and doesn't use is free for us.
    return int(device_memory[0] + backend.memory_reserved(device) - backend.memory_allocated(device))


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device, or on a CPU within this process's limits."""
    backend = _backend(device)
    if device.type == "mps":
        return int(backend.recommended_max_memory())
    device_memory = _mem_get_info(device)
    return (
        device_memory[1]
        if device_memory is not None
        else min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroups())])
    )


def _mem_get_info(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of an accelerator's own memory; None if it has none or doesn't report it."""
    mem_get_info = getattr(_backend(device), "mem_get_info", None)
    if device.type == "cpu" or mem_get_info is None:
        return None
    try:
        free, total = mem_get_info(device)
    except RuntimeError:  # Intel's integrated GPUs share the machine's memory
        return None
    return int(free), int(total)


def usable_memory(device: torch.device) -> int:
    """The part of `free_memory` that plans may count on; on several ranks rank 0's, so that all plan alike.

    Main memory is shared by the ranks of a machine, which all take theirs at the same time.
    """

    def usable() -> int:
        sharing = ranks.on_this_machine() if device.type == "cpu" else 1
        return int(SHARE.get(device.type, _OTHER_SHARE) * max(0, free_memory(device)) / sharing)

    return ranks.agree(usable)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type in ("cuda", "xpu"):
        _backend(device).synchronize(device)
    elif device.type != "cpu":
        _backend(device).synchronize()


def usable_on_all(devices: Iterable[torch.device], device: torch.device) -> int:
    """The usable bytes of the fullest of those `devices` that are of the same type as `device`, the model's own.

    It isn't known which of a model's devices needs most.
    """
    return min(map(usable_memory, {one for one in devices if one.type == device.type} or {device}))


def affordable(size: int, row_bytes: int, device: torch.device) -> int:
    """The number of rows, of `size`, that memory allows; at least 1.

    An accelerator with its own memory may always try all rows: if memory is short, it raises an error.
    """
    if device.type not in SHARE or row_bytes == 0 or size == 1:
        return size
    return max(1, min(size, usable_memory(device) // row_bytes))


class PeakMeter:
    """The peak memory use since the meter was made or restarted, independent of other meters' restarts.

    The system keeps one peak per process and one per device; only this class resets them. Except on Linux, the peak resident
    set can't be reset, so it counts from the start of the process.
    """

    _all: ClassVar[weakref.WeakSet[PeakMeter]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._rss = self._device = 0
        self.restart()
        PeakMeter._all.add(self)

    def restart(self) -> None:
        """Forget the peak up to now."""
        for meter in PeakMeter._all:
            meter._note()
        _forget_peaks()
        self._rss = self._device = 0

    def rss(self) -> int:
        """Peak resident set of the process in bytes."""
        self._note()
        return self._rss

    def device(self) -> int:
        """Peak bytes allocated on all devices of an accelerator; 0 on a CPU."""
        self._note()
        return self._device

    def _note(self) -> None:
        self._rss, self._device = max(self._rss, _peak_rss()), max(self._device, _peak_device())


def used_memory(device: torch.device) -> int:
    """Bytes in use now; `PeakMeter` measures the peak of the same quantity."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return _of_all_devices("memory_allocated")


def _backend(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _accelerator() -> Any:
    """The backend of the accelerator in use, or None. The query must not initialize an accelerator in a CPU run."""
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_initialized():
            return backend
    return None


@functools.cache
def _trim_function() -> Callable[[int], int] | None:
    """glibc's malloc_trim, without which it keeps freed memory; None on other systems, which have no such call."""
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (OSError, AttributeError, TypeError):
        return None


def _trim_heap() -> None:
    trim = _trim_function()
    if trim is not None:
        trim(0)


def _forget_peaks() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # this value resets the peak resident set
    accelerator = _accelerator()
    if accelerator is not None:
        for index in range(accelerator.device_count()):
            accelerator.reset_peak_memory_stats(index)


def _peak_rss() -> int:
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)
    # On Linux, getrusage includes the process before it became this program, and its peak can't be reset.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_device() -> int:
    return _of_all_devices("max_memory_allocated")


def _of_all_devices(statistic: str) -> int:
    """The sum over all devices of the accelerator in use, since a model may lie on several of them."""
    accelerator = _accelerator()
    return sum(getattr(accelerator, statistic)(index) for index in range(accelerator.device_count())) if accelerator else 0


def _cgroups(root: Path = CGROUPS, own: Path = OWN) -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group of this process with a memory limit; containers have one."""
    groups = []
    for folder, version in group_folders("memory", root, own):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
            groups.append((limit, used - _reclaimable(folder)))
    return groups


def _reclaimable(group: Path) -> int:
    """Bytes of inactive files in a control group's cache, which the kernel reclaims when memory is needed."""
    counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    # Version 1 counts the groups below separately.
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
