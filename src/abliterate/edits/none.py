"""`none`: ΔW = −λ v (vᵀW), plain directional ablation; row norms change. (Arditi et al. 2024, arXiv:2406.11717)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from abliterate.directions.base import Blend
from abliterate.edits.base import Factors, Prepared, project


class PlainAblation:
    """Rank 1: at λ = 1 nothing of v is written any more, vᵀW' = 0."""

    name = "none"

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """See `EditMethod.prepare`; `a` = DW."""
        weight = read_weight()
        a = project(directions, weight)
        unused = torch.zeros(0, dtype=torch.float64)
        return Prepared(directions.double(), a.float(), unused, unused, read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """See `EditMethod.factors`."""
        v, a = blend.of(prepared.directions), blend.of(prepared.a)
        b = (-coeff * v).float()[:, None]
        return Factors(None, a[..., None, :], b.expand(*a.shape[:-1], *b.shape))  # the same for every matrix of a stack

    def dense(self, weight: Tensor, v: Tensor, coeff: float) -> Tensor:
        """See `EditMethod.dense`."""
        return self.dense_rows(weight, v, self.along(weight, v), coeff)

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        """See `EditMethod.along`."""
        return v @ rows

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float) -> Tensor:
        """See `EditMethod.dense_rows`."""
        return rows - coeff * torch.outer(v, a)
