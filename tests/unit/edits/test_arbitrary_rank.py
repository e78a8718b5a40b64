"""The arbitrary-rank edit: its objective and gradient against the plain dense form, and what the optimization must keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.directions import Blend, ModuleInputs
from abliterate.edits import METHODS, Factors, prepare, svd_factors
from abliterate.edits.arbitrary_rank import KEPT, ArbitraryRank, Numbers, Problem
from abliterate.edits.svd import SvdMemo
from abliterate.errors import InputError, TrialError
from abliterate.types import Range

D_OUT, D_IN, N = 24, 40, 9
BLEND = Blend((0,), (1.0,))
NUMBERS = Numbers(0.7, 0.05, 0.6, 3)


def make_inputs(n: int = N, d_in: int = D_IN) -> ModuleInputs:
    generator = torch.Generator().manual_seed(0)
    common, shift = 3 * torch.randn(d_in, generator=generator), torch.randn(d_in, generator=generator)
    harmful, harmless = (common + torch.randn(n, d_in, generator=generator) for _ in range(2))
    return ModuleInputs(harmful + shift, harmless)


def make_weight() -> Tensor:
    return torch.randn(D_OUT, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make_problem(inputs: ModuleInputs | None = None, weight: Tensor | None = None) -> Problem:
    method = METHODS["arbitrary-rank"].of(inputs or make_inputs())
    assert method is not None
    weight = make_weight() if weight is None else weight
    problem = prepare(method, lambda: weight, torch.eye(D_OUT, dtype=torch.float64)[:2])
    assert isinstance(problem, Problem)
    return problem


def dense(weight: Tensor, start: Tensor, inputs: ModuleInputs, numbers: Numbers) -> Tensor:
    """The objective as it is defined, row by row, on whole matrices."""
    good, bad = inputs.harmless.double(), inputs.harmful.double()
    y_good, y_bad = good @ start.T, bad @ start.T
    moved = bad @ weight.T
    drift = torch.nn.functional.mse_loss(good @ weight.T, y_good)
    pulls, pushes = [], []
    for i, row in enumerate(moved):
        to_good = torch.stack([(row - other).norm() for other in y_good]).sort().values
        to_bad = torch.stack([(row - other).norm() for j, other in enumerate(y_bad) if j != i]).sort().values
        pulls.append(to_good[: numbers.neighbours].mean())
        pushes.append(to_bad[: numbers.neighbours].mean())
    steer = torch.stack(pulls).mean() - numbers.overshoot * torch.stack(pushes).mean()
    return numbers.preserve * drift + numbers.steer * steer


@pytest.mark.parametrize("neighbours", [1, 3, 15])
def test_objective_and_gradient_are_those_of_the_plain_form(neighbours: int) -> None:
    inputs, start, problem = make_inputs(), make_weight(), make_problem()
    numbers = replace(NUMBERS, neighbours=neighbours)
    core = torch.randn(problem.u.shape[1], problem.q.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for scale in (0.0, 0.1, 1.0):  # at the start, too
        core_here = (scale * core).requires_grad_(True)
        weight = (start + problem.u @ core_here.detach() @ problem.q.T).requires_grad_(True)
        found, expected = problem.objective(core_here, numbers), dense(weight, start, inputs, numbers)
        assert float((found - expected).detach().abs()) < 1e-10 * max(1.0, float(expected.detach().abs()))
        (gradient,) = torch.autograd.grad(found, core_here)
        (plain,) = torch.autograd.grad(expected, weight)
        # The whole gradient of W is in the two bases, so nothing is lost in them.
        torch.testing.assert_close(problem.u @ gradient @ problem.q.T, plain, rtol=1e-10, atol=1e-10)


def lowered(numbers: Numbers) -> tuple[float, float, Factors]:
    """The plain objective before and after, and the factors."""
    inputs, start, problem = make_inputs(), make_weight(), make_problem()
    method = ArbitraryRank(inputs, numbers)
    factors = method.factors(problem, BLEND, 1.0)
    edited = start + factors.delta(start.float()).double()
    return float(dense(start, start, inputs, numbers)), float(dense(edited, start, inputs, numbers)), factors


def test_the_optimization_lowers_the_plain_objective() -> None:
    before, after, factors = lowered(NUMBERS)
    assert after < 0.8 * before
    assert factors.row_scale is None
    assert factors.a.shape[0] <= 2 * N
    assert {factors.a.dtype, factors.b.dtype} == {torch.float32}


def test_harmful_outputs_become_harmless_ones_and_harmless_ones_stay() -> None:
    inputs, start = make_inputs(), make_weight()
    _, _, factors = lowered(Numbers(1.0, 0.05, 0.0, 1))
    delta = factors.delta(start.float()).double()
    kept = inputs.harmless.double() @ delta.T
    assert float(kept.norm()) < 0.1 * float((inputs.harmless.double() @ start.T).norm())
    good = inputs.harmless.double() @ start.T

    def distance(weight: Tensor) -> float:
        return float(torch.cdist(inputs.harmful.double() @ weight.T, good).min(dim=1).values.mean())

    assert distance(start + delta) < 0.2 * distance(start)


def test_nothing_to_steer_leaves_the_matrix() -> None:
    _, _, factors = lowered(replace(NUMBERS, steer=0.0))
    assert not factors.delta(make_weight().float()).any()
    assert (factors.a.shape[0], factors.b.shape[1]) == (1, 1)


def test_a_zero_matrix_and_zero_inputs_are_left_alone() -> None:
    for problem in (
        make_problem(weight=torch.zeros(D_OUT, D_IN)),
        make_problem(ModuleInputs(torch.zeros(3, D_IN), torch.zeros(2, D_IN))),
    ):
        factors = ArbitraryRank(None, NUMBERS).factors(problem, BLEND, 1.0)
        assert not (factors.b @ factors.a).any()
        assert (factors.b @ factors.a).shape == (D_OUT, D_IN)


def test_one_harmful_prompt_has_no_other_to_be_pushed_from() -> None:
    inputs = make_inputs()
    problem = make_problem(ModuleInputs(inputs.harmful[:1], inputs.harmless))
    assert torch.isfinite(problem.objective(torch.zeros(problem.u.shape[1], problem.q.shape[1]).double(), NUMBERS))


def test_coeff_scales_the_change_and_solutions_are_kept() -> None:
    problem = make_problem()
    method = ArbitraryRank(make_inputs(), NUMBERS)
    one, half = (method.factors(problem, BLEND, coeff) for coeff in (1.0, 0.5))
    torch.testing.assert_close(half.b, 0.5 * one.b, rtol=1e-6, atol=1e-9)
    assert torch.equal(half.a, one.a)
    assert list(problem.solved) == [NUMBERS]
    again = ArbitraryRank(make_inputs(), NUMBERS).factors(make_problem(), BLEND, 1.0)  # found anew, bit for bit
    assert torch.equal(again.a, one.a)
    assert torch.equal(again.b, one.b)
    parked, blends = problem.parked().fetched([BLEND])
    assert torch.equal(method.factors(parked, blends[0], 1.0).b, one.b)
    for place in range(KEPT + 2):
        problem.solution(replace(NUMBERS, steer=0.0, preserve=place / 100))
    assert len(problem.solved) == KEPT
    assert problem.nbytes >= problem.u.nbytes


def test_the_svd_representation_has_nothing_to_approximate() -> None:
    method, problem = ArbitraryRank(make_inputs(), NUMBERS), make_problem()
    exact, found = method.factors(problem, BLEND, 1.0), svd_factors(method, problem, [BLEND], [1.0], "m", 3, SvdMemo(4))
    assert torch.equal(found.b, exact.b)


def test_a_few_ranks_hold_nearly_all_of_the_change() -> None:
    _, _, factors = lowered(NUMBERS)
    sizes = torch.linalg.svdvals((factors.b @ factors.a).double())
    shares = sizes.square().cumsum(0) / sizes.square().sum()
    assert int((shares < 0.99).sum()) + 1 < factors.a.shape[0]


def test_divergence_is_a_failed_trial() -> None:
    problem = make_problem()
    broken = replace(problem, outputs=torch.full_like(problem.outputs, torch.nan))
    with pytest.raises(TrialError, match="diverged"):
        ArbitraryRank(None, NUMBERS).factors(broken, BLEND, 1.0)


def test_a_change_of_many_times_the_matrix_is_a_failed_trial() -> None:
    """With an overshoot beyond 1 and nothing to preserve, the objective falls without end."""
    inputs = make_inputs()
    far, factors = Numbers(0.0, 1.0, 1.3, 1), lowered(NUMBERS)[2]
    with pytest.raises(TrialError, match="more than ten times its own size"):
        ArbitraryRank(inputs, far).factors(make_problem(), BLEND, 1.0)
    size = float(factors.delta(make_weight().float()).norm() / make_weight().norm())
    method, problem = ArbitraryRank(inputs, NUMBERS), make_problem()
    method.factors(problem, BLEND, 9.99 / size)
    for coeff in (10.01 / size, -10.01 / size):
        with pytest.raises(TrialError, match="more than ten times"):
            method.factors(problem, BLEND, coeff)


def test_numbers_of_a_trial() -> None:
    method = METHODS["arbitrary-rank"]
    middle = {name: wanted.middle for name, wanted in method.parameters.items()}  # type: ignore[attr-defined]
    assert middle == {"preserve": 0.5, "steer": pytest.approx(0.01), "overshoot": 0.65, "neighbours": 8}
    assert method.at(middle)._numbers == Numbers(0.5, middle["steer"], 0.65, 8)  # type: ignore[attr-defined]
    assert Range(0, 3, whole=True).middle == 2
    with pytest.raises(InputError, match="one direction"):
        method.product(make_problem(), [BLEND, BLEND], torch.ones(2))
