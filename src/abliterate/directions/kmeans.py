"""Directions from the harmless mean to the centres of clusters of harmful residuals, which k-means finds in each layer.

A model that refuses different topics along different directions has no single one. Lloyd's algorithm from k-means++ starts
(Arthur and Vassilvitskii 2007).
"""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.directions.points import Points, by_layer, ranked

_SEED = 0
# The best of so many starts counts; Lloyd's algorithm alone often ends in a local minimum.
_STARTS, _MOST_STEPS = 10, 100


class KMeans:
    """The centres of `count` clusters, minus the harmless mean; the largest cluster's direction comes first."""

    name = "kmeans"
    count = 4

    def compute_several(self, harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
        found = []
        for bad, good in zip(by_layer(harmful), by_layer(harmless), strict=True):
            points = Points.of(bad)
            centres, sizes = k_means(points.outwards(), count, torch.Generator().manual_seed(_SEED))
            found.append(ranked(points.back(centres), sizes, good.mean(dim=0), count))
        return torch.stack(found).float()


def k_means(points: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres (count, r) of clusters of points (n, r) with the least sum of squared distances found, and the clusters' sizes.

    Where there are fewer different points than clusters, some clusters are empty.
    """
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(_STARTS):
        centres, labels = _settled(points, _spread(points, count, generator))
        cost = float((points - centres[labels]).square().sum())
        if best is None or cost < best[0]:
            best = (cost, centres, torch.bincount(labels, minlength=count))
    assert best is not None
    return best[1], best[2]


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Starts by k-means++: each next centre is a point drawn with probability ∝ its squared distance to those before it."""
    nearest = points.new_ones(len(points))
    chosen: list[int] = []
    for _ in range(count):
        weights = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        away = (points - points[chosen[-1]]).square().sum(dim=1)
        nearest = away if len(chosen) == 1 else torch.minimum(nearest, away)
    return points[chosen]


def _settled(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: (centres, each point's cluster) once no point changes its cluster."""
    labels = _nearest(points, centres)
    for _ in range(_MOST_STEPS):
        sizes = torch.bincount(labels, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
        before, labels = labels, _nearest(points, centres)
        if torch.equal(before, labels):
            break
    return centres, labels


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """The number of each point's nearest centre: ‖x − c‖² without the ‖x‖² that all centres share."""
    return (centres.square().sum(dim=1) - 2 * points @ centres.T).argmin(dim=1)
