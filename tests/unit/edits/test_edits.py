"""Edits: factors against the dense float64 definition, algebraic laws, and the memoized SVD."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.directions import Directions
from abliterate.edits import (
    METHODS,
    EditMethod,
    Factors,
    SvdMemo,
    edit_method,
    needs_inputs,
    scales_columns,
    scales_rows,
    seed_of,
    svd_factors,
    svd_key,
    truncated_svd,
)
from abliterate.edits.svd import relative_error
from abliterate.errors import InputError, TrialError
from support.contracts import EditContract

MODES = [name for name in sorted(METHODS) if not needs_inputs(METHODS[name])]
COEFFS = [0.3, 1.0, 1.5]


def random_weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, as in trained models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, d_in, generator=generator) * torch.logspace(-2, 2, d_out)[:, None]


def random_directions(d_out: int, n_layers: int = 4, seed: int = 1) -> Directions:
    vectors = torch.randn(n_layers + 1, d_out, generator=torch.Generator().manual_seed(seed))
    return Directions(torch.nn.functional.normalize(vectors, dim=1))


def edited(method: EditMethod, weight: Tensor, directions: Directions, x: float, coeff: float) -> Tensor:
    """W' (float64) by the method's factors."""
    prepared = method.prepare(lambda: weight, directions.table())
    factors = method.factors(prepared, directions.blend(x), coeff)
    scale = factors.entry_scale()
    scaled = weight.double() if scale is None else scale.double() * weight.double()
    return scaled + factors.b.double() @ factors.a.double()


def unit(directions: Directions, x: float) -> Tensor:
    return directions.blend(x).of(directions.table().double())


def reference(method: EditMethod, weight: Tensor, directions: Directions, x: float, coeff: float) -> Tensor:
    return method.dense(weight.double(), unit(directions, x), coeff)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class TestFull(EditContract):
    """The default."""

    method = METHODS["full"]


class TestPre(EditContract):
    """Of the row-normalized matrix."""

    method = METHODS["pre"]


class TestColumns(EditContract):
    """Keeps the norms of columns."""

    method = METHODS["columns"]


class TestNone(EditContract):
    """Plain ablation."""

    method = METHODS["none"]


@pytest.mark.parametrize("mode", MODES)
def test_definitions_spelled_out(mode: str) -> None:
    """The reference itself against docs/design.md §4, entry by entry."""
    weight, v, coeff = random_weight(5, 6).double(), unit(random_directions(5), 1.0), 0.7
    n = [math.sqrt(sum(float(x) ** 2 for x in row)) for row in weight]
    plain = mode in ("none", "columns")
    base = [[float(x) / (1 if plain else n[i]) for x in row] for i, row in enumerate(weight)]
    along = [sum(float(v[i]) * base[i][j] for i in range(5)) for j in range(6)]
    rows = [[base[i][j] - coeff * float(v[i]) * along[j] for j in range(6)] for i in range(5)]
    if mode == "full":
        rows = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]
    if mode == "columns":
        shares = [math.sqrt(sum(row[j] ** 2 for row in base) / sum(row[j] ** 2 for row in rows)) for j in range(6)]
        rows = [[x * share for x, share in zip(row, shares, strict=True)] for row in rows]
    expected = [[x * (1 if plain else n[i]) for x in row] for i, row in enumerate(rows)]
    assert torch.allclose(METHODS[mode].dense(weight, v, coeff), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("coeff", COEFFS)
@pytest.mark.parametrize("mode", ["full", "pre"])  # plain ablation does write v's share into an empty row
def test_zero_rows_stay_zero(mode: str, coeff: float) -> None:
    weight, directions = random_weight(12, 20), random_directions(12)
    weight[[0, 5, 11]] = 0
    assert edited(METHODS[mode], weight, directions, 0.4, coeff)[[0, 5, 11]].count_nonzero() == 0


@pytest.mark.parametrize("coeff", [0.999, 1.0, 1.001])
@pytest.mark.parametrize("noise", [3e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
def test_full_along_nearly_one_hot_directions(noise: float, coeff: float) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = noise * torch.randn(3, 16, generator=generator)
    vectors[:, 7] = 1
    directions = Directions(torch.nn.functional.normalize(vectors, dim=1))
    weight = torch.randn(16, 24, generator=generator)
    found = edited(METHODS["full"], weight, directions, 0.0, coeff)
    expected = reference(METHODS["full"], weight, directions, 0.0, coeff)
    # Row by row, so that the row in question doesn't drown in the others.
    assert max(relative(found[i], expected[i]) for i in range(16)) <= 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_small_coeffs_approach_the_identity(mode: str) -> None:
    weight, directions = random_weight(10, 14), random_directions(10)
    distances = [
        relative(edited(METHODS[mode], weight, directions, 1.2, coeff), weight.double()) for coeff in (1e-1, 1e-2, 1e-3, 1e-9)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] == pytest.approx(distances[1] / 10, rel=0.1)
    assert distances[3] < 1e-7


@given(d_out=st.integers(2, 30), d_in=st.integers(1, 30), seed=st.integers(0, 99), x=st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_plain_ablation_writes_nothing_of_the_direction(d_out: int, d_in: int, seed: int, x: float) -> None:
    weight, directions = random_weight(d_out, d_in, seed), random_directions(d_out, seed=seed + 100)
    written = unit(directions, x) @ edited(METHODS["none"], weight, directions, x, 1.0)
    assert float(written.norm()) <= 1e-6 * float(weight.norm())


@given(d_out=st.integers(1, 30), d_in=st.integers(2, 30), seed=st.integers(0, 99), coeff=st.floats(0.1, 1.5))
@settings(max_examples=30, deadline=None)
def test_full_keeps_row_norms(d_out: int, d_in: int, seed: int, coeff: float) -> None:
    weight, directions = random_weight(d_out, d_in, seed), random_directions(d_out, seed=seed + 100)
    found = edited(METHODS["full"], weight, directions, 1.6, coeff)
    if d_out == 1 and abs(coeff - 1) < 1e-3:
        return  # the edit takes the whole row: no direction is left to keep
    assert torch.allclose(found.norm(dim=1), weight.double().norm(dim=1), rtol=1e-5)


def test_pre_equals_none_where_rows_have_one_norm() -> None:
    weight = torch.nn.functional.normalize(random_weight(9, 11), dim=1) * 3
    directions = random_directions(9)
    pair = [edited(METHODS[mode], weight, directions, 0.5, 0.8) for mode in ("pre", "none")]
    assert relative(*pair) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_prepared_factors_blend_linearly(mode: str) -> None:
    """Preparing the interpolated direction gives the interpolation of what was prepared."""
    weight, directions = random_weight(14, 18), random_directions(14)
    blend = directions.blend(1.3)
    v = unit(directions, 1.3)
    table = METHODS[mode].prepare(lambda: weight, directions.table())
    alone = METHODS[mode].prepare(lambda: weight, v[None])
    assert torch.allclose(blend.of(table.directions), alone.directions[0], atol=1e-14)
    assert relative(blend.of(table.a).double(), alone.a[0].double()) < 1e-6
    if mode == "full":
        assert relative(blend.of(table.p), alone.p[0]) < 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_a_trial_reads_no_weight(mode: str) -> None:
    weight, directions, reads = random_weight(12, 8), random_directions(12), []

    def read() -> Tensor:
        reads.append(1)
        return weight

    prepared = METHODS[mode].prepare(read, directions.table())
    assert reads == [1]
    METHODS[mode].factors(prepared, directions.blend(2.5), 1.0)
    assert reads == [1]


def test_edits_are_rank_one_and_float32() -> None:
    weight, directions = random_weight(12, 8), random_directions(12)
    for method in map(edit_method, MODES):
        factors = method.factors(method.prepare(lambda: weight, directions.table()), directions.blend(1.5), 1.0)
        assert (factors.a.shape, factors.b.shape) == ((1, 8), (12, 1))
        assert {tensor.dtype for tensor in factors.tensors()} == {torch.float32}
        assert (factors.row_scale is not None) == scales_rows(method) == (method.name == "full")
        assert (factors.column_scale is not None) == scales_columns(method) == (method.name == "columns")


def test_unknown_mode_names_those_there_are() -> None:
    assert edit_method("pre") is METHODS["pre"]
    with pytest.raises(InputError, match=r"fulll.*full"):
        edit_method("fulll")


# The svd representation.


def full_delta(rank_seed: int = 0) -> Tensor:
    weight, directions = random_weight(24, 40, rank_seed), random_directions(24)
    return (edited(METHODS["full"], weight, directions, 1.5, 1.0) - weight.double()).float()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_svd_is_close_to_the_best_of_its_rank(rank: int) -> None:
    delta = full_delta()
    best = math.sqrt(float((torch.linalg.svdvals(delta.double())[rank:] ** 2).sum())) / float(delta.norm())
    factors = truncated_svd(delta, rank, seed=3)
    assert (factors.a.shape, factors.b.shape) == ((rank, 40), (24, rank))
    assert best - 1e-6 <= relative_error(delta, factors) <= 1.01 * best + 1e-5


def test_svd_of_full_rank_is_exact() -> None:
    delta = full_delta()
    assert relative_error(delta, truncated_svd(delta, 100, seed=0)) < 1e-5
    assert relative_error(torch.zeros(4, 5), truncated_svd(torch.zeros(4, 5), 2, seed=0)) == 0.0


def test_svd_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    delta = full_delta()
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = truncated_svd(delta, 3, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    second = truncated_svd(delta, 3, seed=5)
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


def no_convergence(*args: object, **kwargs: object) -> None:
    raise torch.linalg.LinAlgError("did not converge")


def test_svd_falls_back_when_the_fast_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = full_delta()
    fast = truncated_svd(delta, 3, seed=0)
    monkeypatch.setattr(torch, "svd_lowrank", no_convergence)
    slow = truncated_svd(delta, 3, seed=0)
    assert slow.a.dtype == torch.float32
    assert relative(slow.b @ slow.a, fast.b @ fast.a) < 1e-3


def test_svd_falls_back_when_the_fast_one_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_nan(delta: Tensor, q: int, niter: int) -> tuple[Tensor, ...]:
        return tuple(torch.full(shape, math.nan) for shape in ((24, q), (q,), (40, q)))

    monkeypatch.setattr(torch, "svd_lowrank", all_nan)
    assert torch.isfinite(truncated_svd(full_delta(), 3, seed=0).a).all()


def test_a_failed_svd_restores_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "svd_lowrank", no_convergence)
    state = torch.random.get_rng_state()
    truncated_svd(full_delta(), 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_all_svds_failing_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "svd_lowrank", no_convergence)
    monkeypatch.setattr(torch.linalg, "svd", no_convergence)
    with pytest.raises(TrialError, match="converged"):
        truncated_svd(full_delta(), 3, seed=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_edit_that_is_not_finite_fails_the_trial(bad: float) -> None:
    delta = full_delta()
    delta[3, 4] = bad
    with pytest.raises(TrialError, match="not finite"):
        truncated_svd(delta, 3, seed=0)


def run_svd(memo: SvdMemo, coeff: float = 1.0, x: float = 1.5, module: str = "m", mode: str = "full") -> Factors:
    weight, directions = random_weight(24, 40), random_directions(24)
    prepared = METHODS[mode].prepare(lambda: weight, directions.table())
    return svd_factors(METHODS[mode], prepared, directions.blends(x), [coeff], module, 3, memo)


def test_memo_hit_equals_miss() -> None:
    memo = SvdMemo(8)
    miss, hit, fresh = run_svd(memo), run_svd(memo), run_svd(SvdMemo(0))
    assert (memo.hits, memo.misses, len(memo)) == (1, 1, 1)
    for factors in (hit, fresh):
        assert torch.equal(factors.a, miss.a)
        assert torch.equal(factors.b, miss.b)


def test_memo_of_size_zero_remembers_nothing() -> None:
    memo = SvdMemo(0)
    run_svd(memo)
    run_svd(memo)
    assert (memo.hits, memo.misses, len(memo)) == (0, 2, 0)


def test_memo_forgets_the_least_recently_used() -> None:
    memo, factors = SvdMemo(2), truncated_svd(full_delta(), 1, seed=0)
    memo.put("a", factors)
    memo.put("b", factors)
    assert memo.get("a") is factors
    memo.put("c", factors)
    assert [memo.get(key) is not None for key in "abc"] == [True, False, True]
    assert len(memo) == 2


def test_memo_bound_holds_over_many_keys() -> None:
    memo, factors = SvdMemo(5), truncated_svd(full_delta(), 1, seed=0)
    for key in range(50):
        memo.put(key, factors)
        assert len(memo) <= 5


def test_memo_tells_different_inputs_apart() -> None:
    memo = SvdMemo(100)
    inputs = [{}, {"coeff": 1.0 + 1e-15}, {"x": 1.5 + 1e-12}, {"module": "n"}]
    for given_inputs in inputs:
        run_svd(memo, **given_inputs)  # type: ignore[arg-type]
    assert (memo.hits, memo.misses) == (0, len(inputs))


def test_key_holds_every_input() -> None:
    v = torch.nn.functional.normalize(torch.arange(1.0, 65.0), dim=0)
    other = v.clone()
    other[37] = torch.nextafter(other[37], torch.tensor(1.0))
    keys = [
        svd_key("m", "full", v, [1.0], 3),
        svd_key("m", "full", other, [1.0], 3),
        svd_key("n", "full", v, [1.0], 3),
        svd_key("m", "pre", v, [1.0], 3),
        svd_key("m", "full", v, [math.nextafter(1.0, 2.0)], 3),
        svd_key("m", "full", v, [1.0], 4),
        svd_key("m", "full", v, [1.0], 3, [("p", 0.5)]),
        svd_key("m", "full", v, [1.0], 3, [("p", 0.6)]),
    ]
    assert len(set(keys)) == len(keys)
    assert len({seed_of(key) for key in keys}) == len(keys)
    assert svd_key("m", "full", v.clone(), [1.0], 3) == keys[0]


def test_rank_one_edits_are_not_approximated() -> None:
    memo = SvdMemo(4)
    factors = run_svd(memo, mode="none")
    assert factors.a.shape[0] == 1
    assert (memo.hits, memo.misses) == (0, 0)
