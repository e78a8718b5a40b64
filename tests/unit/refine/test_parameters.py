"""Gradients of strengths and directions through the edits' factors, against finite differences of the dense definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.directions import ModuleInputs
from abliterate.edits import METHODS, EditMethod, Factors, is_learned, needs_inputs
from abliterate.edits.base import project, project_back
from abliterate.refine.parameters import Module, Parameters

MODES = [mode for mode in sorted(METHODS) if not is_learned(METHODS[mode])]
D_MODEL, D_IN, EXPERTS = 12, 20, 3


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(method: EditMethod, weights: list[Tensor], coeffs: list[float]) -> Parameters:
    modules = [Module(f"m{index}", index, lambda weight=weight: weight) for index, weight in enumerate(weights)]  # type: ignore[misc]
    directions = torch.nn.functional.normalize(seeded(len(weights), D_MODEL, seed=7), dim=1)
    return Parameters(modules, method, torch.tensor(coeffs, dtype=torch.float64), directions)


def dense(method: EditMethod, weight: Tensor, v: Tensor, coeff: Tensor) -> Tensor:
    """W' by definition; of fused experts each matrix."""
    parts = weight if weight.ndim == 3 else weight[None]
    edited = torch.stack([method.dense(part, v / v.norm(), coeff) for part in parts])  # type: ignore[arg-type]
    return edited if weight.ndim == 3 else edited[0]


