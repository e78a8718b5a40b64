"""One layer's residuals as points in few coordinates, in which distances are the same and cheap to compute.

400 prompts span at most 399 dimensions, whatever the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from abliterate.directions.mean_difference import difference

# Beyond so many prompts, the decomposition of their Gram matrix costs more than it saves.
_FEW = 1024
# Smaller singular values, relative to the largest, are the rounding of a Gram matrix.
_ROUNDING = 1e-7


@dataclass(frozen=True)
class Points:
    """Residuals x_i = mean + places_i · basis.

    `mean` (d_model), `places` (n, r), `basis` (r, d_model) of orthonormal rows, all float64; `basis` is None where the places
    are the centred residuals themselves.
    """

    mean: Tensor
    places: Tensor
    basis: Tensor | None

    @staticmethod
    def of(residuals: Tensor) -> Points:
        """The points of one layer's residuals (n, d_model) float64."""
        mean = residuals.mean(dim=0)
        centred = residuals - mean
        if not len(centred) < min(_FEW, centred.shape[1]):
            return Points(mean, centred, None)
        values, vectors = singular(centred)
        inverse = torch.where(values > 0, 1 / values.clamp_min(1e-300), 0.0)
        return Points(mean, vectors * values, (vectors * inverse).T @ centred)

    def back(self, places: Tensor) -> Tensor:
        """Places (…, r) as residuals (…, d_model)."""
        return self.mean + (places if self.basis is None else places @ self.basis)

    def outwards(self) -> Tensor:
        """The places in the order of their distance to the mean, so that random choices don't depend on the prompts' order."""
        return self.places[self.places.norm(dim=1).argsort(stable=True)]


def singular(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (r), the largest first, and left singular vectors (n, r) of `rows` (n, d) float64, by their Gram matrix.

    Values at rounding level are 0. For a few hundred rows this takes a twentieth of the time of an SVD.
    """
    squares, vectors = torch.linalg.eigh(rows @ rows.T)
    values = squares.flip(0).clamp_min(0).sqrt()
    return values * (values > _ROUNDING * values[0]), vectors.flip(1)


def by_layer(residuals: Tensor) -> Iterator[Tensor]:
    """Each residual index's (n, d_model) in float64, on the CPU, from residuals (n, n_layers+1, d_model)."""
    for index in range(residuals.shape[1]):
        yield residuals[:, index].cpu().double()  # Apple's GPUs have no float64


def centre_difference(harmful: Tensor, harmless: Tensor, centre: Callable[[Tensor], Tensor]) -> Tensor:
    """The unit difference of both sets' centres in each layer, (n_layers+1, d_model) float32.

    `centre` gives the centre (d_model) of residuals (n, d_model).
    """
    pairs = zip(by_layer(harmful), by_layer(harmless), strict=True)
    return torch.stack([difference(centre(bad), centre(good)) for bad, good in pairs]).float()


def ranked(centres: Tensor, sizes: Tensor, harmless: Tensor, count: int) -> Tensor:
    """Directions (count, d_model) float64 from the harmless mean to centres (n, d_model), those of most prompts first.

    A centre without a prompt has no direction; zeros fill up what is missing.
    """
    found = difference(centres, harmless) * (sizes > 0)[:, None]
    order = sorted(range(len(sizes)), key=lambda place: (-int(sizes[place]), -float((centres[place] - harmless).norm())))
    return pad(found[order[:count]], (0, 0, 0, max(0, count - len(order))))
