"""Direction methods: how a direction is computed from residuals.

A new method is a file beside these and a line in `METHODS`, or a plugin's `directions`.
"""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import (
    Blend,
    DirectionMethod,
    Directions,
    ResidualMeans,
    SeveralDirections,
    count_of,
    needs_means,
    normalize_rows,
    unit_rows,
    winsorize,
)
from abliterate.directions.biprojected import Biprojected
from abliterate.directions.inputs import Keys, ModuleInputs
from abliterate.directions.kmeans import KMeans
from abliterate.directions.mean_difference import MeanDifference
from abliterate.directions.median import GeometricMedian, Median
from abliterate.directions.projected import Projected
from abliterate.directions.som import SelfOrganizingMap
from abliterate.directions.svd import SingularVectors
from abliterate.plugins import Registry

_BUILT_IN = (
    *(Projected(), Biprojected(), MeanDifference(), Median(), GeometricMedian()),
    *(KMeans(), SingularVectors(), SelfOrganizingMap()),
)
METHODS: Registry[DirectionMethod] = Registry(
    "directions",
    "direction method",
    {method.name: method for method in _BUILT_IN},  # type: ignore[misc]
    named="name",
    needs=("name",),
)


def direction_method(name: str) -> DirectionMethod:
    """The method of that name. InputError, which lists the known methods, if there is none."""
    return METHODS.find(name)


def compute_directions(method: DirectionMethod, harmful: Tensor, harmless: Tensor, count: int = 0) -> Directions:
    """The directions that a method finds, as many for each residual index as `count_of` says; the arguments are `compute`'s."""
    count = count_of(method, count)
    means = None
    if getattr(method, "biprojects", False):
        means = normalize_rows(harmless if harmless.ndim == 2 else harmless.double().mean(dim=0)).float()
    if count == 1 and hasattr(method, "compute"):
        return Directions(method.compute(harmful, harmless), means)
    several: SeveralDirections = method  # type: ignore[assignment]
    found = several.compute_several(harmful, harmless, count)
    return Directions(found[:, 0] if count == 1 else found, means)


def summarize_residuals(residuals: Tensor, method: DirectionMethod, quantile: float = 1.0) -> Tensor:
    """The argument of a method's `compute`, from residuals (n_prompts, n_layers+1, d_model) float32 not yet winsorized."""
    if not needs_means(method):
        return winsorize(residuals, quantile)
    means = ResidualMeans(quantile)
    means.add(residuals)
    return means.mean()


__all__ = [
    "METHODS",
    "Blend",
    "DirectionMethod",
    "Directions",
    "Keys",
    "ModuleInputs",
    "ResidualMeans",
    "SeveralDirections",
    "compute_directions",
    "count_of",
    "direction_method",
    "needs_means",
    "summarize_residuals",
    "unit_rows",
    "winsorize",
]
