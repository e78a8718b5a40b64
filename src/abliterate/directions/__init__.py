"""Direction methods. A new one is a file beside these and a line in `METHODS`."""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import Blend, DirectionMethod, Directions, winsorize
from abliterate.directions.mean_difference import MeanDifference
from abliterate.directions.projected import Projected
from abliterate.errors import InputError

METHODS: dict[str, DirectionMethod] = {method.name: method for method in (Projected(), MeanDifference())}


def direction_method(name: str) -> DirectionMethod:
    """The method of that name, or InputError with those there are."""
    if name not in METHODS:
        raise InputError(f"There is no direction method {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def compute_directions(harmful: Tensor, harmless: Tensor, method: str, quantile: float = 1.0) -> Directions:
    """Directions from residuals (n_prompts, n_layers+1, d_model) float32.

    Raises:
        InputError: no such method.
    """
    return Directions(direction_method(method).compute(winsorize(harmful, quantile), winsorize(harmless, quantile)))


__all__ = ["METHODS", "Blend", "DirectionMethod", "Directions", "compute_directions", "direction_method", "winsorize"]
