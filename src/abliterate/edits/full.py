"""`full`: W' = n ∘ rownormalize(Ŵ − λ v aᵀ), a = Ŵᵀv: ablation that keeps every row's norm.

Norm-preserving abliteration, grimjim 2025: huggingface.co/blog/grimjim/norm-preserving-biprojected-abliteration.
Closed form (docs/design.md §4): with p = Ŵa, q = a·a, s = √(1 − 2λ v∘p + λ² q v∘v),
ΔW = diag(1/s − 1) W − (n λ v / s) aᵀ, a row scale plus rank 1. So a trial costs O(d), not O(d·d_in).
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
    project_back,
    removed,
    row_norms,
    safe_inverse,
)

# Norm of Ŵᵢ − λ vᵢ a (1 before the edit) below which the closed form is not used: it divides the float32 rounding of its
# factors by s, so a row's relative error is 1e-7 / s. At λ = 1 this means about vᵢ > 0.995, so one row at most in practice.
DEGENERATE = 0.1


class NormPreserving(EditMethod):
    """Every row keeps its norm; rows of norm 0 stay 0."""

    name = "full"
    reads_as = "columns"

    def prepare(self, read_weight: Callable[[], Tensor], directions: Tensor) -> Prepared:
        """`a` = DŴ, `p` = DŴŴᵀ. p stays float64: s is a difference of nearly equal terms."""
        weight = read_weight()
        norms = row_norms(weight)
        inverse = safe_inverse(norms)
        a = project(directions, weight, inverse)
        p = project_back(a, weight, inverse)
        return Prepared(directions.double(), a.float(), p, norms, read_weight)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        """The few degenerate rows (nearly one-hot v) are added as dense rows of `a`."""
        v, a, p = blend.of(prepared.directions), blend.of(prepared.a), blend.of(prepared.p)
        q = (p @ v)[..., None]
        s = (1 - 2 * coeff * v * p + coeff**2 * q * v * v).clamp_min(0).sqrt()
        empty = prepared.norms == 0
        degenerate = (s < DEGENERATE) & ~empty
        s = torch.where(empty | degenerate, torch.ones_like(s), s)
        scale = torch.where(degenerate, torch.zeros_like(s), 1 / s)
        b = torch.where(degenerate, torch.zeros_like(s), -coeff * prepared.norms * v / s)
        if not degenerate.any():
            return Factors(scale.float(), a[..., None, :], b.float()[..., None])
        if a.ndim == 2:
            return Factors.stacked([self.factors(matrix, blend, coeff) for matrix in prepared.parts()])
        one = torch.as_tensor(coeff, dtype=v.dtype, device=v.device)[None]  # with the gradient that refinement needs
        return _with_dense_rows(prepared, scale, a[None], b[:, None], v[None], one, degenerate.nonzero().flatten())

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        """Row i of Π_j (I − λ_j v_j v_jᵀ) Ŵ is Ŵᵢ + bᵢA, of squared norm 1 + 2 bᵢ·(ŴAᵀ)ᵢ + bᵢ(AAᵀ)bᵢ: O(k²) a row."""
        v = blended(blends, prepared.directions)
        successive = one_after_another(v, coeffs)
        a, p = successive.to(prepared.a.dtype) @ blended(blends, prepared.a), successive @ blended(blends, prepared.p)
        gram = p @ v.T @ successive.T  # AAᵀ (…, k, k)
        b = -(coeffs[:, None] * v).T
        s = (1 + 2 * (b * p.transpose(-1, -2)).sum(dim=-1) + ((b @ gram) * b).sum(dim=-1)).clamp_min(0).sqrt()
        empty = prepared.norms == 0
        degenerate = (s < DEGENERATE) & ~empty
        if degenerate.any() and a.ndim == 3:
            return Factors.stacked([self.product(matrix, blends, coeffs) for matrix in prepared.parts()])
        s = torch.where(empty | degenerate, torch.ones_like(s), s)
        scale = torch.where(degenerate, torch.zeros_like(s), 1 / s)
        b = torch.where(degenerate[..., None], torch.zeros_like(b), prepared.norms[..., None] * b / s[..., None])
        if not degenerate.any():
            return Factors(scale.float(), a, b.float())
        return _with_dense_rows(prepared, scale, a, b, v, coeffs, degenerate.nonzero().flatten())

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return v @ (rows * safe_inverse(rows.norm(dim=1))[:, None])

    def dense_rows(self, rows: Tensor, v: Tensor, a: Tensor, coeff: float | Tensor) -> Tensor:
        norms = rows.norm(dim=1)
        edited = rows * safe_inverse(norms)[:, None] - removed(v, a, coeff)
        return norms[:, None] * torch.nn.functional.normalize(edited, dim=1)


def _with_dense_rows(
    prepared: Prepared, scale: Tensor, a: Tensor, b: Tensor, v: Tensor, coeffs: Tensor, rows: Tensor
) -> Factors:
    """Factors of rank k + len(rows): each degenerate row i is written whole, as W'ᵢ in a column of its own of b and a.

    `a` (k, d_in), `b` (d_out, k), `v` (k, d_out), `coeffs` (k). a is recomputed in float64: its float32 rounding would drown
    Ŵᵢ − λ vᵢ a, which is small here.
    """
    norms = prepared.norms[rows]
    weight = prepared.read_weight()
    unit = weight[rows].double() * safe_inverse(norms)[:, None]
    precise = one_after_another(v, coeffs) @ project(v, weight, safe_inverse(prepared.norms))
    edited = unit - (coeffs[:, None] * v[:, rows]).T @ precise
    whole = norms[:, None] * torch.nn.functional.normalize(edited, dim=1)
    selector = torch.zeros(len(b), len(rows), dtype=b.dtype, device=b.device)
    selector[rows, torch.arange(len(rows), device=b.device)] = 1
    return Factors(scale.float(), torch.cat([a, whole.float()]), torch.cat([b, selector], dim=1).float())
