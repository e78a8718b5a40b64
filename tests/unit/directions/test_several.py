"""Methods that find several directions, and medians, against references that are slow or written in other words."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from abliterate.directions import METHODS, compute_directions, direction_method
from abliterate.directions.kmeans import k_means
from abliterate.directions.median import geometric_median, median
from abliterate.directions.points import Points
from abliterate.directions.som import SelfOrganizingMap, trained
from abliterate.directions.svd import singular_vectors
from abliterate.errors import InputError
from support.contracts import DirectionContract


class TestMedian(DirectionContract):
    """Of each coordinate."""

    method = METHODS["median"]


class TestGeometricMedian(DirectionContract):
    """Of whole residuals."""

    method = METHODS["geometric-median"]


class TestKMeans(DirectionContract):
    """Centres of clusters."""

    method = METHODS["kmeans"]


class TestSingularVectors(DirectionContract):
    """Of paired differences."""

    method = METHODS["svd"]


class TestSelfOrganizingMap(DirectionContract):
    """Neurons of a map."""

    method = SelfOrganizingMap(steps=300)  # a thirtieth of the usual number, which takes a second


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(d: int = 30) -> tuple[Tensor, Tensor]:
    """Residuals (60, 2, d) of one layer and the embedding in clusters of 30, 20 and 10, and harmless ones around the origin."""
    centres = 10 * seeded(3, d, seed=1)
    harmful = torch.cat([centre + 0.1 * seeded(size, d, seed=size) for centre, size in zip(centres, (10, 30, 20), strict=True)])
    return torch.stack([harmful, 2 * harmful], dim=1).float(), 0.1 * seeded(40, 2, d, seed=2).float()


@pytest.mark.parametrize("shape", [(9, 4), (9, 30), (1, 5), (40, 40)], ids=str)
def test_points_keep_distances_and_lead_back(shape: tuple[int, int]) -> None:
    residuals = seeded(*shape) + 3
    points = Points.of(residuals)
    torch.testing.assert_close(
        torch.cdist(points.places, points.places), torch.cdist(residuals, residuals), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(points.back(points.places), residuals, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_k_means_finds_the_best_of_all_partitions(count: int) -> None:
    points = seeded(7, 3, seed=count)
    costs = []
    for labels in itertools.product(range(count), repeat=7):
        parts = [points[[label == own for label in labels]] for own in range(count)]
        costs.append(sum(float((part - part.mean(dim=0)).square().sum()) for part in parts if len(part)))
    centres, sizes = k_means(points, count, torch.Generator().manual_seed(0))
    assert float(torch.cdist(points, centres).min(dim=1).values.square().sum()) == pytest.approx(min(costs), rel=1e-12)
    assert sizes.sum() == 7


@pytest.mark.parametrize("name", ["kmeans", "som"])
def test_clusters_by_their_size(name: str) -> None:
    """A map ends near the clusters' centres, k-means at them; the largest comes first."""
    harmful, harmless = clusters()
    centres = (
        torch.stack([harmful[10:40].mean(0), harmful[40:].mean(0), harmful[:10].mean(0)], dim=1) - harmless.mean(0)[:, None]
    )
    expected = torch.nn.functional.normalize(centres, dim=2)
    found = compute_directions(direction_method(name), harmful, harmless, 3 if name == "kmeans" else 16).vectors
    if name == "kmeans":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        nearest = (expected @ found.transpose(1, 2)).max(dim=2).values
        assert (nearest > 0.99).all()


def test_fewer_different_prompts_than_clusters_leave_zero_directions() -> None:
    harmful = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])[[0, 0, 0, 1, 1]][:, None]
    found = compute_directions(direction_method("kmeans"), harmful, torch.zeros(4, 1, 3), 4).vectors
    torch.testing.assert_close(found[0], torch.eye(4, 3) * torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    assert found[0, 2:].count_nonzero() == 0


def test_one_direction_of_a_method_for_several_is_the_mean_difference() -> None:
    harmful, harmless = clusters()
    found = compute_directions(direction_method("kmeans"), harmful, harmless, 1).vectors
    raw = harmful.double().mean(0) - harmless.double().mean(0)
    assert found.shape == (2, 30)
    torch.testing.assert_close(found.double(), torch.nn.functional.normalize(raw, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 20), (30, 12)], ids=str)
