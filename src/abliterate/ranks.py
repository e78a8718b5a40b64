"""Several processes carry out one run in lockstep, each with its shard of the model (tensor parallelism under `torchrun`).

Every rank takes every step, so passes meet. Whatever may differ between processes (files, clocks, free memory, signals) is
rank 0's, and `agree` gives it to all. In a process that hasn't joined others, `agree` is a plain call; torch isn't imported.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from abliterate.errors import AbliterateError, InputError, Interrupted, first_line

Value = TypeVar("Value")

# Seconds after which a rank that waits for another one gives up: rank 0 may write a large cache entry meanwhile.
TIMEOUT = 1800.0
# Seconds in which rank 0 can say why it ends.
GRACE = 5.0
# Phrases of the errors of gloo, NCCL and the store when another rank is gone or silent. Gloo names its source files.
_PHRASES = ("closed by peer", "connection reset", "broken pipe", "connection refused", "timed out", "timeout", "nccl", "/gloo/")
# The key in the ranks' store under which a rank leaves the reason why it ends.
_REASON = "abliterate/reason"

_size, _rank, _speaks = 1, 0, False


class Lost(AbliterateError):
    """Another rank has ended. What rank 0 had written stands."""


def launched() -> int:
    """The number of ranks that `torchrun` has started this process among; 1 without it."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if number.isdecimal() and int(number) > 1 and "RANK" in os.environ else 1


def is_silent() -> bool:
    """Whether this process leaves it to rank 0 to say how the command ends."""
    return launched() > 1 and os.environ["RANK"] != "0" and not _speaks


def size() -> int:
    """The number of ranks that work in lockstep with this process; 1 if it works alone."""
    return _size


def on_this_machine() -> int:
    """The number of those ranks that share this machine's main memory, as torchrun says."""
    return min(_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_first() -> bool:
    """Whether this process is rank 0, which owns files and terminal, or works alone."""
    return _rank == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Work in lockstep with the other ranks that `torchrun` has started, if it has, until `leave` or the end of the block.

    Raises:
        InputError: the ranks don't find each other. Lost: another rank has ended.
    """
    if launched() == 1:
        yield
        return
    _join()
    try:
        with lost_ranks():
            yield
    except Exception as error:
        _end(error)
        raise


def _join() -> None:
    import torch
    import torch.distributed as dist

    global _size, _rank
    options: dict[str, Any] = {"backend": "gloo"}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        _check_gpus(torch.cuda.device_count())
        torch.cuda.set_device(device)
        # Objects travel by gloo, tensors on a GPU by NCCL.
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    try:
        dist.init_process_group(timeout=timedelta(seconds=TIMEOUT), **options)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The processes that torchrun started don't find each other ({first_line(error)}); check --nnodes, --rdzv-endpoint "
            "and the network."
        ) from error
    _size, _rank = dist.get_world_size(), dist.get_rank()


def _check_gpus(found: int) -> None:
    """Raise InputError, on every rank of a machine, if it has fewer GPUs than ranks; the first of them says so."""
    global _speaks
    wanted = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if wanted > found:
        _speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        raise InputError(
            f"This machine has {found} GPUs, and torchrun started {wanted} processes on it; give a smaller --nproc-per-node."
        )


def leave() -> None:
    """Work alone from now on; all ranks call it at the same point. Rank 0 then writes what needs no other rank."""
    global _size
    if _size == 1:
        return
    import torch.distributed as dist

    with lost_ranks():
        dist.barrier()
    _size = 1
    dist.destroy_process_group()


def agree(work: Callable[[], Value]) -> Value:
    """Rank 0's result of `work`, which no other rank calls; an error of rank 0 is raised on every rank."""
    if _size == 1:
        return work()
    import torch.distributed as dist

    box: list[Any] = [None, None]
    failure: Exception | None = None
    if _rank == 0:
        try:
            box[0] = work()
        except Exception as error:
            failure = error
            box = [None, _portable(error)]
    with lost_ranks():
        dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise box[1]
    return box[0]  # type: ignore[no-any-return]


def _portable(error: Exception) -> Exception:
    """The same error for other ranks, which only end by it: its own class may not survive being sent."""
    if isinstance(error, Interrupted):
        return Interrupted(error.exit_code, str(error))
    kind = type(error) if type(error).__module__ == AbliterateError.__module__ else AbliterateError
    return kind(str(error))


class Owned:
    """Stands for an object of class `cls` that only rank 0 has: each method is carried out there, and all get its result.

    Methods named in `alone` concern rank 0 only: other ranks don't wait for them, and get a context manager that does nothing.
    """

    def __init__(self, cls: type, make: Callable[[], Any], alone: tuple[str, ...] = ()) -> None:
        self._cls, self._alone = cls, alone
        self._own: Any = None

        def keep() -> None:
            self._own = make()

        agree(keep)

    def __getattr__(self, name: str) -> Any:
        if isinstance(getattr(self._cls, name), property):
            return agree(lambda: getattr(self._own, name))
        if name in self._alone:
            return getattr(self._own, name) if is_first() else lambda *args, **kwargs: contextlib.nullcontext()
        return lambda *args, **kwargs: agree(lambda: getattr(self._own, name)(*args, **kwargs))


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn an error that means that another rank is gone into `Lost`, with the reason that it left."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise Lost(f"Another process of the run has ended ({_reason_of_other() or first_line(error)[:120]})") from error


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another rank is gone or silent."""
    text = str(error).lower()
    return _size > 1 and isinstance(error, RuntimeError) and any(phrase in text for phrase in _PHRASES)


def _end(error: Exception) -> None:
    """Leave the reason why this rank ends, unless another one has; if rank 0 is gone without a word, rank 1 speaks for it."""
    global _speaks
    with contextlib.suppress(Exception):
        if not isinstance(error, Lost) or _rank == 0:
            _store().compare_set(_REASON, "", f"rank {_rank}: {first_line(error)}")
    _speaks = _rank == 1 and isinstance(error, Lost) and not _reason_of_other(GRACE)


def _reason_of_other(seconds: float = 0.2) -> str:
    """The reason that the first rank that failed left; "" if none comes within some seconds, as after a kill."""
    with contextlib.suppress(Exception):
        store, end = _store(), time.monotonic() + seconds
        while not store.check([_REASON]):  # its own `wait` writes warnings to standard error
            if time.monotonic() > end:
                return ""
            time.sleep(0.05)
        return str(store.get(_REASON).decode())
    return ""


def _store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()
