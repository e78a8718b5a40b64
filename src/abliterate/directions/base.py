"""The `Directions` value, the only place that knows about the index offset, and the seam for direction methods.

Residual index 0 is the embedding, index l+1 the output of layer l; `Directions` speaks of layers. Most methods need only the
means of residuals, which `ResidualMeans` accumulates in the memory of one prompt's residuals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from abliterate.directions.inputs import Keys, ModuleInputs
from abliterate.errors import InputError

# Positions for which blends are remembered: those of some trials, at which every module asks for them.
KEPT = 4096


class DirectionMethod(Protocol):
    """Computes one unit vector (or zero) per residual index from the two prompt sets' residuals.

    A method receives all residuals. If it declares the class attribute `needs = "means"`, it receives only their means, and
    large prompt sets are never held in memory. With the class attribute `biprojects = True`, a direction also loses its
    component along the harmless mean of the layer whose module it is removed from.
    """

    name: str

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        """Directions (n_layers+1, d_model) float32 from winsorized residuals, each (n_prompts, n_layers+1, d_model) float32.

        A method that needs "means" receives the two means instead, each (n_layers+1, d_model) float64. A method that finds
        several directions has the class attribute `count`, its usual number of them, and `compute_several` instead.
        """


class SeveralDirections(Protocol):
    """A direction method that finds `count` directions for each residual index, the most important ones first.

    A method that can't find any number of them has the class attribute `most`.
    """

    name: str
    count: int

    def compute_several(self, harmful: Tensor, harmless: Tensor, count: int) -> Tensor:
        """Unit (or zero) directions (n_layers+1, count, d_model) float32 from residuals as in `DirectionMethod.compute`."""


def needs_means(method: DirectionMethod) -> bool:
    """Whether a method needs only the residuals' means."""
    return getattr(method, "needs", "residuals") == "means"


def count_of(method: DirectionMethod, wanted: int) -> int:
    """The number of directions that a method is asked for: `wanted`, or its usual number where that is 0.

    Raises:
        InputError: several are wanted of a method that finds one, or more than it can find.
    """
    usual, most = getattr(method, "count", 1), getattr(method, "most", wanted)
    if wanted > 1 and not hasattr(method, "compute_several"):
        raise InputError(
            f"The direction method {method.name!r} finds one direction a layer, not {wanted}; leave out directions.count, or "
            "choose a method that finds several."
        )
    if wanted > most:
        raise InputError(
            f"The direction method {method.name!r} finds at most {most} directions a layer, not {wanted}; ask for fewer with "
            "--set directions.count, or choose another method."
        )
    return wanted or usual


@dataclass(frozen=True)
class Blend:
    """A unit direction as a linear combination of rows of a table of directions: v = Σ weights[k] · table[rows[k]].

    A zero direction has no rows. Any quantity that is linear in v can be blended with the same weights.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def is_zero(self) -> bool:
        """Whether the direction is zero, so that there is no edit."""
        return not self.rows

    def of(self, table: Tensor) -> Tensor:
        """`table` (n_rows, …) → Σ weights[k] · table[rows[k]], (…) in the table's dtype."""
        rows = table[list(self.rows)]
        weights = torch.tensor(self.weights, dtype=table.dtype, device=table.device)
        return (weights @ rows.flatten(1)).view(rows.shape[1:])


