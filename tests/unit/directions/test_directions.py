"""Directions, their interpolation, winsorizing and kernels, against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.directions import METHODS, Blend, Directions, direction_method, needs_means, summarize_residuals, winsorize
from abliterate.errors import InputError
from abliterate.types import Kernel
from support.contracts import DirectionContract


def residuals(*rows: list[float]) -> torch.Tensor:
    """(n_prompts, 1, d) from one row a prompt."""
    return torch.tensor(rows)[:, None, :]


def compute_directions(harmful: torch.Tensor, harmless: torch.Tensor, method: str, quantile: float = 1.0) -> Directions:
    """Directions from residuals (n_prompts, n_layers+1, d_model) that are not yet winsorized."""
    chosen = direction_method(method)
    return Directions(chosen.compute(*(summarize_residuals(part, chosen, quantile) for part in (harmful, harmless))))


def test_mean_difference_by_hand() -> None:
    # Means (4, 5) and (1, 1): the difference is (3, 4), of norm 5.
    found = compute_directions(residuals([3.0, 6.0], [5.0, 4.0]), residuals([1.0, 0.0], [1.0, 2.0]), "mean")
    assert found.vectors[0].tolist() == pytest.approx([0.6, 0.8], abs=1e-7)


def test_projected_by_hand() -> None:
    # The difference (3, 4) without its part along the harmless mean (1, 0)·2 is (0, 4).
    found = compute_directions(residuals([5.0, 4.0]), residuals([2.0, 0.0]), "projected")
    assert found.vectors[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-7)


def test_projected_by_hand_in_three_dimensions() -> None:
    # d = (2, 2, 1)/3, h = (0, 3, 4)/5: d·h = 2/3, rest = (2/3, 2/3 − 2/5, 1/3 − 8/15) = (10, 4, −3)/15, norm √125/15.
    found = compute_directions(residuals([2.0, 5.0, 5.0]), residuals([0.0, 3.0, 4.0]), "projected")
    assert found.vectors[0].tolist() == pytest.approx([x / math.sqrt(125) for x in (10, 4, -3)], abs=1e-6)


# The methods that find one direction a layer.
SINGLE = sorted(name for name, method in METHODS.items() if not hasattr(method, "compute_several"))


class Median:
    """An outsider's method: it says nothing of what it needs, so it is given all residuals."""

    name = "median"

    def compute(self, harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
        """Medians in place of means."""
        assert harmful.ndim == 3
        return torch.nn.functional.normalize(harmful.median(0).values - harmless.median(0).values, dim=-1)


class TestProjected(DirectionContract):
    """The default, of means."""

    method = METHODS["projected"]


class TestBiprojected(DirectionContract):
    """Of means, projected once more for each edited layer."""

    method = METHODS["biprojected"]


class TestMeanDifference(DirectionContract):
    """Of means."""

    method = METHODS["mean"]


class TestMedian(DirectionContract):
    """Of all residuals."""

    method = Median()


def test_only_methods_of_means_can_do_without_the_residuals() -> None:
    assert {name for name, method in METHODS.items() if needs_means(method)} == {"projected", "biprojected", "mean"}
    assert not needs_means(Median())


def test_projected_is_orthogonal_to_the_harmless_mean() -> None:
    torch.manual_seed(1)
    harmless = torch.randn(6, 3, 12) + 2
    found = compute_directions(torch.randn(6, 3, 12), harmless, "projected").vectors
    assert float((found * harmless.mean(0)).sum(-1).abs().max()) < 1e-5


@pytest.mark.parametrize("method", SINGLE)
def test_equal_sets_have_no_direction(method: str) -> None:
    torch.manual_seed(2)
    same = torch.randn(5, 3, 8)
    found = compute_directions(same, same.flip(0), method)
    assert found.vectors.count_nonzero() == 0
    assert found.blend(0.5).is_zero
    assert found.at(0.5).tolist() == [0.0] * 8


def test_a_difference_along_the_harmless_mean_leaves_no_projected_direction() -> None:
    found = compute_directions(residuals([0.3, 0.6, 0.9]), residuals([0.1, 0.2, 0.3]), "projected")
    assert found.vectors.count_nonzero() == 0


def test_unknown_method_names_those_there_are() -> None:
    with pytest.raises(InputError, match=r"nonsense.*projected"):
        compute_directions(residuals([1.0]), residuals([0.0]), "nonsense")


@pytest.fixture
def square() -> Directions:
    """Residual index 0 is the embedding; layers 0, 1, 2 point along x, y and −y."""
    return Directions(torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))


