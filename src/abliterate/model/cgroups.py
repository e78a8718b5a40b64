"""The control groups of this process, by which containers limit memory and cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def group_folders(controller: str, root: Path = CGROUPS, own: Path = OWN) -> Iterator[tuple[Path, Literal[1, 2]]]:
    """(folder, version) of every group of this process that may limit `controller`, and of the groups above it.

    In a container, the group's own path is the mounted root.
    """
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version: Literal[1, 2] = 1
        if controller in controllers.split(","):
            top = root / controller
        elif not controllers:
            version, top = 2, root
        else:
            continue
        inner = top / path.lstrip("/")
        for folder in {top, *(parent for parent in (inner, *inner.parents) if parent.is_relative_to(top))}:
            yield folder, version
