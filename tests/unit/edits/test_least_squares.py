"""The least-squares edit: its closed form against the minimum that defines it, and the laws that it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.directions import Blend, ModuleInputs
from abliterate.edits import METHODS, exact_factors, needs_answers, needs_inputs, prepare
from abliterate.edits.least_squares import KEPT, RIDGE, LeastSquares
from support.contracts import EditContract

D_IN, D_OUT = 40, 24


def make_inputs(d_in: int = D_IN, along: int = 30) -> ModuleInputs:
    """Inputs with a large part in common, as those of real modules have, and more of them than the width in all."""
    generator = torch.Generator().manual_seed(0)
    common = 5 * torch.randn(d_in, generator=generator)
    harmful, harmless, later = (common + torch.randn(n, d_in, generator=generator) for n in (12, 9, max(along, 1)))
    return ModuleInputs(harmful, harmless, later if along else None)


def make_weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=generator)
    return weight, torch.nn.functional.normalize(torch.randn(D_OUT, dtype=torch.float64, generator=generator), dim=0)


def of(inputs: ModuleInputs) -> LeastSquares:
    method = METHODS["least-squares"].of(inputs)
    assert isinstance(method, LeastSquares)
    return method


class _OfWidth(LeastSquares):
    """The method for whatever module it is given, with inputs of that width, because the contract uses many shapes."""

    def prepare(self, read_weight, directions):  # type: ignore[no-untyped-def]
        return of(make_inputs(read_weight().shape[-1])).prepare(read_weight, directions)

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return of(make_inputs(rows.shape[-1])).along(rows, v)


class TestContract(EditContract):
    """With inputs of each matrix's width."""

    method = _OfWidth()


def loss(a: Tensor, weight: Tensor, v: Tensor, inputs: ModuleInputs) -> Tensor:
    """What a (d_in) minimizes, as the module's docstring has it."""
    sets = [rows.double() for rows in (inputs.harmful, inputs.harmless, inputs.along) if rows is not None]
    kept = sum((KEPT * (rows @ a).square().mean() for rows in sets[1:]), torch.zeros((), dtype=torch.float64))
    scaled = [sets[0].square().sum() / len(sets[0]), *(KEPT * rows.square().sum() / len(rows) for rows in sets[1:])]
    return (sets[0] @ (a - v @ weight)).square().mean() + kept + RIDGE * sum(scaled) * a.square().sum()


@pytest.mark.parametrize("along", [0, 30])
def test_it_is_the_minimum_that_defines_it(along: int) -> None:
    inputs, (weight, v) = make_inputs(along=along), make_weight()
    keys, selector = LeastSquares().solved(inputs)
    a = (v @ weight @ keys.T @ selector).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(a, weight, v, inputs), a)
    (at_zero,) = torch.autograd.grad(loss(zero := torch.zeros_like(a).requires_grad_(), weight, v, inputs), zero)
    assert float(gradient.norm()) < 1e-9 * float(at_zero.norm())  # the loss is convex, so this is its minimum
    for strength in (1.0, 4.0):
        expected = -strength * torch.outer(v, a.detach())
        torch.testing.assert_close(of(inputs).dense(weight, v, strength) - weight, expected, rtol=1e-5, atol=1e-5)
    prepared = prepare(of(inputs), lambda: weight.float(), v[None])
    found = exact_factors(of(inputs), prepared, [Blend((0,), (1.0,))], [4.0])
    assert found.row_scale is None
    torch.testing.assert_close(found.delta(weight).double(), expected, rtol=1e-4, atol=1e-5)


def test_as_many_equations_as_inputs_give_what_as_many_as_columns_give() -> None:
    inputs = make_inputs()
    keys, selector = LeastSquares().solved(inputs)
    x = inputs.harmful.double().T / len(inputs.harmful) ** 0.5
    b = torch.cat([KEPT**0.5 * rows.double().T / len(rows) ** 0.5 for rows in (inputs.harmless, inputs.along)], dim=1)  # type: ignore[union-attr]
    whole = x @ x.T + b @ b.T
    ridge = RIDGE * whole.diagonal().sum() * torch.eye(D_IN, dtype=torch.float64)
    torch.testing.assert_close(keys.T, x)
    torch.testing.assert_close(selector, torch.linalg.solve(whole + ridge, x).T, rtol=1e-8, atol=1e-10)


def test_laws() -> None:
    """Harmless inputs hardly move, those along answers as little; scale and order of the inputs don't matter."""
    inputs, (weight, v) = make_inputs(), make_weight()
    delta = of(inputs).dense(weight, v, 1.0) - weight

    def moved(rows: Tensor) -> float:
        return float((rows.double() @ delta.T).square().mean() / (rows.double() @ weight.T @ v).square().mean())

    assert inputs.along is not None
    assert moved(inputs.harmless) < 0.03 * moved(inputs.harmful)
    assert moved(inputs.along) < 0.03 * moved(inputs.harmful)
    without = of(replace(inputs, along=None)).dense(weight, v, 1.0) - weight
    later = inputs.along.double()
    assert (later @ delta.T).norm() < 0.5 * (later @ without.T).norm()
    same = ModuleInputs(64 * inputs.harmful.flip(0), 64 * inputs.harmless.flip(0), 64 * inputs.along.flip(0))
    torch.testing.assert_close(of(same).dense(weight, v, 1.0) - weight, delta, rtol=1e-4, atol=1e-5)
    # What harmful inputs don't reach isn't edited, and without harmless ones what they do reach is removed, but for the ridge.
    assert METHODS["least-squares"].of(replace(inputs, harmful=torch.zeros(3, D_IN))) is None
    alone = of(ModuleInputs(inputs.harmful, torch.zeros(2, D_IN))).dense(weight, v, 1.0)
    before = inputs.harmful.double() @ weight.T @ v
    assert (inputs.harmful.double() @ alone.T @ v).norm() < 0.05 * before.norm()


def test_which_modes_need_answers() -> None:
    assert {name for name in METHODS if needs_answers(METHODS[name])} == {"key-conditional", "least-squares"}
    assert {name for name in METHODS if needs_inputs(METHODS[name])} == {"key-conditional", "least-squares", "arbitrary-rank"}


def test_directions_that_few_inputs_have_are_left_out() -> None:
    """Of two directions that only harmful prompts have, the one that all of them share counts, and the rare one hardly does."""
    shared, rare = 3 * torch.eye(D_IN)[0], 0.05 * torch.eye(D_IN)[1]
    common = 5 * torch.eye(D_IN)[2]
    harmful = torch.stack([common + shared + sign * rare for sign in (1, -1, 1, -1)])
    inputs = ModuleInputs(harmful, common.expand(3, -1).clone(), common.expand(3, -1).clone())
    weight, v = make_weight()
    delta = of(inputs).dense(weight, v, 1.0) - weight

    def lost(x: Tensor) -> float:
        return float(-(v @ delta @ x.double()) / (v @ weight @ x.double()))

    assert 0.9 < lost(common + shared) < 1
    assert 0 < lost(rare) < 0.05
