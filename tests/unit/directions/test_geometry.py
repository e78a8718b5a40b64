"""Residual geometry against slow references in float64, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from abliterate.directions.geometry import (
    Sample,
    all_layers,
    cosines,
    layer_geometry,
    mean_geometry,
    principal,
    probe_accuracy,
    rounded,
    silhouette,
    silhouettes,
)


def clouds(n: int = 12, m: int = 9, d: int = 20, apart: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two clouds of points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n + m, d, generator=generator)
    points[:n, 0] += apart
    return points[:n], points[n:]


def gram_of(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    points = torch.cat([first, second]).double()
    centred = points - points.mean(dim=0)
    return centred @ centred.T, torch.arange(len(points)) < len(first)


def slow_silhouette(first: Tensor, second: Tensor) -> float:
    points = [(row.double(), 0) for row in first] + [(row.double(), 1) for row in second]
    total = 0.0
    for i, (point, own) in enumerate(points):
        means = []
        for label in (own, 1 - own):
            others = [float((point - other).norm()) for j, (other, its) in enumerate(points) if its == label and j != i]
            means.append(sum(others) / len(others))
        total += (means[1] - means[0]) / max(means)
    return total / len(points)


def slow_probe(first: Tensor, second: Tensor, ridge: float) -> float:
    """Fits the regression anew without each point, with the penalty of the whole."""
    points = torch.cat([first, second]).double()
    labels = torch.cat([torch.ones(len(first)), -torch.ones(len(second))]).double()
    penalty = ridge * (points - points.mean(dim=0)).square().sum() / len(points)
    right = []
    for i in range(len(points)):
        kept = torch.arange(len(points)) != i
        x, y = points[kept], labels[kept]
        mean, level = x.mean(dim=0), y.mean()
        weights = torch.linalg.solve((x - mean).T @ (x - mean) + penalty * torch.eye(x.shape[1]).double(), (x - mean).T @ y)
        right.append(bool(((points[i] - mean) @ weights + level) * labels[i] > 0))
    halves = right[: len(first)], right[len(first) :]
    return sum(sum(half) / len(half) for half in halves) / 2


@pytest.mark.parametrize(("apart", "d"), [(0.0, 20), (1.0, 20), (3.0, 5), (2.0, 60)])
def test_separation_is_that_of_slow_references(apart: float, d: int) -> None:
    for seed in range(5):
        first, second = clouds(apart=apart, d=d, seed=seed)
        gram, is_first = gram_of(first, second)
        assert silhouette(gram, is_first) == pytest.approx(slow_silhouette(first, second), abs=1e-9)
        for ridge in (0.01, 0.1, 1.0):
            assert probe_accuracy(gram, is_first, ridge) == slow_probe(first, second, ridge)


def test_a_probe_that_sees_nothing_is_at_chance_or_below_and_one_that_sees_all_is_right() -> None:
    found = [layer_geometry(*clouds(40, 40, apart=0.0, seed=seed))[0] for seed in range(5)]
    assert 0.2 < sum(one.probe for one in found if one.probe is not None) / 5 < 0.65
    separation, _ = layer_geometry(*clouds(40, 40, apart=20.0))
    assert separation.probe == 1.0
    assert separation.silhouette is not None
    assert separation.silhouette > 0.5


def test_the_projection_is_that_of_a_singular_value_decomposition() -> None:
    first, second = clouds()
    gram, is_first = gram_of(first, second)
    found, explained = principal(gram, is_first)
    points = torch.cat([first, second]).double()
    centred = points - points.mean(dim=0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(found.abs(), (centred @ axes[:2].T).abs(), atol=1e-9)
    assert explained == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist())
    assert (found[is_first].mean(dim=0) > found[~is_first].mean(dim=0)).all()


def test_the_projection_doesnt_depend_on_signs_and_rotations() -> None:
    first, second = clouds()
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(1)))[0]
    one, other = (layer_geometry(a, b)[1] for a, b in ((first, second), (first @ rotation, second @ rotation)))
    assert torch.allclose(one.harmful, other.harmful, atol=1e-4)
    assert torch.allclose(one.harmless, other.harmless, atol=1e-4)


def test_points_that_dont_differ_are_not_separated() -> None:
    alike = torch.full((6, 8), 3.0) * (1 + 1e-8 * torch.arange(6)[:, None])
    separation, projection = layer_geometry(alike, alike[:4])
    assert (separation.silhouette, separation.probe) == (None, None)
    assert projection.harmful.abs().max() == 0
    assert layer_geometry(*clouds(1, 5))[0].probe is None


def test_means_tell_norms_and_cosines() -> None:
    harmful, harmless = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    zero, one = mean_geometry(harmful, harmless, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert zero["cos_means"] is None
    assert (one["norm_harmful"], one["norm_harmless"]) == (5.0, 5.0)
    assert one["norm_difference"] == pytest.approx(math.sqrt(20))
    assert one["cos_means"] == pytest.approx(0.6)
    assert (one["cos_harmful_direction"], one["cos_harmless_direction"]) == (pytest.approx(0.8), 0.0)
    assert cosines(harmful, harmful)[1] == 1.0


@pytest.mark.parametrize(("total", "most", "cut"), [(10, 4, 3), (4, 10, 4), (7, 7, 2), (1000, 3, 128), (0, 5, 1)])
def test_a_sample_is_the_same_however_residuals_come(total: int, most: int, cut: int) -> None:
    residuals = torch.arange(float(total))[:, None, None].expand(total, 2, 3)
    whole, parts = Sample(total, most), Sample(total, most)
    whole.add(residuals)
    for start in range(0, total, cut):
        parts.add(residuals[start : start + cut])
    one, other = whole.residuals(), parts.residuals()
    if one is None or other is None:
        assert total == 0
        return
    assert torch.equal(one, other)
    assert len(one) == min(total, most)


def test_silhouettes_are_those_of_all_layers() -> None:
    first, second = (torch.stack([one, torch.ones_like(one), 2 * one.flip(1)], dim=1) for one in clouds())
    found = silhouettes(first, second)
    assert found == [separation.silhouette for separation, _ in all_layers(first, second)]
    assert found[1] is None


def test_all_layers_asks_between_layers() -> None:
    first, second = (part[:, None].expand(-1, 3, -1) for part in clouds())
    calls: list[int] = []
    assert len(all_layers(first, second, lambda: calls.append(1))) == len(calls) == 3


def test_rounded() -> None:
    assert rounded(123456.789) == 123460.0
    assert rounded(None) is None
    assert rounded(float("nan")) is None