def test_layers_leave_out_the_embedding(square: Directions) -> None:
    assert square.n_layers == 3
    assert square.at(0).tolist() == [1.0, 0.0]
    assert square.at(2).tolist() == [0.0, -1.0]


def test_interpolation_is_renormalized(square: Directions) -> None:
    # A quarter of the way from x to y: (3/4, 1/4), of norm √10/4.
    assert square.at(0.25).tolist() == pytest.approx([3 / math.sqrt(10), 1 / math.sqrt(10)], abs=1e-7)
    assert square.at(0.5).tolist() == pytest.approx([math.sqrt(0.5)] * 2, abs=1e-7)


def test_blend_weights_by_hand(square: Directions) -> None:
    blend = square.blend(0.25)
    assert blend.rows == (0, 1)
    assert blend.weights == pytest.approx((3 / math.sqrt(10), 1 / math.sqrt(10)))


def test_opposite_neighbours_cancel_to_no_direction(square: Directions) -> None:
    assert square.blend(1.5) == Blend((), ())


def test_a_zero_neighbour_leaves_the_other() -> None:
    found = Directions(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
    assert found.at(0.3).tolist() == pytest.approx([0.0, 1.0])
    assert found.blend(0).is_zero


@pytest.mark.parametrize("x", [-0.01, 2.01, math.nan])
def test_positions_outside_the_layers_are_refused(square: Directions, x: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        square.blend(x)


def test_directions_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Directions(torch.tensor([[0.0, math.nan]]))


@given(x=st.floats(0, 4), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_position_gives_a_unit_vector(x: float, seed: int) -> None:
    table = torch.nn.functional.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(seed)), dim=1)
    assert float(Directions(table).at(x).norm()) == pytest.approx(1.0, abs=1e-6)


def winsorized(row: list[float], quantile: float) -> list[float]:
    """By definition, in plain Python: clamp to ± the smallest |x| that at least this share of the entries doesn't exceed."""
    limit = sorted(abs(x) for x in row)[max(1, math.ceil(quantile * len(row))) - 1]
    return [max(-limit, min(limit, x)) for x in row]


def test_winsorize_by_hand() -> None:
    row = torch.tensor([[1.0, -2.0, 3.0, -400.0]])
    assert winsorize(row, 0.75).tolist() == [[1.0, -2.0, 3.0, -3.0]]
    assert winsorize(row, 0.5).tolist() == [[1.0, -2.0, 2.0, -2.0]]
    assert winsorize(row, 1.0).tolist() == row.tolist()


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30), st.floats(0.01, 0.999))
@settings(max_examples=100, deadline=None)
def test_winsorize_equals_the_definition(row: list[float], quantile: float) -> None:
    assert winsorize(torch.tensor([row]), quantile)[0].tolist() == winsorized(row, quantile)


def test_winsorize_treats_each_prompt_and_layer_alone() -> None:
    torch.manual_seed(3)
    block = torch.randn(3, 2, 10) * torch.tensor([1.0, 100.0])[None, :, None]
    found = winsorize(block, 0.8)
    for prompt in range(3):
        for layer in range(2):
            assert found[prompt, layer].tolist() == winsorized(block[prompt, layer].tolist(), 0.8)


def test_winsorizing_changes_the_direction() -> None:
    harmful = residuals([1.0, 1.0, 100.0], [1.0, 1.0, 0.0])
    plain = compute_directions(harmful, residuals([0.0, 0.0, 0.0]), "mean").vectors[0]
    tamed = compute_directions(harmful, residuals([0.0, 0.0, 0.0]), "mean", quantile=0.6).vectors[0]
    assert plain[2] > 0.99
    assert tamed.tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3], abs=1e-6)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(3, 0.0), (4, 0.2), (5, 0.4), (6, 0.6), (7, 0.8), (8, 1.0), (9, 0.8), (12, 0.2), (13, 0.0)],
)
def test_kernel_by_hand(layer: int, expected: float) -> None:
    assert Kernel(max_coeff=1.0, position=8.0, min_coeff=0.2, distance=4.0).coeff(layer) == pytest.approx(expected)


def test_kernel_between_layers() -> None:
    kernel = Kernel(max_coeff=1.5, position=2.5, min_coeff=0.5, distance=2.0)
    # Half a layer away is a quarter of the way down; one and a half layers, three quarters; beyond 2, nothing.
    assert [kernel.coeff(layer) for layer in range(6)] == pytest.approx([0.0, 0.75, 1.25, 1.25, 0.75, 0.0])


def test_kernel_that_is_off_is_off_everywhere() -> None:
    assert {Kernel(0.0, 3.0, 0.0, 2.0).coeff(layer) for layer in range(8)} == {0.0}
