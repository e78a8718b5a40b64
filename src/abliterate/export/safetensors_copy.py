"""Copy safetensors checkpoints byte for byte and edit some matrices on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from abliterate.errors import AbliterateError

# The dtypes that can be edited; a tensor in any other dtype can only be copied.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2 << 20  # bytes copied at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHORTER = "A weight file became shorter while it was read; put the file back and repeat the command."

# Changes a stored tensor in place.
EditTensor = Callable[[Tensor], None]


class NotStreamable(Exception):
    """The reason why a checkpoint can't be edited file by file and must be loaded as a whole."""


@dataclass(frozen=True)
class Stored:
    """The position of a tensor in its file, in bytes from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Stored]:
    """{name: position} of the tensors of a safetensors file, in the order of the bytes.

    Raises:
        NotStreamable: the file has no valid header, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else {}
        begin = 8 + length
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            tensors[name] = Stored(entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise NotStreamable(f"{path.name} has no safetensors header") from error
    if max((stored.end for stored in tensors.values()), default=begin) > path.stat().st_size:
        raise NotStreamable(f"{path.name} is shorter than its header says")
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, as `transformers` would choose them.

    Raises:
        NotStreamable: there are no safetensors weights, or the index names missing files.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = [folder / name for name in shards_of(folder / INDEX)]
    if any(path.parent != folder or not path.is_file() for path in files):
        raise NotStreamable(f"{INDEX} names files that aren't there")
    return files


def shards_of(index: Path) -> list[str]:
    """The file names in an index; NotStreamable if it is missing or invalid."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotStreamable(f"there is neither {SINGLE} nor {INDEX}") from error


def check_dtype(name: str, stored: Stored, dtype: torch.dtype, dimensions: int = 0) -> None:
    """NotStreamable unless a tensor is stored in `dtype` and has the given number of dimensions (0: any number)."""
    if _FLOATS.get(stored.dtype) != dtype or (dimensions and len(stored.shape) != dimensions):
        raise NotStreamable(f"{name} is stored as {stored.dtype} of shape {stored.shape}")


def missing_bytes(files: list[Path], folder: Path) -> int:
    """The bytes that `folder` lacks of a copy of the files."""
    needed = sum(path.stat().st_size for path in files if not (folder / path.name).exists())
    return needed - sum(path.stat().st_size for path in folder.glob("*.part"))  # these files are overwritten


def check_room(needed: int, folder: Path) -> None:
    """AbliterateError if `needed` bytes don't fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AbliterateError(
            f"The export needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free on its disk; free some space, or "
            "choose another --out (a run continues with --resume)."
        )


def copy_edited(source: Path, target: Path, edits: Mapping[str, EditTensor], *, piece: int = _PIECE) -> None:
    """Copy a safetensors file; the tensors in `edits` are read, edited, and written at the same position in the same dtype.

    All other bytes, the header's included, are those of the source; `piece` of them are copied at a time. One tensor to edit is
    in memory at a time.
    """
    with source.open("rb") as old, target.open("wb") as new:
        for name, stored in read_header(source).items():
            if name in edits:
                _copy(old, new, stored.start - old.tell(), piece)
                data, tensor = _read(old, stored)
                edits[name](tensor)
                new.write(data)
        _copy(old, new, source.stat().st_size - old.tell(), piece)
        new.flush()
        os.fsync(new.fileno())  # after a crash, a file with its final name counts as finished


def read_matrix(path: Path, stored: Stored) -> Tensor:
    """One tensor of a safetensors file, in a dtype that `check_dtype` allows; it is in memory only once."""
    with path.open("rb") as file:
        file.seek(stored.start)
        return _read(file, stored)[1]


def _read(file: BinaryIO, stored: Stored) -> tuple[bytearray, Tensor]:
    """The bytes at the file's current position, and the tensor that they hold."""
    data = bytearray(stored.end - stored.start)
    if file.readinto(data) < len(data):  # type: ignore[attr-defined]
        raise AbliterateError(_SHORTER)
    tensor = torch.frombuffer(data, dtype=_FLOATS[stored.dtype]).view(stored.shape)
    assert tensor.numel() == math.prod(stored.shape)
    return data, tensor


def _copy(old: BinaryIO, new: BinaryIO, count: int, piece: int) -> None:
    while count > 0:
        data = old.read(min(count, piece))
        if not data:
            raise AbliterateError(_SHORTER)
        new.write(data)
        count -= len(data)