def finite_difference(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of `function` by central differences."""
    gradient = torch.zeros_like(at)
    for index in range(at.numel()):
        offset = torch.zeros_like(at).view(-1)
        offset[index] = step
        offset = offset.view(at.shape)
        gradient.view(-1)[index] = (function(at + offset) - function(at - offset)) / (2 * step)
    return gradient


def method_of(mode: str) -> EditMethod:
    """The method, for a module with random inputs if it needs any."""
    method: EditMethod | None = METHODS[mode]
    if needs_inputs(METHODS[mode]):
        method = METHODS[mode].of(ModuleInputs(seeded(4, D_IN, seed=8).float(), seeded(3, D_IN, seed=9).float()))
    assert method is not None
    return method


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_equal_finite_differences_of_the_definition(mode: str, fused: bool) -> None:
    method = method_of(mode)
    shape = (EXPERTS, D_MODEL, D_IN) if fused else (D_MODEL, D_IN)
    weights, goals = [seeded(*shape, seed=k) for k in (1, 2)], [seeded(*shape, seed=k) for k in (3, 4)]
    parameters = made(method, weights, [0.4, 1.1])
    # Any function of W' will do; this one weights its entries.
    factors = parameters.factors()
    totals = [(goal * edited(weight, each)).sum() for goal, weight, each in zip(goals, weights, factors.values(), strict=True)]
    gradients = {
        name: list(torch.autograd.grad(total, each.tensors()))
        for total, (name, each) in zip(totals, factors.items(), strict=True)
    }
    parameters.pull_back(gradients)
    for index, (weight, goal) in enumerate(zip(weights, goals, strict=True)):
        v, coeff = parameters.directions[index], parameters.coeffs[index]
        of_v = finite_difference(lambda at, w=weight, c=coeff, g=goal: float((g * dense(method, w, at, c)).sum()), v)  # type: ignore[misc]
        of_coeff = finite_difference(lambda at, w=weight, v=v, g=goal: float((g * dense(method, w, v, at)).sum()), coeff)  # type: ignore[misc]
        assert parameters.directions.grad is not None
        assert parameters.coeffs.grad is not None
        # Factors are float32, so gradients agree to about 1e-6 of their size.
        torch.testing.assert_close(parameters.directions.grad[index], of_v, rtol=1e-4, atol=1e-4 * float(of_v.abs().max()))
        torch.testing.assert_close(parameters.coeffs.grad[index], of_coeff, rtol=1e-4, atol=1e-4 * abs(float(of_coeff)))


def dense_product(method: EditMethod, weight: Tensor, rows: Tensor, coeff: Tensor) -> Tensor:
    """W' of one matrix by definition: row after row is removed, and the rows' norms are weights."""
    rows, norms, normalize = rows / rows.norm(), weight.norm(dim=1, keepdim=True), torch.nn.functional.normalize
    by_rows = method.name in ("full", "pre")
    found = weight / norms if by_rows else weight
    for row in rows:
        weighted = row.norm()
        found = found - coeff * weighted * torch.outer(row / weighted, row / weighted @ found)
    if by_rows:
        return norms * (normalize(found, dim=1) if method.name == "full" else found)
    if method.name == "columns":
        return weight.norm(dim=0) * normalize(found, dim=0)
    return weight + method._selected(found - weight) if needs_inputs(method) else found  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_two_directions_and_their_weights(mode: str, fused: bool) -> None:
    method, shape = method_of(mode), (EXPERTS, D_MODEL, D_IN) if fused else (D_MODEL, D_IN)
    weight, goal = seeded(*shape, seed=1), seeded(*shape, seed=3)
    parameters = several(method, weight, 2)
    rows, coeff = parameters.directions[0].clone(), parameters.coeffs[0].clone()

    def total(rows: Tensor, coeff: Tensor) -> float:
        parts = zip(weight.view(-1, D_MODEL, D_IN), goal.view(-1, D_MODEL, D_IN), strict=True)
        return sum(float((own * dense_product(method, part, rows, coeff)).sum()) for part, own in parts)

    factors = parameters.factors()["m0"]
    found = (goal * edited(weight, factors)).sum()
    assert float(found.detach()) == pytest.approx(total(rows, coeff), rel=1e-5)
    parameters.pull_back({"m0": list(torch.autograd.grad(found, factors.tensors()))})
    assert parameters.directions.grad is not None
    assert parameters.coeffs.grad is not None
    of_rows = finite_difference(lambda at: total(at, coeff), rows)
    of_coeff = finite_difference(lambda at: total(rows, at), coeff)
    torch.testing.assert_close(parameters.directions.grad[0], of_rows, rtol=1e-4, atol=1e-4 * float(of_rows.abs().max()))
    torch.testing.assert_close(parameters.coeffs.grad[0], of_coeff, rtol=1e-4, atol=1e-4 * abs(float(of_coeff)))
    assert abs(float((parameters.directions.grad[0] * rows).sum())) < 1e-9  # tangent to the sphere


def several(method: EditMethod, weight: Tensor, count: int) -> Parameters:
    """One module with several directions of different weights."""
    rows = seeded(1, count, D_MODEL, seed=7)
    parameters = Parameters([Module("m0", 0, lambda: weight)], method, torch.tensor([0.7], dtype=torch.float64), rows)
    parameters.normalize()
    return parameters


@pytest.mark.parametrize("mode", MODES)
def test_a_row_that_is_zero_changes_nothing_and_stays_zero(mode: str) -> None:
    weight = seeded(D_MODEL, D_IN, seed=1)
    parameters = several(method_of(mode), weight, 3)
    parameters.directions[0, 1] = 0
    parameters.normalize()
    without = replace(parameters, directions=parameters.directions[:, [0, 2]].clone())
    for found, expected in zip(*(each.factors()["m0"].tensors() for each in (parameters, without)), strict=True):
        assert torch.equal(found, expected)
    parameters.pull_back({"m0": [torch.ones_like(tensor) for tensor in parameters.factors()["m0"].tensors()]})
    assert parameters.directions.grad is not None
    assert parameters.directions.grad[0, 1].count_nonzero() == 0
    assert torch.isfinite(parameters.directions.grad).all()


@pytest.mark.parametrize("mode", MODES)
def test_one_row_is_one_direction(mode: str) -> None:
    weight = seeded(D_MODEL, D_IN, seed=1)
    row = several(method_of(mode), weight, 1)
    alone = replace(row, directions=row.directions[:, 0].clone())
    for found, expected in zip(*(each.factors()["m0"].tensors() for each in (row, alone)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def edited(weight: Tensor, factors: Factors) -> Tensor:
    """diag(row_scale) W diag(column_scale) + b a, differentiable in the factors."""
    scaled = weight if factors.row_scale is None else factors.row_scale.double()[..., None] * weight
    scaled = scaled if factors.column_scale is None else factors.column_scale.double()[..., None, :] * scaled
    return scaled + factors.b.double() @ factors.a.double()


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_is_tangent_to_the_sphere(mode: str) -> None:
    parameters = made(method_of(mode), [seeded(D_MODEL, D_IN)], [0.7])
    factors = parameters.factors()
    parameters.pull_back({"m0": [torch.ones_like(tensor) for tensor in factors["m0"].tensors()]})
    assert parameters.directions.grad is not None
    assert parameters.directions.grad.abs().max() > 1e-3
    assert abs(float(parameters.directions.grad[0] @ parameters.directions[0])) < 1e-9


def test_unused_factors_have_no_share() -> None:
    parameters = made(METHODS["full"], [seeded(D_MODEL, D_IN)], [0.7])
    parameters.pull_back({"m0": [None, None, torch.ones(D_MODEL, 1)]})
    assert parameters.coeffs.grad is not None
    assert parameters.coeffs.grad.abs().item() > 1e-6


@pytest.mark.parametrize("scaled", [False, True])
def test_projections_are_each_others_adjoint(scaled: bool) -> None:
    weight = seeded(300, 5)  # several chunks of rows
    scale = seeded(300, seed=2).abs() if scaled else None
    matrix = weight if scale is None else scale[:, None] * weight
    directions, gradient = seeded(2, 300, seed=3).requires_grad_(True), seeded(2, 5, seed=4)
    found = project(directions, weight, scale)
    torch.testing.assert_close(found, directions @ matrix)
    torch.testing.assert_close(torch.autograd.grad((found * gradient).sum(), directions)[0], gradient @ matrix.T)
    a, gradient = seeded(2, 5, seed=5).requires_grad_(True), seeded(2, 300, seed=6)
    found = project_back(a, weight, scale)
    torch.testing.assert_close(found, a @ matrix.T)
    torch.testing.assert_close(torch.autograd.grad((found * gradient).sum(), a)[0], gradient @ matrix)
