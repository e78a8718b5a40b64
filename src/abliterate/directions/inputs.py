"""The inputs of a module to edit, at the end of training prompts and along answers, for edits that are computed from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# A stranger's run file may hold any number of rows, and a decomposition takes their cube.
MOST_ROWS = 1024
_PREFIX, _KINDS = "inputs", ("harmful", "harmless", "along")


@dataclass(frozen=True, eq=False)
class ModuleInputs:
    """The inputs x of one module at the last position of harmful and of harmless prompts, each (n, d_in) float32.

    `along` are those at the first tokens of the unedited model's answers to the harmless prompts, (n_tokens, d_in), if an edit
    needs them.

    Raises:
        ValueError: they have no rows or too many, different widths, or entries that aren't finite.
    """

    harmful: Tensor
    harmless: Tensor
    along: Tensor | None = None

    def __post_init__(self) -> None:
        sets = [self.harmful, self.harmless, *([] if self.along is None else [self.along])]
        for rows in sets:
            if rows.ndim != 2 or not rows.numel() or len(rows) > MOST_ROWS or rows.dtype != torch.float32:
                raise ValueError(f"a module's inputs must be float32, of at most {MOST_ROWS} rows")
            if not torch.isfinite(rows).all():
                raise ValueError("a module's inputs must be finite")
        if len({rows.shape[1] for rows in sets}) > 1:
            raise ValueError("a module's inputs must have the same width in all sets")

    @property
    def kept(self) -> Tensor:
        """All inputs that an edit is to leave alone, (n, d_in)."""
        return self.harmless if self.along is None else torch.cat([self.harmless, self.along])

    @property
    def d_in(self) -> int:
        """The width of an input."""
        return self.harmful.shape[1]


def to_tensors(inputs: Mapping[str, ModuleInputs]) -> dict[str, Tensor]:
    """{module: inputs} as named tensors of a file; the inverse of `from_tensors`."""
    sets = {(kind, name): getattr(own, kind) for name, own in inputs.items() for kind in _KINDS}
    return {f"{_PREFIX}.{kind}.{name}": rows for (kind, name), rows in sets.items() if rows is not None}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, ModuleInputs]:
    """The inverse of `to_tensors`; KeyError or ValueError if a module's tensors aren't its inputs."""
    prefix = f"{_PREFIX}.harmful."
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    harmless, along = (f"{_PREFIX}.{kind}." for kind in _KINDS[1:])
    return {name: ModuleInputs(tensors[prefix + name], tensors[harmless + name], tensors.get(along + name)) for name in names}
