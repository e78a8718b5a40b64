"""Directions that explain most of the differences between harmful and harmless residuals: right singular vectors.

They are orthogonal, so each removes a part of its own. With as many harmful as harmless prompts, row i is
harmful_i − harmless_i, as for contrasting pairs (Zou et al. 2023, arXiv:2310.01405); otherwise harmful_i − mean(harmless).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from abliterate.directions.base import normalize_rows
from abliterate.directions.points import by_layer, singular

# Differences at the level of float32 rounding, relative to the residuals, have no direction.
_ROUNDING = 1e-6


class SingularVectors:
    """The right singular vectors of the differences, the largest singular value first, each towards harmful prompts."""

    name = "svd"
    count = 4

    def compute_several(self, harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
        pairs = zip(by_layer(harmful), by_layer(harmless), strict=True)
        return torch.stack([singular_vectors(bad, good, count) for bad, good in pairs]).float()


def singular_vectors(harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
    """(count, d_model) float64 of one layer's residuals (n, d_model); zeros where the differences have a smaller rank."""
    rows = harmful - (harmless if harmful.shape == harmless.shape else harmless.mean(dim=0))
    wide = rows.shape[0] <= rows.shape[1]
    values, found = singular(rows if wide else rows.T)
    found = found[:, values > _ROUNDING * harmful.norm()][:, :count].T
    vectors = normalize_rows(found @ rows) if wide else found
    vectors = vectors * torch.where(vectors @ rows.mean(dim=0) < 0, -1.0, 1.0)[:, None]
    return pad(vectors, (0, 0, 0, count - len(vectors)))
