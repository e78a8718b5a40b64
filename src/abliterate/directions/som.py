"""Directions from the harmless mean to the neurons of a self-organizing map of the harmful residuals of each layer.

Piras et al. 2025, "SOM directions are better than one" (arXiv:2511.08379): refusal lies on a surface, and the map follows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from abliterate.directions.points import Points, by_layer, ranked

_SEED = 0
_SIDE, _RATE, _SIGMA = 4, 0.01, 0.33
# Layers are trained together as far as their points fit into so many bytes: a step of one layer is mostly overhead.
_TOGETHER = 256 << 20


@dataclass(frozen=True)
class SelfOrganizingMap:
    """A map of 4 × 4 neurons, minus the harmless mean; the neuron that is nearest to most prompts comes first."""

    steps: int = 10_000
    name: ClassVar[str] = "som"
    count: ClassVar[int] = 4
    most: ClassVar[int] = _SIDE**2

    def compute_several(self, harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
        layers = [Points.of(bad) for bad in by_layer(harmful)]
        size = max(1, _TOGETHER // layers[0].places.nbytes)
        parts = [layers[start : start + size] for start in range(0, len(layers), size)]
        neurons = torch.cat([trained(torch.stack([points.outwards() for points in part]), self.steps) for part in parts])
        found = []
        for points, own, good in zip(layers, neurons, by_layer(harmless), strict=True):
            wins = torch.bincount(torch.cdist(points.places, own).argmin(dim=1), minlength=self.most)
            found.append(ranked(points.back(own), wins, good.mean(dim=0), count))
        return torch.stack(found).float()


def trained(points: Tensor, steps: int) -> Tensor:
    """The neurons (layers, 16, r) after `steps` of a map of the points (layers, n, r) of several layers.

    Each step draws a point x, and neuron j at m_j moves by η exp(−|j − w|²/2σ²) (x − m_j), where w is the neuron nearest to x
    and |j − w| their distance in the grid (Kohonen 1990). η and σ both shrink to a third, as 1 / (1 + 2t/T). Neurons begin at
    random points.
    """
    generator = torch.Generator().manual_seed(_SEED)
    grid = torch.cartesian_prod(*[torch.arange(_SIDE, dtype=points.dtype)] * 2)
    apart = torch.cdist(grid, grid).square()
    starts = torch.randperm(points.shape[1], generator=generator)
    neurons = points[:, starts[torch.arange(_SIDE**2) % len(starts)]].clone()
    lengths = neurons.square().sum(dim=2)
    for step, index in enumerate(torch.randint(points.shape[1], (steps,), generator=generator).tolist()):
        x, shrunk = points[:, index], 1 / (1 + 2 * step / steps)
        along = (neurons @ x[:, :, None])[..., 0]
        nearest = (lengths - 2 * along).argmin(dim=1)  # ‖x − m‖² without ‖x‖²
        pull = _RATE * shrunk * torch.exp(apart / (-2 * (_SIGMA * shrunk) ** 2))[nearest]
        neurons.lerp_(x[:, None], pull[:, :, None])
        # The squared norms of the moved neurons, which need not be read again.
        lengths = (1 - pull) ** 2 * lengths + 2 * pull * (1 - pull) * along + pull**2 * x.square().sum(dim=1, keepdim=True)
    return neurons
