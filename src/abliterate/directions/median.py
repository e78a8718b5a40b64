"""Differences of medians, which a few unusual prompts can't move far: coordinate by coordinate, or of whole residuals.

The geometric median is the point with the least sum of distances to all residuals. It doesn't depend on the axes, as the median
of coordinates does (Weiszfeld 1937; the step at a data point is that of Vardi and Zhang 2000, doi:10.1073/pnas.97.4.1423).
"""

from __future__ import annotations

import torch
from torch import Tensor

from abliterate.directions.points import Points, centre_difference

# Weiszfeld's steps, and the step, relative to the points' spread, at which they end.
_MOST_STEPS, _ENOUGH = 1000, 1e-12


class Median:
    """median(harmful) − median(harmless) of every coordinate."""

    name = "median"

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        return centre_difference(harmful, harmless, median)


class GeometricMedian:
    """The difference of both sets' geometric medians."""

    name = "geometric-median"

    def compute(self, harmful: Tensor, harmless: Tensor) -> Tensor:
        return centre_difference(harmful, harmless, geometric_median)


def median(residuals: Tensor) -> Tensor:
    """The median of every column of (n, d_model) float64; of an even number, the mean of the middle two."""
    columns = residuals.T.contiguous()
    # torch.median gives the lower of the middle two.
    return (columns.median(dim=1).values - (-columns).median(dim=1).values) / 2


def geometric_median(residuals: Tensor) -> Tensor:
    """The point (d_model) with the least sum of distances to residuals (n, d_model) float64, by Weiszfeld's steps."""
    points = Points.of(residuals)
    places = points.places
    spread = float(places.norm(dim=1).mean())
    found = torch.zeros_like(places[0])
    for _ in range(_MOST_STEPS):
        towards = places - found
        away = towards.norm(dim=1)
        here = away <= _ENOUGH * spread
        pull = torch.where(here, 0.0, 1 / away.clamp_min(1e-300))
        force = pull @ towards
        # Points that lie here hold it back with a force of 1 each, and wholly if the others pull less.
        left = 1 - min(1.0, float(here.sum()) / max(float(force.norm()), 1e-300))
        if left == 0:
            break
        step = left * force / pull.sum()
        found = found + step
        if float(step.norm()) <= _ENOUGH * spread:
            break
    return points.back(found)
