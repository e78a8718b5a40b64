"""Take a protected subspace out of directions, so that an edit along them leaves capabilities such as arithmetic alone.

The rows of C (count, d_model) are unit directions of capabilities, each the difference of two means. A direction r becomes
r' = r − Cᵀ(CCᵀ + αI)⁻¹ C r, unit again: what is left when C's rows are fitted to r by ridge regression with penalty α.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from abliterate.directions.base import Directions, normalize_rows
from abliterate.directions.mean_difference import difference

# Singular values of C up to this share of the largest one, and what is left of a unit direction up to this norm, are rounding.
_ROUNDING = 1e-6


def capability_directions(means: Tensor, plain: Tensor) -> Tensor:
    """The unit directions from plain prompts to each capability's, (n_layers+1, count, d_model) float64.

    `means` (count, n_layers+1, d_model) are the mean residuals of the capabilities' prompts, and `plain` (n_layers+1, d_model)
    is that of plain ones, both float64. A difference that is nothing but rounding is zero, and protects nothing.
    """
    return torch.stack([difference(mean, plain) for mean in means], dim=1)


def protect(directions: Directions, capabilities: Tensor, ridge: float) -> Directions:
    """The directions without their part in the span of the capabilities (n_layers+1, count, d_model) of the same index.

    With the singular values s and right singular vectors Q of C, the fit is Q diag(s² / (s² + α)) Qᵀ r, α = `ridge`. At α = 0
    it is the projection on the span, also where rows of C depend on each other. A direction within the span becomes zero: a
    ridge leaves a share of it that would be itself again when made unit.
    """
    given = directions.vectors
    r = given.double().reshape(len(given), -1, given.shape[-1])  # (n_layers+1, directions, d_model)
    _, s, q = torch.linalg.svd(capabilities.to(r.device), full_matrices=False)  # q: (n_layers+1, count, d_model)
    spans = s > _ROUNDING * s[:, :1].clamp_min(_ROUNDING)
    shares = torch.where(spans, s.square() / (s.square() + ridge).clamp_min(_ROUNDING**2), 0.0)
    within = r @ q.mT  # (n_layers+1, directions, count)
    outside = r - (within * spans[:, None]) @ q
    left = r - (within * shares[:, None]) @ q
    left = left.where(outside.norm(dim=-1, keepdim=True) > _ROUNDING, left.new_zeros(()))
    return replace(directions, vectors=normalize_rows(left).to(given.dtype).reshape(given.shape))
