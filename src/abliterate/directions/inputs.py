"""What edits that are computed from inputs know of a module: the inputs, or what is needed of them.

The inputs are those at the end of training prompts and along answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

# A stranger's run file may hold any number of rows, and a decomposition takes their cube.
MOST_ROWS = 1024
_PREFIX = "inputs"


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
        _check(self.harmful, self.harmless, *([] if self.along is None else [self.along]))

    @property
    def d_in(self) -> int:
        """The width of an input."""
        return self.harmful.shape[1]


@dataclass(frozen=True, eq=False)
class Keys:
    """K and C, each (k, d_in) float32, of an edit that takes what W writes along directions at keys: a = (vᵀW Kᵀ) C.

    They are all that such an edit needs of a module's inputs, in fewer rows. C is zero where the inputs allow no edit.

    Raises:
        ValueError: as for inputs.
    """

    keys: Tensor
    selector: Tensor

    def __post_init__(self) -> None:
        _check(self.keys, self.selector)
        if self.keys.shape != self.selector.shape:
            raise ValueError("a module's keys must be as many as the rows of C")

    @property
    def d_in(self) -> int:
        """The width of an input."""
        return self.keys.shape[1]


def _check(*sets: Tensor) -> None:
    for rows in sets:
        if rows.ndim != 2 or not rows.numel() or len(rows) > MOST_ROWS or rows.dtype != torch.float32:
            raise ValueError(f"a module's inputs must be float32, of at most {MOST_ROWS} rows")
        if not torch.isfinite(rows).all():
            raise ValueError("a module's inputs must be finite")
    if len({rows.shape[1] for rows in sets}) > 1:
        raise ValueError("a module's inputs must have the same width in all sets")


def to_tensors(inputs: Mapping[str, ModuleInputs | Keys]) -> dict[str, Tensor]:
    """{module: inputs} as named tensors of a file; the inverse of `from_tensors`."""
    parts = {(each.name, name): getattr(own, each.name) for name, own in inputs.items() for each in fields(own)}
    # In one order, because a hash of the tensors must not depend on where they come from.
    return {f"{_PREFIX}.{part}.{name}": rows for (part, name), rows in sorted(parts.items()) if rows is not None}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, ModuleInputs | Keys]:
    """The inverse of `to_tensors`; KeyError or ValueError if a module's tensors aren't its inputs."""

    def named(part: str) -> dict[str, Tensor]:
        prefix = f"{_PREFIX}.{part}."
        return {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}

    harmless, along, selectors = named("harmless"), named("along"), named("selector")
    found: dict[str, ModuleInputs | Keys] = {}
    for name, rows in named("harmful").items():
        found[name] = ModuleInputs(rows, harmless[name], along.get(name))
    return found | {name: Keys(rows, selectors[name]) for name, rows in named("keys").items()}
