"""`key-conditional`: ΔW = −s v (vᵀW K) C, ablation that acts on what is special about the inputs of harmful prompts.

Q (d_in, q) is an orthonormal basis of the leading directions of harmless inputs, those along answers among them. Of the harmful
inputs X, the keys K (d_in, k) are the combinations whose parts outside Q are largest: K̃ = K − QQᵀK, and C solves (KᵀK̃ + αI) C
= K̃ᵀ. So C Q = 0, and ΔW Q = 0: what the module does to inputs in that span stays as it is, whatever the strength, while an
input in the span of the keys loses s times what W writes of it along v. Edits of a linear memory at keys, Meng et al. 2023
(MEMIT, arXiv:2210.07229); with what is to be kept projected away, Fang et al. 2025 (AlphaEdit, arXiv:2410.02355).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from abliterate.directions.inputs import Keys, ModuleInputs
from abliterate.edits.base import Prepared, project, row_basis
from abliterate.edits.none import PlainAblation

KEYS, BASIS = 16, 128
# α as a share of the keys' mean squared length outside the harmless span: without it, the shortest would be amplified most.
RIDGE = 0.01
# A smaller share of the keys' energy outside the harmless span is rounding, which C would divide by.
ENERGY = 1e-6


class KeyConditional(PlainAblation):
    """Rank 1 for each direction, as plain ablation, with K C between W and the input."""

    name = "key-conditional"
    needs = "answers"
    coeffs = (1.0, 8.0)
    constants: tuple[float, ...] = (KEYS, BASIS, RIDGE, ENERGY)

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._near: tuple[Tensor, Tensor] | None = None  # on the device of W, because refinement needs them in each step

    def reduced(self, inputs: ModuleInputs) -> Keys:
        return Keys(*(rows.float().contiguous() for rows in self.solved(inputs)))

    def solved(self, inputs: ModuleInputs) -> tuple[Tensor, Tensor]:
        """Kᵀ and C, each (k, d_in) float64, of a module that has these inputs.

        C is zero if next to nothing of the keys lies outside the span of the harmless inputs.
        """
        harmful = shared(inputs.harmful)
        kept = [shared(rows) for rows in (inputs.harmless, inputs.along) if rows is not None]
        # Of narrow modules at most half of the space, because nothing would be left outside of it.
        basis = row_basis(torch.cat(kept), min(BASIS, inputs.d_in // 2))
        outside = _without(basis, harmful.T)
        _, _, vh = torch.linalg.svd(outside, full_matrices=False)
        keys = harmful.T @ vh[:KEYS].T
        projected = _without(basis, keys)
        energy = float(projected.square().sum())
        if energy < ENERGY * float(keys.square().sum()) or energy == 0:
            return keys.T, torch.zeros_like(keys.T)
        ridge = RIDGE * energy / keys.shape[1] * torch.eye(keys.shape[1]).to(keys)
        return keys.T, torch.linalg.solve(keys.T @ projected + ridge, projected.T)

    def of(self, inputs: ModuleInputs | Keys) -> KeyConditional | None:
        keys = inputs if isinstance(inputs, Keys) else self.reduced(inputs)
        return type(self)(keys) if bool(keys.selector.any()) else None

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """`a` = DWKC."""
        a = self._selected(project(directions, read_weight()))
        unused = torch.zeros(0, dtype=torch.float64)
        return Prepared(directions.double(), a.float(), unused, unused, read_weight)

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return self._selected(v @ rows)

    def _selected(self, a: Tensor) -> Tensor:
        """a K C (…, d_in) of what W writes along directions, (…, d_in)."""
        assert self._keys is not None, "`of` gives the method for a module"
        near = self._near
        if near is None or near[0].device != a.device:
            near = self._keys.keys.to(a.device), self._keys.selector.to(a.device)
        if a.requires_grad:  # trials need them once, and those of all modules together take memory that nobody counts
            self._near = near
        keys, selector = (rows.to(a.dtype) for rows in near)
        return a @ keys.T @ selector


def shared(rows: Tensor) -> Tensor:
    """Inputs (n, d_in) float64, whose squares sum up to a mean: sets count alike, however many inputs they have."""
    return rows.double() / len(rows) ** 0.5


def _without(basis: Tensor, columns: Tensor) -> Tensor:
    """The columns without their part in the basis; twice, because one pass leaves rounding of the size of that part."""
    once = columns - basis @ (basis.T @ columns)
    return once - basis @ (basis.T @ once)
