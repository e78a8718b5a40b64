"""How far apart harmful and harmless residuals are, layer by layer: norms, cosines, separation and a projection for plots.

All of it is tensor math in float64. Separation and projection follow from the centred Gram matrix of one layer's points, so
the width of the model hardly affects the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Spread at the level of float32 rounding counts as no spread: where prompts end alike, all points of index 0 are the same.
_ROUNDING = 1e-6
# The ridge penalty as a share of the mean eigenvalue: it suffices for fewer prompts than features and blurs no class.
_RIDGE = 0.1


@dataclass(frozen=True)
class Separation:
    """How far apart the two sets are in one layer. Both numbers are None where its points don't differ.

    `silhouette`: mean over all points, in [−1, 1]. `probe`: share of points that a linear probe fitted without them gets right.
    """

    silhouette: float | None
    probe: float | None


@dataclass(frozen=True)
class Projection:
    """One layer's points on two principal axes, (n_harmful, 2) and (n_harmless, 2) float64, and the variance they explain."""

    harmful: Tensor
    harmless: Tensor
    explained: tuple[float, float]


class Sample:
    """At most `most` residuals of one set, copied as they pass, from prompts (`places`) evenly spaced over all `total`."""

    def __init__(self, total: int, most: int) -> None:
        count = min(total, most)
        self.places = [index * total // count for index in range(count)]
        self._sampled = set(self.places)
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, residuals: Tensor) -> Tensor:
        """Copy the sampled prompts among the next `residuals` (n_prompts, n_layers+1, d_model), and return `residuals`."""
        for row in range(len(residuals)):
            if self._seen in self._sampled:
                self._kept.append(residuals[row].detach().to("cpu", torch.float32, copy=True))
            self._seen += 1
        return residuals

    def residuals(self) -> Tensor | None:
        """The sample (n_kept, n_layers+1, d_model) float32; None if no residuals were added."""
        return torch.stack(self._kept) if self._kept else None


Kept = Mapping[str, Sample]  # by the name of the prompt set


def cosines(left: Tensor, right: Tensor) -> list[float | None]:
    """Cosines between the rows of two matrices (n, d); None where a row is zero."""
    left, right = left.double(), right.double()
    lengths = left.norm(dim=-1) * right.norm(dim=-1)
    values = ((left * right).sum(dim=-1) / lengths.clamp_min(1e-30)).clamp(-1, 1).tolist()
    return [value if length > 1e-12 else None for value, length in zip(values, lengths.tolist(), strict=True)]


