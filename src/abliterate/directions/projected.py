"""The mean difference without its component along the harmless mean (the default).

The edit leaves what harmless prompts have in common alone, so it disturbs harmless answers less (projected abliteration,
grimjim 2025: huggingface.co/blog/grimjim/projected-abliteration).
"""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import normalize_rows
from abliterate.directions.mean_difference import difference


class Projected:
    """d ← normalize(d − (d·h) h), h = normalize(mean(harmless))."""

    name = "projected"
    needs = "means"

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        unit, h = difference(harmful, harmless), normalize_rows(harmless)
        rest = unit - (unit * h).sum(dim=-1, keepdim=True) * h
        # A difference wholly along h leaves only rounding noise, which must become no direction rather than a random one.
        rest = rest.where(rest.norm(dim=-1, keepdim=True) > 1e-6, rest.new_zeros(()))
        return normalize_rows(rest).float()
