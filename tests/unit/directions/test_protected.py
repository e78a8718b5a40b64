"""Protected subspaces: the closed form against ridge regression and least squares, and its laws, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from abliterate.directions import Directions
from abliterate.directions.protected import capability_directions, protect

INDICES, COUNT, WIDTH = 5, 3, 24


def units(*shape: int, seed: int = 0) -> Tensor:
    """Unit vectors (…, d_model) float64."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def by_solving(r: Tensor, c: Tensor, ridge: float) -> Tensor:
    """r' of one direction by the normal equations, as they are written in docs/design.md §4."""
    gram = (c @ c.T).numpy() + ridge * np.eye(len(c))
    left = r.numpy() - c.numpy().T @ np.linalg.solve(gram, c.numpy() @ r.numpy())
    return torch.from_numpy(left / np.linalg.norm(left))


@pytest.mark.parametrize("ridge", [1e-4, 0.01, 1.0, 100.0])
@pytest.mark.parametrize("several", [False, True])
def test_is_what_ridge_regression_leaves(ridge: float, several: bool) -> None:
    vectors, capabilities = units(INDICES, *([2] if several else []), WIDTH), units(INDICES, COUNT, WIDTH, seed=1)
    found = protect(Directions(vectors), capabilities, ridge).vectors
    assert found.shape == vectors.shape
    for rows, kept, c in zip(vectors.reshape(INDICES, -1, WIDTH), found.reshape(INDICES, -1, WIDTH), capabilities, strict=True):
        for r, left in zip(rows, kept, strict=True):
            assert torch.allclose(left, by_solving(r, c, ridge), atol=1e-12)


def test_without_a_ridge_it_is_what_least_squares_leaves_and_orthogonal_to_every_capability() -> None:
    vectors, capabilities = units(INDICES, WIDTH), units(INDICES, COUNT, WIDTH, seed=1)
    found = protect(Directions(vectors), capabilities, 0.0).vectors
    for r, left, c in zip(vectors, found, capabilities, strict=True):
        fit = np.linalg.lstsq(c.numpy().T, r.numpy(), rcond=None)[0]
        rest = r.numpy() - c.numpy().T @ fit
        assert np.allclose(left.numpy(), rest / np.linalg.norm(rest), atol=1e-12)
        assert (c @ left).abs().max() < 1e-10
        assert float(left.norm()) == pytest.approx(1.0, abs=1e-12)
    again = protect(Directions(found), capabilities, 0.0).vectors
    assert torch.allclose(again, found, atol=1e-12)  # a projection


def test_a_ridge_that_vanishes_or_grows_gives_the_projection_or_nothing() -> None:
    vectors, capabilities = units(INDICES, WIDTH), units(INDICES, COUNT, WIDTH, seed=1)
    projected = protect(Directions(vectors), capabilities, 0.0).vectors
    assert torch.allclose(protect(Directions(vectors), capabilities, 1e-12).vectors, projected, atol=1e-10)
    assert torch.allclose(protect(Directions(vectors), capabilities, 1e12).vectors, vectors, atol=1e-10)


def test_neither_the_order_nor_repetition_of_capabilities_counts_without_a_ridge() -> None:
    vectors, capabilities = units(INDICES, WIDTH), units(INDICES, COUNT, WIDTH, seed=1)
    once = protect(Directions(vectors), capabilities, 0.0).vectors
    more = torch.cat([capabilities.flip(1), capabilities[:, :1], -capabilities[:, 1:2]], dim=1)
    assert torch.allclose(protect(Directions(vectors), more, 0.0).vectors, once, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_a_direction_within_the_span_becomes_zero_and_not_a_random_one(ridge: float) -> None:
    capabilities = units(INDICES, COUNT, WIDTH, seed=1)
    vectors = units(INDICES, WIDTH)
    vectors[2] = torch.nn.functional.normalize(capabilities[2].sum(dim=0), dim=0)
    found = protect(Directions(vectors.float()), capabilities, ridge).vectors
    assert not found[2].any()
    assert found.dtype == torch.float32
    assert torch.allclose(found[[0, 1, 3, 4]].norm(dim=-1), torch.ones(4), atol=1e-6)


def test_zero_directions_and_zero_capabilities_change_nothing_else() -> None:
    vectors, capabilities = units(INDICES, WIDTH), units(INDICES, COUNT, WIDTH, seed=1)
    vectors[0], capabilities[1] = 0.0, 0.0
    found = protect(Directions(vectors), capabilities, 0.01).vectors
    assert not found[0].any()
    assert torch.allclose(found[1], vectors[1], atol=1e-15)
    fewer = capabilities.clone()
    fewer[:, 2] = 0.0  # as if the third weren't protected
    left = protect(Directions(vectors), fewer, 0.01).vectors
    assert torch.allclose(left, protect(Directions(vectors), capabilities[:, :2], 0.01).vectors, atol=1e-12)


def test_capability_directions_by_hand() -> None:
    plain = torch.tensor([[1.0, 0.0, 2.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    means = torch.stack([plain + torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1e-9]]), plain + torch.tensor([0.0, 0.0, 2.0])])
    found = capability_directions(means, plain)
    assert found[0].tolist() == [pytest.approx([0.6, 0.8, 0.0]), pytest.approx([0.0, 0.0, 1.0])]
    assert found[1].tolist() == [[0.0, 0.0, 0.0], pytest.approx([0.0, 0.0, 1.0])]  # at rounding level there is no direction