def mean_geometry(harmful: Tensor, harmless: Tensor, directions: Tensor) -> list[dict[str, float | None]]:
    """Norms and cosines of two sets' means by residual index; all arguments are (n_layers+1, d_model)."""
    harmful, harmless = harmful.double().cpu(), harmless.double().cpu()
    columns: dict[str, list[float | None]] = {
        "norm_harmful": harmful.norm(dim=-1).tolist(),
        "norm_harmless": harmless.norm(dim=-1).tolist(),
        "norm_difference": (harmful - harmless).norm(dim=-1).tolist(),
        "cos_means": cosines(harmful, harmless),
        "cos_harmful_direction": cosines(harmful, directions.cpu()),
        "cos_harmless_direction": cosines(harmless, directions.cpu()),
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def layer_geometry(harmful: Tensor, harmless: Tensor) -> tuple[Separation, Projection]:
    """Separation and projection at one residual index, from points (n_harmful, d_model) and (n_harmless, d_model)."""
    gram, is_harmful = _centred_gram(harmful, harmless)
    if gram is None:
        return Separation(None, None), _split(torch.zeros(len(is_harmful), 2, dtype=torch.float64), len(harmful), (0.0, 0.0))
    separation = Separation(silhouette(gram, is_harmful), probe_accuracy(gram, is_harmful))
    coordinates, explained = principal(gram, is_harmful)
    return separation, _split(coordinates, len(harmful), explained)


def _centred_gram(harmful: Tensor, harmless: Tensor) -> tuple[Tensor | None, Tensor]:
    """The centred Gram matrix (n, n) of both sets' points, and which points are harmful (n); no matrix if they don't differ."""
    points = torch.cat([harmful, harmless]).double().cpu()
    is_harmful = torch.arange(len(points)) < len(harmful)
    size = float(points.square().sum(dim=-1).mean())
    centred = points - points.mean(dim=0)
    gram = centred @ centred.T
    alike = min(len(harmful), len(harmless)) < 2 or float(gram.trace()) <= len(points) * size * _ROUNDING**2
    return None if alike else gram, is_harmful


def silhouettes(harmful: Tensor, harmless: Tensor, check: Callable[[], None] = lambda: None) -> list[float | None]:
    """The silhouettes of `all_layers` alone, for a fraction of its cost."""
    found = []
    for index in range(harmful.shape[1]):
        check()
        gram, is_harmful = _centred_gram(harmful[:, index], harmless[:, index])
        found.append(None if gram is None else silhouette(gram, is_harmful))
    return found


def silhouette(gram: Tensor, is_first: Tensor) -> float:
    """Mean silhouette (Rousseeuw 1987) of two clusters, from their centred Gram matrix (n, n)."""
    squares = gram.diagonal()
    distances = (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0).sqrt()
    # A point's distance to itself is 0 by definition; computed from a Gram matrix it is the root of a rounding error.
    distances.fill_diagonal_(0)
    first, second = distances[:, is_first].sum(dim=1), distances[:, ~is_first].sum(dim=1)
    n_first, n_second = int(is_first.sum()), int((~is_first).sum())
    within = torch.where(is_first, first / (n_first - 1), second / (n_second - 1))
    between = torch.where(is_first, second / n_second, first / n_first)
    widest = torch.maximum(within, between)
    return float(((between - within) / widest.clamp_min(1e-30)).mean())


def probe_accuracy(gram: Tensor, is_first: Tensor, ridge: float = _RIDGE) -> float:
    """Leave-one-out accuracy of a ridge regression with intercept on labels ±1; both classes weigh the same in the result.

    Closed form: with the smoother's matrix H, the fit without point i predicts (ŷᵢ − hᵢᵢ yᵢ) / (1 − hᵢᵢ) for it.
    """
    n = len(gram)
    labels = torch.where(is_first, 1.0, -1.0).double()
    penalty = ridge * gram.trace() / n
    # The intercept isn't penalized: on centred points it is the mean of the labels.
    smoother = torch.linalg.solve(gram + penalty * torch.eye(n, dtype=gram.dtype), gram) + 1 / n
    leverage = smoother.diagonal()
    predicted = (smoother @ labels - leverage * labels) / (1 - leverage).clamp_min(1e-12)
    right = (predicted * labels > 0).double()
    return float((right[is_first].mean() + right[~is_first].mean()) / 2)


def principal(gram: Tensor, is_first: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Coordinates (n, 2) on the two principal axes, from the centred Gram matrix, and the shares of variance.

    Signs are fixed: the first set's mean lies to the right and, where the second axis separates the means, above.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-2:].flip(0).clamp_min(0), vectors[:, -2:].flip(1)
    coordinates = vectors * values.sqrt()
    offset = coordinates[is_first].mean(dim=0) - coordinates[~is_first].mean(dim=0)
    largest = coordinates.gather(0, coordinates.abs().argmax(dim=0, keepdim=True))[0]
    # Means that are equal up to rounding give no sign; the farthest point does.
    separates = offset.abs() > 1e-9 * largest.abs()
    signs = torch.where(separates, offset, largest).sign()
    explained = (values / gram.trace()).tolist()
    return coordinates * signs, (explained[0], explained[1])


def all_layers(
    harmful: Tensor, harmless: Tensor, check: Callable[[], None] = lambda: None
) -> list[tuple[Separation, Projection]]:
    """`layer_geometry` at every residual index of two sets (n_prompts, n_layers+1, d_model); `check` is called before each."""
    layers = []
    for index in range(harmful.shape[1]):
        check()
        layers.append(layer_geometry(harmful[:, index], harmless[:, index]))
    return layers


def rounded(value: float | None, digits: int = 5) -> float | None:
    """`value` to `digits` significant digits; None if it is None or not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _split(coordinates: Tensor, n_first: int, explained: tuple[float, float]) -> Projection:
    return Projection(coordinates[:n_first], coordinates[n_first:], explained)
