"""`pre`: ΔW = −λ (n∘v)(vᵀŴ), ablation of the row-normalized matrix, scaled back by the original row norms.

heretic's row normalization "pre": github.com/p-e-w/heretic/pull/52.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from abliterate.directions.base import Blend
from abliterate.edits.base import (
    EditMethod,
    Factors,
    Prepared,
    blended,
    one_after_another,
    project,
    removed,
    row_norms,
    safe_inverse,
)


class PreNormalized(EditMethod):
    """Rank 1: every row counts by its direction alone, so large rows don't dominate vᵀŴ."""

    name = "pre"
    reads_as = "none"

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """`a` = DŴ."""
        weight = read_weight()
        norms = row_norms(weight)
        a = project(directions, weight, safe_inverse(norms))
        return Prepared(directions.double(), a.float(), torch.zeros(0, dtype=torch.float64), norms, read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        v = blend.of(prepared.directions)
        return Factors(None, blend.of(prepared.a)[..., None, :], (-coeff * prepared.norms * v).float()[..., None])

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        v = blended(blends, prepared.directions)
        a = one_after_another(v, coeffs).to(prepared.a.dtype) @ blended(blends, prepared.a)
        return Factors(None, a, (-prepared.norms[..., None] * (coeffs[:, None] * v).T).float())

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return v @ (rows * safe_inverse(rows.norm(dim=1))[:, None])

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        return rows - removed(rows.norm(dim=1) * v, a, coeff)