@dataclass(frozen=True)
class Directions:
    """A unit vector, or zero, for each residual index: `vectors` (n_layers+1, d_model) float32.

    With several directions for each index, `vectors` is (n_layers+1, count, d_model), and the most important ones come first.
    `harmless` (n_layers+1, d_model), where a method biprojects, has the unit harmless means: a direction that is removed from a
    module of some layer is orthogonal to that layer's. `inputs` has the inputs of each module to edit, by its name, or what is
    needed of them, for edit methods that need them, and `answers` the ids of answers along which they were captured. `gains`
    has the weights γ (d_model) of norms by name: a module that reads the residual stream through one sees γ∘v of a direction v.
    """

    vectors: Tensor
    harmless: Tensor | None = None
    inputs: Mapping[str, ModuleInputs | Keys] = field(default_factory=dict)
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    answers: Sequence[Sequence[int]] = ()
    _found: dict[tuple[float, int | None, str], tuple[Blend, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.vectors.ndim not in (2, 3) or not self.vectors.numel() or not torch.isfinite(self.vectors).all():
            raise ValueError("directions must be a finite (n_layers+1, d_model) or (n_layers+1, count, d_model) tensor")
        means, shape = self.harmless, (self.n_layers + 1, self.d_model)
        if means is not None and (means.shape != shape or not torch.isfinite(means).all()):
            raise ValueError("harmless means must be a finite (n_layers+1, d_model) tensor")
        for name, gain in self.gains.items():
            if gain.shape != (self.d_model,) or not torch.isfinite(gain).all():
                raise ValueError(f"the weights of the norm {name} must be a finite (d_model) tensor")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers: one less than there are residual indices."""
        return self.vectors.shape[0] - 1

    @property
    def d_model(self) -> int:
        """The width of a direction."""
        return self.vectors.shape[-1]

    @property
    def count(self) -> int:
        """The number of directions for each residual index."""
        return 1 if self.vectors.ndim == 2 else self.vectors.shape[1]

    def first(self) -> Tensor:
        """The first direction of each residual index, (n_layers+1, d_model)."""
        return self.vectors.reshape(self.n_layers + 1, self.count, self.d_model)[:, 0]

    def seen(self, vectors: Tensor, norm: str) -> Tensor:
        """What a module that reads through a norm sees of unit vectors (…, d_model): γ∘v, scaled to norm 1; without one, v."""
        return normalize_rows(vectors * self.gains[norm].to(vectors)) if norm else vectors

    def table(self, layer: int | None = None, norm: str = "") -> Tensor:
        """(n_layers · count, d_model): the directions of layer 0's output, then those of layer 1's, and so on.

        If there are harmless means, that of the output of `layer`, where the edited module meets the stream, comes last (−1:
        that of the embedding). With the `norm` that a module reads through, every row is what the module sees of it.
        """
        table = self.vectors[1:].reshape(-1, self.d_model)
        if self.harmless is not None and layer is not None:
            table = torch.cat([table, self.harmless[layer + 1, None]])
        return table * self.gains[norm].to(table) if norm else table

    def blends(self, x: float, layer: int | None = None, norm: str = "") -> tuple[Blend, ...]:
        """The directions at layer position `x` ∈ [0, n_layers−1], as blends of `table(layer, norm)`; zero ones are zero blends.

        Each lies between those of two neighbouring layers and is renormalized, after it has lost its component along the
        harmless mean of the output of `layer`, if there is one. Source: docs/design.md §4; linear interpolation as in heretic,
        with the norm taken in float64. Blends are remembered, because all modules of a layer, or of the model, ask for the
        same ones.
        """
        if not 0 <= x <= self.n_layers - 1:
            raise ValueError(f"direction index {x} is outside [0, {self.n_layers - 1}]")
        key = (x, None if self.harmless is None else layer, norm)
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= KEPT:
                self._found.clear()
            found = self._found[key] = self._blends(*key)
        return found

    def _blends(self, x: float, layer: int | None, norm: str) -> tuple[Blend, ...]:
        low = min(math.floor(x), self.n_layers - 1)
        high = min(low + 1, self.n_layers - 1)
        t = x - low
        pairs = [(low, 1.0 - t), (high, t)] if t > 0 else [(low, 1.0)]
        table, mean = self.table(), None if self.harmless is None or layer is None else self.harmless[layer + 1].double()
        found = []
        for index in range(self.count):
            places = tuple(layer * self.count + index for layer, _ in pairs)
            weights = tuple(weight for _, weight in pairs)
            mixed = torch.stack([weight * table[row].double() for row, weight in zip(places, weights, strict=True)]).sum(dim=0)
            least = 1e-12
            if mean is not None and mean.any():
                share, least = float(mixed @ mean / (mean @ mean)), max(least, 1e-6 * float(mixed.norm()))
                mixed, places, weights = mixed - share * mean, (*places, len(table)), (*weights, -share)
            is_zero = float(mixed.norm()) < least
            length = float((mixed * self.gains[norm].to(mixed) if norm else mixed).norm())
            found.append(
                Blend((), ()) if is_zero or length == 0 else Blend(places, tuple(weight / length for weight in weights))
            )
        return tuple(found)

    def blend(self, x: float) -> Blend:
        """The one direction at layer position `x`, as a blend of `table`. ValueError if there are several."""
        (blend,) = self.blends(x)
        return blend

    def at(self, x: float) -> Tensor:
        """`blend(x)` as a vector (d_model) float32, of norm 1 or zero."""
        blend = self.blend(x)
        if blend.is_zero:
            return torch.zeros_like(self.vectors[0])
        return blend.of(self.table().double()).float()


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


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of (k, d) float64 that aren't zero, scaled to norm 1, and their norms: (k', d) and (k'), differentiable."""
    kept = rows[rows.any(dim=1)]
    norms = kept.norm(dim=1)
    return kept / norms[:, None], norms


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
