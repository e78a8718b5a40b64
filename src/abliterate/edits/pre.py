"""`pre`: ΔW = −λ (n∘v)(vᵀŴ), ablation of the row-normalized matrix, scaled back by the original row norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from abliterate.directions.base import Blend
from abliterate.edits.base import Factors, Prepared, project, row_norms, safe_inverse


class PreNormalized:
    """Rank 1: rows are compared by direction only, so large rows don't dominate vᵀŴ."""

    name = "pre"

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """See `EditMethod.prepare`; `a` = DŴ."""
        weight = read_weight()
        norms = row_norms(weight)
        a = project(directions, weight, safe_inverse(norms))
        return Prepared(directions.double(), a.float(), torch.zeros(0, dtype=torch.float64), norms, read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """See `EditMethod.factors`."""
        v = blend.of(prepared.directions)
        return Factors(None, blend.of(prepared.a)[..., None, :], (-coeff * prepared.norms * v).float()[..., None])

    def dense(self, weight: Tensor, v: Tensor, coeff: float) -> Tensor:
        """See `EditMethod.dense`."""
        return self.dense_rows(weight, v, self.along(weight, v), coeff)

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        """See `EditMethod.along`."""
        return v @ (rows * safe_inverse(rows.norm(dim=1))[:, None])

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float) -> Tensor:
        """See `EditMethod.dense_rows`."""
        return rows - coeff * torch.outer(rows.norm(dim=1) * v, a)
