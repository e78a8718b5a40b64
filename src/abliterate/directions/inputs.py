"""The inputs of a module to edit: what goes into it at the last position of training prompts, for edits computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A stranger's run file may hold any number of rows, and a decomposition takes their cube.
MOST_ROWS = 1024
_PREFIX = "inputs"


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """The inputs x of one module at the last position of harmful and of harmless prompts, each (n, d_in) float32.

    Raises:
        ValueError: they have no rows or too many, different widths, or entries that aren't finite.
    """

    harmful: Tensor
    harmless: Tensor

    def __post_init__(self) -> None:
        for rows in (self.harmful, self.harmless):
            if rows.ndim != 2 or not rows.numel() or len(rows) > MOST_ROWS or rows.dtype != torch.float32:
                raise ValueError(f"a module's inputs must be float32, of at most {MOST_ROWS} prompts, each a row")
            if not torch.isfinite(rows).all():
                raise ValueError("a module's inputs must be finite")
        if self.harmful.shape[1] != self.harmless.shape[1]:
            raise ValueError("a module's inputs must have the same width in both sets")

    @property
    def d_in(self) -> int:
        """The width of an input."""
        return self.harmful.shape[1]


def to_tensors(inputs: Mapping[str, ModuleInputs]) -> dict[str, Tensor]:
    """{module: inputs} as named tensors of a file; the inverse of `from_tensors`."""
    sets = {"harmful": lambda own: own.harmful, "harmless": lambda own: own.harmless}
    return {f"{_PREFIX}.{kind}.{name}": rows(own) for name, own in inputs.items() for kind, rows in sets.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, ModuleInputs]:
    """The inverse of `to_tensors`; KeyError or ValueError if a module's tensors aren't its inputs."""
    prefix = f"{_PREFIX}.harmful."
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    return {name: ModuleInputs(tensors[prefix + name], tensors[f"{_PREFIX}.harmless.{name}"]) for name in names}
