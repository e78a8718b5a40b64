"""`none`: ΔW = −λ v (vᵀW), plain directional ablation, which changes row norms (Arditi et al. 2024, arXiv:2406.11717)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abliterate.directions.base import Blend
from abliterate.edits.base import EditMethod, Factors, Prepared, blended, one_after_another, project, removed


class PlainAblation(EditMethod):
    """Rank 1: at λ = 1 the module no longer writes along v, vᵀW' = 0."""

    name = "none"
    reads_as = "none"

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """`a` = DW."""
        weight = read_weight()
        a = project(directions, weight)
        unused = torch.zeros(0, dtype=torch.float64)
        return Prepared(directions.double(), a.float(), unused, unused, read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        v, a = blend.of(prepared.directions), blend.of(prepared.a)
        b = (-coeff * v).float()[:, None]
        return Factors(None, a[..., None, :], b.expand(*a.shape[:-1], *b.shape))  # the same b for every expert

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        v = blended(blends, prepared.directions)
        a = one_after_another(v, coeffs).to(prepared.a.dtype) @ blended(blends, prepared.a)
        b = -(coeffs[:, None] * v).T.float()
        return Factors(None, a, b.expand(*a.shape[:-2], *b.shape))

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return v @ rows

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        return rows - removed(v, a, coeff)
