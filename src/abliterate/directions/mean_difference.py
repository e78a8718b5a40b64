"""Difference of means: d = normalize(mean(harmful) − mean(harmless)) per layer (Arditi et al. 2024, arXiv:2406.11717)."""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import normalize_rows


def difference(harmful: Tensor, harmless: Tensor) -> Tensor:
    """The unit difference of two means (n_layers+1, d_model) float64.

    A difference at rounding level counts as zero: where prompts end alike (index 0) both means are equal up to
    float32 rounding, and normalizing that noise would turn it into a random direction.
    """
    raw = harmful - harmless
    scale = harmful.norm(dim=-1, keepdim=True) + harmless.norm(dim=-1, keepdim=True)
    return normalize_rows(raw.where(raw.norm(dim=-1, keepdim=True) > 1e-6 * scale, raw.new_zeros(())))


class MeanDifference:
    """The plain mean difference."""

    name = "mean"
    needs = "means"

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        return difference(harmful, harmless).float()
