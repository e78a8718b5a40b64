"""The `Directions` value, the only place that knows about the index offset, and the seam for direction methods.

Residual index 0 is the embedding, index l+1 the output of layer l; `Directions` speaks of layers. Most methods need only the
means of residuals, which `ResidualMeans` accumulates in the memory of one prompt's residuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class DirectionMethod(Protocol):
    """Computes one unit vector (or zero) per residual index from the two prompt sets' residuals.

    A method receives all residuals. If it declares the class attribute `needs = "means"`, it receives only their means, and
    large prompt sets are never held in memory.
    """

    name: str

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        """Directions (n_layers+1, d_model) float32 from winsorized residuals, each (n_prompts, n_layers+1, d_model) float32.

        A method that needs "means" receives the two means instead, each (n_layers+1, d_model) float64.
        """


def needs_means(method: DirectionMethod) -> bool:
    """Whether a method needs only the residuals' means."""
    return getattr(method, "needs", "residuals") == "means"


@dataclass(frozen=True)
class Blend:
    """A unit direction as a linear combination of prepared layers' directions: v = Σ weights[k] · d[layers[k]].

    A zero direction has no layers. Any quantity that is linear in v can be blended with the same weights.
    """

    layers: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_zero(self) -> bool:
        """Whether the direction is zero, so that there is no edit."""
        return not self.layers

    def of(self, table: Tensor) -> Tensor:
        """`table` (n_layers, …) → Σ weights[k] · table[layers[k]], (…) in the table's dtype."""
        rows = table[list(self.layers)]
        weights = torch.tensor(self.weights, dtype=table.dtype, device=table.device)
        return (weights @ rows.flatten(1)).view(rows.shape[1:])


@dataclass(frozen=True)
class Directions:
    """`vectors` (n_layers+1, d_model) float32: a unit vector, or zero, for each residual index."""

    vectors: Tensor

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or not torch.isfinite(self.vectors).all():
            raise ValueError("directions must be a finite (n_layers+1, d_model) tensor")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers: one less than `vectors` has rows."""
        return self.vectors.shape[0] - 1

    def by_layer(self) -> Tensor:
        """(n_layers, d_model): row l is the direction of layer l's output."""
        return self.vectors[1:]

    def blend(self, x: float) -> Blend:
        """The direction at layer position `x` ∈ [0, n_layers−1], between two neighbours, renormalized.

        Source: docs/design.md §4; linear interpolation as in heretic, with the norm taken in float64.
        """
        if not 0 <= x <= self.n_layers - 1:
            raise ValueError(f"direction index {x} is outside [0, {self.n_layers - 1}]")
        low = min(math.floor(x), self.n_layers - 1)
        high = min(low + 1, self.n_layers - 1)
        t = x - low
        pairs = [(low, 1.0 - t), (high, t)] if t > 0 else [(low, 1.0)]
        mixed = torch.stack([weight * self.by_layer()[layer].double() for layer, weight in pairs]).sum(dim=0)
        norm = float(mixed.norm())
        if norm < 1e-12:
            return Blend((), ())
        return Blend(tuple(layer for layer, _ in pairs), tuple(weight / norm for _, weight in pairs))

    def at(self, x: float) -> Tensor:
        """`blend(x)` as a vector (d_model) float32, of norm 1 or zero."""
        blend = self.blend(x)
        if blend.is_zero:
            return torch.zeros_like(self.vectors[0])
        return blend.of(self.by_layer().double()).float()


def winsorize(residuals: Tensor, quantile: float) -> Tensor:
    """Clamp each prompt's and layer's vector to ± its `quantile` of |x|; (…, d_model) → same shape.

    This tames the few massive activations that would dominate a mean. `quantile` 1 changes nothing.
    """
    if quantile >= 1.0:
        return residuals
    # kthvalue and not torch.quantile, whose input is limited to 2^24 elements.
    d_model = residuals.shape[-1]
    k = max(1, math.ceil(quantile * d_model))
    limit = residuals.abs().kthvalue(k, dim=-1, keepdim=True).values
    return torch.maximum(torch.minimum(residuals, limit), -limit)


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1; rows that are zero up to rounding become zero. (n, d) → (n, d)."""
    norms = rows.norm(dim=-1, keepdim=True)
    return torch.where(norms > 1e-12, rows / norms.clamp_min(1e-12), torch.zeros_like(rows))


class ResidualMeans:
    """A running float64 sum of residuals, each prompt's and layer's vector winsorized at `quantile`.

    Prompts are added one by one, so the mean has the same bits however they are split into batches.
    """

    def __init__(self, quantile: float = 1.0) -> None:
        self.count = 0
        self._quantile = quantile
        self._sum: Tensor | None = None  # (n_layers+1, d_model) float64

    def add(self, residuals: Tensor) -> None:
        """Add `residuals` (n_prompts, n_layers+1, d_model) to the sum without keeping them."""
        for prompt in residuals:
            if self._sum is None:
                # Apple's GPUs have no float64.
                device = "cpu" if prompt.device.type == "mps" else prompt.device
                self._sum = torch.zeros(prompt.shape, dtype=torch.float64, device=device)
            self._sum += winsorize(prompt, self._quantile).to(self._sum.device)
        self.count += len(residuals)

    def mean(self) -> Tensor:
        """The mean (n_layers+1, d_model) float64.

        Raises:
            ValueError: no residuals were added.
        """
        if self._sum is None:
            raise ValueError("there is no mean of no residuals")
        return self._sum / self.count
