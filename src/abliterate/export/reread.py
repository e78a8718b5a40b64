"""Exports read back from disk: what each matrix is now, and whether all else is the base's. Knows no trials and no edits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from abliterate.export.shards import INDEX, SINGLE, read_header
from abliterate.export.source import Matrices, digests
from abliterate.model.architectures import Target
from abliterate.model.checkpoint import load_weights

if TYPE_CHECKING:
    from abliterate.export.base import ExportJob

_PIECE = 1 << 20  # bytes compared at a time

# Some rows of an exported W' (n, d_in), float64.
Rows = Callable[[slice], Tensor]


class Reread(Protocol):
    """An export's matrices. `dtype`: what they were rounded to when they were written."""

    dtype: torch.dtype

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        """W' of one matrix of a target as a function of the rows wanted, given the base's `weight` (d_out, d_in)."""

    def untouched(self) -> bool:
        """Whether whatever isn't edited is the base's."""


class RereadMerged:
    """A model directory: its own weight files, compared with the base's byte by byte where they were streamed."""

    def __init__(self, folder: Path, job: ExportJob, base: Matrices) -> None:
        self._folder, self._base, self._edited = folder, base, base.tensors(job.factors)
        if base.whole is not None:  # never two models
            base.let_go()
        self._out = Matrices(str(folder), job.load.model_copy(update={"revision": ""}), job.architecture)
        self.dtype = self._out.dtype

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        """See `Reread.rows`."""
        matrix = self._out.matrix(self._out.targets[target.name], index)
        return lambda rows: matrix[rows].double()

    def untouched(self) -> bool:
        """See `Reread.untouched`."""
        base = self._base.digests
        if base:
            found = digests(
                self._out.whole or load_weights(str(self._folder), self._out.load, self._out.config, self.dtype, None)
            )
            return found.keys() == base.keys() and all(found[name] == base[name] for name in base if name not in self._edited)
        files = self._base.files
        plain = ["config.json"] if files[0].name == SINGLE else ["config.json", INDEX]
        return all(_same_bytes(path, self._folder / path.name, self._edited) for path in files) and all(
            (files[0].parent / name).read_bytes() == (self._folder / name).read_bytes() for name in plain
        )


class RereadAdapter:
    """An adapter directory: what PEFT makes of it, m ∘ rownormalize(W + BA), or W + BA where it isn't DoRA."""

    dtype = torch.float32

    def __init__(self, folder: Path, base: Matrices) -> None:
        self._tensors = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self._scaling, self._dora = config["lora_alpha"] / config["r"], bool(config["use_dora"])
        self._modules = set(config["target_modules"])

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        """See `Reread.rows`; what has an adapter has one matrix."""
        if target.name not in self._modules:
            return lambda rows: weight[rows].double()
        parts = ("lora_A.weight", "lora_B.weight") + (("lora_magnitude_vector",) if self._dora else ())
        a, b, *magnitude = (self._tensors[f"base_model.model.{target.name}.{part}"].double() for part in parts)

        def edited(rows: slice) -> Tensor:
            direction = weight[rows].double() + self._scaling * b[rows] @ a
            if not self._dora:
                return direction
            return magnitude[0][rows, None] * direction / direction.norm(dim=1, keepdim=True)

        return edited

    def untouched(self) -> bool:
        """See `Reread.untouched`: it has tensors for the modules that it names, and no others."""
        parts = ("lora_A.weight", "lora_B.weight") + (("lora_magnitude_vector",) if self._dora else ())
        return set(self._tensors) == {f"base_model.model.{name}.{part}" for name in self._modules for part in parts}


def _same_bytes(base: Path, export: Path, edited: set[str]) -> bool:
    """Whether two safetensors files are equal but for the bytes of the `edited` tensors."""
    if export.stat().st_size != base.stat().st_size:
        return False
    with base.open("rb") as old, export.open("rb") as new:
        for name, stored in read_header(base).items():
            if name in edited:
                if not _equal(old, new, stored.start - old.tell()):
                    return False
                old.seek(stored.end)
                new.seek(stored.end)
        return _equal(old, new, base.stat().st_size - old.tell())


def _equal(old: BinaryIO, new: BinaryIO, count: int) -> bool:
    while count > 0:
        piece = old.read(min(count, _PIECE))
        if not piece or piece != new.read(len(piece)):
            return False
        count -= len(piece)
    return True
