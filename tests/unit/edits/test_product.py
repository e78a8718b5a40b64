"""Several directions of one matrix: the closed form of Π_j (I − λ_j v_j v_jᵀ) against the dense product in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from abliterate.directions import Blend
from abliterate.edits import METHODS, check_several, exact_factors, prepare, svd_factors
from abliterate.edits.base import one_after_another
from abliterate.edits.svd import SvdMemo
from abliterate.errors import InputError
from abliterate.export.check_weights import by_definition

MODES = ("full", "pre", "none", "columns")


def make(d_out: int = 24, d_in: int = 40, count: int = 3, seed: int = 0, experts: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix whose rows have very different norms, one of them zero, and unit directions that aren't orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, d_out, d_in) if experts else (d_out, d_in)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, d_out)[:, None]
    weight[..., 5, :] = 0
    vectors = torch.randn(count, d_out, generator=generator, dtype=torch.float64) + 0.5
    return weight, torch.nn.functional.normalize(vectors, dim=1)


def alone(count: int) -> list[Blend]:
    return [Blend((index,), (1.0,)) for index in range(count)]


def dense_product(weight: Tensor, vectors: Tensor, coeffs: Sequence[float], mode: str) -> Tensor:
    """W' by matrices: every direction is projected out of what those before it left."""
    weight = weight.double()
    norms = weight.norm(dim=1, keepdim=True)
    edited = weight if mode in ("none", "columns") else torch.where(norms > 0, weight / norms.clamp_min(1e-300), 0)
    for v, coeff in zip(vectors, coeffs, strict=True):
        edited = (torch.eye(len(v), dtype=torch.float64) - coeff * torch.outer(v, v)) @ edited
    if mode == "full":
        lengths = edited.norm(dim=1, keepdim=True)
        edited = torch.where(lengths > 0, edited / lengths.clamp_min(1e-300), 0)
    if mode == "columns":
        lengths = edited.norm(dim=0)
        return edited * torch.where(lengths > 0, weight.norm(dim=0) / lengths.clamp_min(1e-300), 0)
    return edited if mode == "none" else norms * edited


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coeffs", [(1.0, 1.0, 1.0), (0.7, -0.2, 1.4), (0.5, 0.3)])
def test_factors_equal_the_dense_product(mode: str, coeffs: tuple[float, ...]) -> None:
    weight, vectors = make(count=len(coeffs))
    expected = dense_product(weight, vectors, coeffs, mode)
    prepared = prepare(METHODS[mode], lambda: weight, vectors)
    found = weight.double() + exact_factors(METHODS[mode], prepared, alone(len(coeffs)), coeffs).delta(weight).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    by_rows = by_definition(METHODS[mode], vectors, coeffs, chunk=128)(weight)
    torch.testing.assert_close(torch.cat([by_rows(slice(0, 9)), by_rows(slice(9, 24))]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_one_direction_gives_the_edit_of_before(mode: str) -> None:
    weight, vectors = make(count=4)
    method = METHODS[mode]
    prepared = prepare(method, lambda: weight, vectors)
    blend = Blend((1, 2), (0.6, 0.5))
    single = method.factors(prepared, blend, 0.9)
    through = exact_factors(method, prepared, [blend], [0.9])
    product = method.product(prepared, [blend], torch.tensor([0.9], dtype=torch.float64))
    for name in ("row_scale", "a", "b", "column_scale"):
        expected = getattr(single, name)
        assert (expected is None) == (getattr(product, name) is None)
        if expected is not None:
            assert torch.equal(getattr(through, name), expected)
            torch.testing.assert_close(getattr(product, name), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_laws(mode: str) -> None:
    """At λ = 1 the last direction is no longer written by `none`, and all are if they are orthogonal; `full` keeps norms."""
    weight, vectors = make(count=3)
    prepared = prepare(METHODS[mode], lambda: weight, vectors)
    edited = weight + exact_factors(METHODS[mode], prepared, alone(3), [1.0, 1.0, 1.0]).delta(weight)
    if mode == "full":
        torch.testing.assert_close(edited.norm(dim=1), weight.norm(dim=1), rtol=1e-5, atol=1e-6)
    if mode == "columns":
        torch.testing.assert_close(edited.norm(dim=0), weight.norm(dim=0), rtol=1e-5, atol=1e-6)
    if mode in ("none", "columns"):
        assert (vectors[2] @ edited.double()).abs().max() < 1e-4
        orthogonal = torch.linalg.qr(vectors.T).Q.T
        prepared = prepare(METHODS[mode], lambda: weight, orthogonal)
        edited = weight + exact_factors(METHODS[mode], prepared, alone(3), [1.0, 1.0, 1.0]).delta(weight)
        assert (orthogonal @ edited.double()).abs().max() < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_fused_experts_are_edited_matrix_by_matrix(mode: str) -> None:
    weight, vectors = make(count=2, experts=3)
    prepared = prepare(METHODS[mode], lambda: weight, vectors)
    found = weight + exact_factors(METHODS[mode], prepared, alone(2), [0.8, 1.2]).delta(weight)
    for matrix, edited in zip(weight, found, strict=True):
        expected = dense_product(matrix, vectors, [0.8, 1.2], mode)
        assert float((edited.double() - expected).norm() / expected.norm()) < 1e-6


def test_rows_along_a_direction_are_written_whole() -> None:
    """Directions nearly along rows leave next to nothing of these rows, which the closed form can't scale."""
    weight, _ = make()
    vectors = torch.eye(24, dtype=torch.float64)[[3, 7]] + 1e-4
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    prepared = prepare(METHODS["full"], lambda: weight, vectors)
    factors = exact_factors(METHODS["full"], prepared, alone(2), [1.0, 1.0])
    assert factors.a.shape[0] == 4
    expected = dense_product(weight, vectors, [1.0, 1.0], "full")
    assert float((weight.double() + factors.delta(weight).double() - expected).norm() / expected.norm()) < 1e-6


def test_the_product_is_differentiable() -> None:
    weight, vectors = make(8, 10, count=2)
    weight = weight.double()

    def delta(vectors: Tensor, coeffs: Tensor) -> Tensor:
        prepared = METHODS["full"].prepare(lambda: weight, vectors)
        factors = METHODS["full"].product(prepared, alone(2), coeffs)
        return factors.b.double() @ factors.a.double() + (factors.row_scale.double() - 1)[:, None] * weight

    inputs = (vectors.requires_grad_(True), torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True))
    # The factors are float32, so finite differences need large steps.
    assert torch.autograd.gradcheck(delta, inputs, eps=1e-2, atol=2e-2, rtol=2e-2)


def test_triangular_factor() -> None:
    """I − Vᵀ diag(λ) S V is the product itself."""
    _, vectors = make(count=4)
    coeffs = torch.tensor([0.3, 1.1, -0.5, 0.9], dtype=torch.float64)
    product = torch.eye(24, dtype=torch.float64)
    for v, coeff in zip(vectors, coeffs, strict=True):
        product = (torch.eye(24, dtype=torch.float64) - coeff * torch.outer(v, v)) @ product
    found = torch.eye(24, dtype=torch.float64) - vectors.T @ torch.diag(coeffs) @ one_after_another(vectors, coeffs) @ vectors
    torch.testing.assert_close(found, product, rtol=1e-12, atol=1e-13)


def test_offloaded_rows_give_the_same_bits() -> None:
    weight, vectors = make(count=4)
    prepared = prepare(METHODS["full"], lambda: weight, vectors)
    blends = [Blend((0, 2), (0.6, 0.5)), Blend((1, 3), (0.7, 0.4))]
    expected = exact_factors(METHODS["full"], prepared, blends, [0.9, 0.6])
    selected, places = prepared.parked().fetched(blends)
    found = exact_factors(METHODS["full"], selected, places, [0.9, 0.6])
    assert torch.equal(found.a, expected.a)
    assert torch.equal(found.b, expected.b)


def test_svd_representation_of_several_directions() -> None:
    weight, vectors = make(count=2)
    memo, prepared = SvdMemo(8), prepare(METHODS["full"], lambda: weight, vectors)
    full_rank = svd_factors(METHODS["full"], prepared, alone(2), [0.9, 0.6], "m", 24, memo)
    expected = dense_product(weight, vectors, [0.9, 0.6], "full")
    assert float((weight.double() + full_rank.delta(weight).double() - expected).norm() / expected.norm()) < 1e-4
    svd_factors(METHODS["full"], prepared, alone(2), [0.9, 0.6], "m", 24, memo)
    svd_factors(METHODS["full"], prepared, alone(2), [0.6, 0.9], "m", 24, memo)
    assert (memo.hits, memo.misses) == (1, 2)


def test_a_method_without_products_says_so() -> None:
    class Single(type(METHODS["none"])):  # type: ignore[misc]
        product = METHODS["none"].__class__.__mro__[1].product

    weight, vectors = make(count=2)
    method = Single()
    with pytest.raises(InputError, match="removes one direction, not 2"):
        exact_factors(method, prepare(method, lambda: weight, vectors), alone(2), [1.0, 1.0])
    with pytest.raises(InputError, match="removes one direction, not 3"):
        check_several(method, 3)
    check_several(method, 1)
    method.needs = "inputs"  # of which there are none before a run
    with pytest.raises(InputError, match="removes one direction, not 3"):
        check_several(method, 3)
    for mode in (*MODES, "key-conditional", "least-squares"):
        check_several(METHODS[mode], 3)
