"""`columns`: W' = (W − λ v cᵀ) diag(1/s), c = Wᵀv: ablation that keeps every column's norm.

Norm-preserving biprojected abliteration, grimjim 2025: huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration.
A column is what one input feature writes to the stream. To scale it changes its size and not its direction, so at λ = 1
vᵀW' = 0 stays true; where rows are scaled, a share of v comes back. Closed form: ‖W_j − λ c_j v‖² = ‖W_j‖² − (2λ − λ²) c_j²,
so with s_j = √(1 − (2λ − λ²) c_j²/‖W_j‖²), W' = W diag(1/s) − λ v (c/s)ᵀ, a column scale plus rank 1: a trial costs O(d).
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
    column_norms,
    column_scale,
    one_after_another,
    project,
    removed,
    safe_inverse,
)

# The share s of a column's norm below which the closed form is not used: the rounding of its float32 factors is divided by s.
DEGENERATE = 0.1


class ColumnPreserving(EditMethod):
    """Every column keeps its norm, but for those that lie along v and vanish at λ = 1."""

    name = "columns"
    reads_as = "columns"
    keeps_columns = True

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """`a` = DW in float64, since s is a difference of nearly equal terms; `norms` are those of the columns."""
        weight = read_weight()
        unused = torch.zeros(0, dtype=torch.float64)
        return Prepared(directions.double(), project(directions, weight), unused, column_norms(weight), read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        coeffs = torch.as_tensor(coeff, dtype=torch.float64, device=prepared.directions.device)
        return self.product(prepared, [blend], coeffs[None])

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        """Column j of Π_i (I − λ_i v_i v_iᵀ) W is W_j + Ba_j, B = −Vᵀ diag(λ), ‖·‖² = ‖W_j‖² + 2 W_jᵀBa_j + ‖Ba_j‖²."""
        v, along = blended(blends, prepared.directions), blended(blends, prepared.a)  # (k, d_out), (…, k, d_in)
        a, b = one_after_another(v, coeffs) @ along, -(coeffs[:, None] * v).T
        lost = (a * (2 * coeffs[:, None] * along - b.T @ b @ a)).sum(dim=-2)
        left = 1 - lost * safe_inverse(prepared.norms).square()  # s²; 1 for empty columns
        degenerate = left < DEGENERATE**2
        if degenerate.any() and a.ndim == 3:
            return Factors.stacked([self.product(matrix, blends, coeffs) for matrix in prepared.parts()])
        # Not `where` after `rsqrt`, whose gradient is infinite at 0.
        scale = torch.where(degenerate, 1.0, left).rsqrt().where(~degenerate, 0.0)
        b = b.expand(*a.shape[:-2], *b.shape)
        if not degenerate.any():
            return Factors(None, (a * scale[..., None, :]).float(), b.float(), scale.float())
        return _with_dense_columns(prepared, scale, a, b, degenerate.nonzero().flatten())

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return v @ rows

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        return rows - removed(v, a, coeff)


def _with_dense_columns(prepared: Prepared, scale: Tensor, a: Tensor, b: Tensor, columns: Tensor) -> Factors:
    """Factors of rank k + len(columns): each degenerate column j is written whole, as W'_j in a column of its own of b.

    `a` (k, d_in) and `b` (d_out, k) give the edit without its column scale.
    """
    weight = prepared.read_weight()[:, columns].double()
    edited = weight + b @ a[:, columns]
    whole = edited * column_scale(weight.square().sum(dim=0), edited.square().sum(dim=0))
    selector = torch.zeros(len(columns), a.shape[1], dtype=a.dtype, device=a.device)
    selector[torch.arange(len(columns), device=a.device), columns] = 1
    return Factors(None, torch.cat([a * scale, selector]).float(), torch.cat([b, whole], dim=1).float(), scale.float())
