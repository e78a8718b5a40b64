"""Memory of the machine: what is free, what a piece of work took at most, and which errors mean that it ran out.

Knows devices, no models.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import psutil
import torch

Result = TypeVar("Result")

# How out-of-memory errors are worded where they have no class of their own: the CPU's allocator, MPS, XPU, cuBLAS.
_PHRASES = (
    *("out of memory", "can't allocate memory", "not enough memory", "invalid buffer size", "status_alloc_failed"),
    *("out_of_device_memory", "out_of_host_memory", "out_of_resources", "can't start new thread"),
)
# What may be used of what is free. An accelerator says no by an error; who uses the machine's memory meets its killer.
SHARE = {"cpu": 0.5, "mps": 0.5}
_OTHER_SHARE = 0.9


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is some device's way to say that it has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Every device's way to say that it has no memory left becomes `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except MemoryError as error:
        raise torch.OutOfMemoryError(str(error) or "out of memory") from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise


def unless_full(work: Callable[[], Result], device: torch.device) -> Result | None:
    """The result of `work`, which is never None; None if memory ran out, which is then freed as far as possible."""
    try:
        with memory_errors():
            return work()
    except torch.OutOfMemoryError:
        pass
    # Outside the `except` block: inside it the traceback keeps the tensors alive.
    clear_device_cache(device)
    return None


def clear_device_cache(device: torch.device) -> None:
    """Collect garbage, and return freed memory to the device or the system."""
    gc.collect()
    return_freed(device)


def return_freed(device: torch.device) -> None:
    """Return memory that was freed to the device or the system, which take it back only when told to."""
    if device.type == "cpu":
        _trim_heap()
        return
    empty_cache = getattr(_backend(device), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on the device, or of what this process may have of the machine's memory."""
    backend = _backend(device)
    own = min([psutil.virtual_memory().available, *(limit - used for limit, used in _cgroups())])
    if device.type == "mps":  # its memory is the machine's
        return min(own, int(backend.recommended_max_memory() - backend.driver_allocated_memory()))
    found = _mem_get_info(device)
    if found is None:
        return own
    # What the caching allocator holds and doesn't use is free for us.
    return int(found[0] + backend.memory_reserved(device) - backend.memory_allocated(device))


def total_memory(device: torch.device) -> int:
    """Bytes the device has, or this process may have of the machine's memory."""
    backend = _backend(device)
    if device.type == "mps":
        return int(backend.recommended_max_memory())
    found = _mem_get_info(device)
    return found[1] if found is not None else min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroups())])


def _mem_get_info(device: torch.device) -> tuple[int, int] | None:
    """(free, total) bytes of an accelerator with memory of its own; None where it has none, or doesn't tell."""
    asked = getattr(_backend(device), "mem_get_info", None)
    if device.type == "cpu" or asked is None:
        return None
    try:
        free, total = asked(device)
    except RuntimeError:  # Intel's integrated GPUs, whose memory is the machine's
        return None
    return int(free), int(total)


def usable_memory(device: torch.device) -> int:
    """The part of `free_memory` that work may be planned with."""
    return int(SHARE.get(device.type, _OTHER_SHARE) * max(0, free_memory(device)))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type in ("cuda", "xpu"):
        _backend(device).synchronize(device)
    elif device.type != "cpu":
        _backend(device).synchronize()


def affordable(size: int, row_bytes: int, device: torch.device) -> int:
    """As many of `size` rows as memory allows, at least one.

    An accelerator with memory of its own may be asked for all: it refuses by an error.
    """
    if device.type not in SHARE or row_bytes == 0 or size == 1:
        return size
    return max(1, min(size, usable_memory(device) // row_bytes))


class PeakMeter:
    """The most memory in use since it was made or told to `restart`, however often others restart theirs meanwhile.

    The system knows one peak of a process and one of a device; they are reset here only. Where it can't forget (the resident
    set, other than on Linux), the peak is that since the process began.
    """

    _all: ClassVar[weakref.WeakSet[PeakMeter]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._rss = self._device = 0
        self.restart()
        PeakMeter._all.add(self)

    def restart(self) -> None:
        """Forget the peak so far."""
        for meter in PeakMeter._all:
            meter._note()
        _forget_peaks()
        self._rss = self._device = 0

    def rss(self) -> int:
        """Peak resident set of the process, in bytes."""
        self._note()
        return self._rss

    def device(self) -> int:
        """Peak memory allocated on all devices of an accelerator, in bytes; 0 on a CPU."""
        self._note()
        return self._device

    def _note(self) -> None:
        self._rss, self._device = max(self._rss, _peak_rss()), max(self._device, _peak_device())


def used_memory(device: torch.device) -> int:
    """Bytes in use now, of what `PeakMeter` measures the peak of."""
    if device.type == "cpu":
        return int(psutil.Process().memory_info().rss)
    return _of_all_devices("memory_allocated")


def _backend(device: torch.device) -> Any:
    return getattr(torch, device.type, None)


def _accelerator() -> Any:
    """The backend of the accelerator in use; None where there is none. Asking must not initialize it, on a CPU run too."""
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_initialized():
            return backend
    return None


@functools.cache
def _trim_function() -> Callable[[int], int] | None:
    """glibc keeps freed memory for itself until told otherwise; other systems' libraries have no such call."""
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
        file.write("5")  # resets the peak resident set
    accelerator = _accelerator()
    if accelerator is not None:
        for index in range(accelerator.device_count()):
            accelerator.reset_peak_memory_stats(index)


def _peak_rss() -> int:
    if os.name == "nt":
        return int(psutil.Process().memory_info().peak_wset)
    # Linux' getrusage also knows what the process was before it became this program, and never forgets.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_device() -> int:
    return _of_all_devices("max_memory_allocated")


def _of_all_devices(what: str) -> int:
    """The sum over all devices of the accelerator in use: a model may lie on several of them."""
    accelerator = _accelerator()
    return sum(getattr(accelerator, what)(index) for index in range(accelerator.device_count())) if accelerator else 0


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group with a memory limit that this process is in; containers have one."""
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names, top = ("memory.limit_in_bytes", "memory.usage_in_bytes"), root / "memory"
        elif not controllers:
            names, top = ("memory.max", "memory.current"), root
        else:
            continue
        # In a container the group's own path is the root that is mounted; limits of the groups above count too.
        inner = top / path.lstrip("/")
        for folder in {top, *(part for part in (inner, *inner.parents) if part.is_relative_to(top))}:
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                found.append((limit, used - _reclaimable(folder)))
    return found


def _reclaimable(group: Path) -> int:
    """Bytes of files in a control group's cache that nobody has touched for a while: they give way."""
    counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    # Version 1 counts the groups below apart.
    return int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
