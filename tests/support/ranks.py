"""Several processes as `torchrun` starts them: each with its rank, and gloo between them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from support.forked import Forked, abliterate


def start(work: Callable[..., None], given: Sequence[Any], folder: Path, *, count: int = 2, **options: Any) -> list[Forked]:
    """`count` processes at `work`, the first one being rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    ranks: Mapping[int, dict[str, str]] = {rank: {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)}
    return [Forked(work, given, folder, environment=shared | own, **options) for own in ranks.values()]


def command(arguments: Sequence[object], folder: Path, **options: Any) -> list[Forked]:
    """One `abliterate` command on several ranks."""
    return start(abliterate, [[*map(str, arguments)]], folder, **options)


def finish(ranks: Sequence[Forked]) -> list[Forked]:
    """Wait for all; a failure shows what they wrote."""
    codes = [rank.end() for rank in ranks]
    assert not any(codes), "\n".join(f"rank {index} ({codes[index]}): {rank.err}" for index, rank in enumerate(ranks))
    return list(ranks)
