"""Direction methods. A new one is a file beside these and a line in `METHODS`."""

from __future__ import annotations

from torch import Tensor

from abliterate.directions.base import Blend, DirectionMethod, Directions, winsorize
from abliterate.directions.mean_difference import MeanDifference
from abliterate.directions.projected import Projected
from abliterate.errors import InputError

METHODS: dict[str, DirectionMethod] = {method.name: method for method in (Projected(), MeanDifference())}


def compute_directions(harmful: Tensor, harmless: Tensor, method: str, quantile: float = 1.0) -> Directions:
    """Directions from residuals (n_prompts, n_layers+1, d_model) float32.

    Raises:
        InputError: no such method.
    """
    if method not in METHODS:
        raise InputError(f"There is no direction method {method!r}; choose one of {', '.join(METHODS)}.")
    return Directions(METHODS[method].compute(winsorize(harmful, quantile), winsorize(harmless, quantile)))


__all__ = ["METHODS", "Blend", "DirectionMethod", "Directions", "compute_directions", "winsorize"]
