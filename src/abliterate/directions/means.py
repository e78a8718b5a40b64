"""Means of residuals, a batch at a time: what most direction methods need, in the memory of one prompt's residuals.

Pure tensor math; knows neither models nor caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.directions.base import winsorize


class ResidualMeans:
    """A float64 running sum of residuals, each winsorized at `quantile` by prompt and layer.

    Prompts are added one after the other, so the mean has the same bits however they are cut into batches.
    """

    def __init__(self, quantile: float = 1.0) -> None:
        self.count = 0
        self._quantile = quantile
        self._sum: Tensor | None = None  # (n_layers+1, d_model) float64

    def add(self, residuals: Tensor) -> None:
        """Take `residuals` (n_prompts, n_layers+1, d_model); nothing of them is kept."""
        for one in residuals:
            if self._sum is None:
                # Apple's GPUs have no float64.
                device = "cpu" if one.device.type == "mps" else one.device
                self._sum = torch.zeros(one.shape, dtype=torch.float64, device=device)
            self._sum += winsorize(one, self._quantile).to(self._sum.device)
        self.count += len(residuals)

    def mean(self) -> Tensor:
        """(n_layers+1, d_model) float64.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("there is no mean of no residuals")
        return self._sum / self.count