@pytest.mark.parametrize("paired", [True, False])
def test_singular_vectors_are_those_of_a_plain_svd(shape: tuple[int, int], paired: bool) -> None:
    harmful, harmless = seeded(*shape) + 1, seeded(shape[0] if paired else 5, shape[1], seed=1)
    rows = harmful - (harmless if paired else harmless.mean(dim=0))
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[:4]
    found = singular_vectors(harmful, harmless, 4)
    torch.testing.assert_close((found * expected).sum(dim=1).abs(), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(found @ found.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (found @ rows.mean(dim=0) >= 0).all()


def test_singular_vectors_beyond_the_rank_are_zero() -> None:
    harmful = seeded(2, 9)
    found = singular_vectors(harmful, torch.zeros(3, 9, dtype=torch.float64), 4)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 0, 0])


def test_a_map_is_that_of_a_plain_loop() -> None:
    points, steps = seeded(2, 20, 5), 300
    generator = torch.Generator().manual_seed(0)
    starts = torch.randperm(20, generator=generator)[:16]
    draws = torch.randint(20, (steps,), generator=generator)
    for layer in range(2):
        neurons = [points[layer, start].clone() for start in starts]
        for step in range(steps):
            x, shrunk = points[layer, draws[step]], 1 / (1 + 2 * step / steps)
            nearest = min(range(16), key=lambda place: float((x - neurons[place]).norm()))
            for place in range(16):
                apart = math.dist(divmod(place, 4), divmod(nearest, 4))
                pull = 0.01 * shrunk * math.exp(-(apart**2) / (2 * (0.33 * shrunk) ** 2))
                neurons[place] += pull * (x - neurons[place])
        torch.testing.assert_close(trained(points, steps)[layer], torch.stack(neurons), rtol=1e-10, atol=1e-10)


def test_a_map_finds_at_most_its_neurons() -> None:
    harmful, harmless = clusters()
    with pytest.raises(InputError, match="at most 16 directions"):
        compute_directions(direction_method("som"), harmful, harmless, 17)
    with pytest.raises(InputError, match="finds one direction"):
        compute_directions(direction_method("median"), harmful, harmless, 2)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_median_is_the_middle_of_the_sorted_values(n: int) -> None:
    rows = seeded(n, 6)
    expected = [(sorted(column)[(n - 1) // 2] + sorted(column)[n // 2]) / 2 for column in rows.T.tolist()]
    assert median(rows).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", [(3, 2), (9, 30), (40, 6)], ids=str)
def test_the_pulls_on_a_geometric_median_cancel(shape: tuple[int, int]) -> None:
    """The sum of distances is convex, with the sum of unit vectors as its gradient; a point there outweighs one of them."""
    rows = seeded(*shape, seed=3)
    towards = rows - geometric_median(rows)
    here = towards.norm(dim=1) < 1e-9
    assert int(here.sum()) == (shape == (3, 2))  # an obtuse triangle
    assert float(torch.nn.functional.normalize(towards[~here], dim=1).sum(dim=0).norm()) < 1e-8 + float(here.sum())


@pytest.mark.parametrize("far", [1.0, 1000.0])
def test_a_geometric_median_may_be_a_point(far: float) -> None:
    """The middle of a cross is a point of it, and neither how far away an arm is nor a second copy of a point moves it."""
    rows = torch.tensor([[0.0, 0.0], [far, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(rows), rows[0], rtol=0, atol=1e-9)
    twice = torch.tensor([[5.0, 5.0], [5.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(twice), twice[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(geometric_median(twice[:2]), twice[0], rtol=0, atol=1e-9)
