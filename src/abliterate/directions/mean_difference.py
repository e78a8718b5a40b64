"""Difference of means: d = normalize(mean(harmful) − mean(harmless)) per layer (Arditi et al. 2024, arXiv:2406.11717)."""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import normalize_rows


def difference(harmful: Tensor, harmless: Tensor) -> tuple[Tensor, Tensor]:
    """Means in float64: (unit mean difference, harmless mean), each (n_layers+1, d_model).

    A difference at rounding level counts as zero: where prompts end alike (index 0) both means are equal up to
    float32 rounding, and normalizing that noise would make a random direction of it.
    """
    harmful_mean, harmless_mean = harmful.double().mean(dim=0), harmless.double().mean(dim=0)
    raw = harmful_mean - harmless_mean
    scale = harmful_mean.norm(dim=-1, keepdim=True) + harmless_mean.norm(dim=-1, keepdim=True)
    raw = raw.where(raw.norm(dim=-1, keepdim=True) > 1e-6 * scale, raw.new_zeros(()))
    return normalize_rows(raw), harmless_mean


class MeanDifference:
    """The plain mean difference."""

    name = "mean"

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        """See `DirectionMethod.compute`."""
        return difference(harmful, harmless)[0].float()
