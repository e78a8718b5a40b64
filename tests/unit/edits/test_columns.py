"""`columns`: its laws in float64, columns along the direction, and its factors in passes of a half-precision model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abliterate.directions import Blend
from abliterate.edits import METHODS, Factors, prepare
from abliterate.edits.fingerprint import sketch
from abliterate.export.check_behaviour import storage_rounding
from abliterate.export.check_weights import by_definition, by_factors
from abliterate.export.merged import edited_rows
from support.models import dense_edit

COLUMNS = METHODS["columns"]
ALONE = Blend((0,), (1.0,))


def made(d_out: int = 24, d_in: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with columns of very different norms, one of them zero, and a unit direction, both float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64) * torch.logspace(
        -2, 2, d_in, dtype=torch.float64
    )
    weight[:, 5] = 0
    v = torch.randn(d_out, generator=generator, dtype=torch.float64)
    return weight, v / v.norm()


@pytest.mark.parametrize("coeff", [0.3, 1.0, 1.5, -0.4])
def test_column_norms_are_kept_and_nothing_of_the_direction_is_written(coeff: float) -> None:
    weight, v = made()
    edited = COLUMNS.dense(weight, v, coeff)
    torch.testing.assert_close(edited.norm(dim=0), weight.norm(dim=0), rtol=1e-12, atol=1e-12)
    assert coeff != 1.0 or float((v @ edited).abs().max()) < 1e-12
    torch.testing.assert_close(edited, dense_edit(weight, v, coeff, "columns"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coeff", [0.3, 1.0, 1.5, -0.4])
def test_the_closed_form_is_the_definition(coeff: float) -> None:
    """s_j = √(1 − (2λ − λ²) c_j²/‖W_j‖²) in float64, by the factors' own formula."""
    weight, v = made()
    factors = COLUMNS.factors(COLUMNS.prepare(lambda: weight, v[None]), ALONE, coeff)
    c, norms = v @ weight, weight.norm(dim=0)
    s = (1 - (2 * coeff - coeff**2) * c**2 / norms.square().clamp_min(1e-300)).sqrt()
    torch.testing.assert_close(
        weight / s - coeff * torch.outer(v, c / s), COLUMNS.dense(weight, v, coeff), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(factors.column_scale, (1 / s).float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(factors.a[0], (c / s).float(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rest", [0.0, 1e-9, 1e-4, 1e-2, 0.05])
def test_columns_along_the_direction_are_written_whole_or_vanish(rest: float) -> None:
    weight, v = made()
    across = torch.linalg.qr(torch.stack([v, weight[:, 0]], dim=1)).Q[:, 1]
    weight[:, 7], weight[:, 30] = 3 * v + 3 * rest * across, -v
    prepared = prepare(COLUMNS, lambda: weight, v[None])
    factors = COLUMNS.factors(prepared, ALONE, 1.0)
    found = weight + factors.delta(weight).double()
    assert factors.a.shape == (3, 40)
    assert float(found[:, 30].norm()) < 1e-6
    # 1e-9 is beyond float32: no direction is known of such a rest, so it isn't blown up.
    whole = 3 * (1 + rest**2) ** 0.5 * across if rest > 1e-6 else torch.zeros_like(v)
    torch.testing.assert_close(found[:, 7], whole, rtol=1e-5, atol=1e-5)
    expected = COLUMNS.dense(weight, v, 1.0)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_a_row_and_a_column_scale_at_once() -> None:
    weight, _ = made(6, 8)
    rows, columns = torch.rand(6) + 0.5, torch.rand(8) + 0.5
    factors = Factors(rows, torch.randn(2, 8), torch.randn(6, 2), columns)
    expected = torch.diag(rows).double() @ weight @ torch.diag(columns).double() + factors.b.double() @ factors.a.double()
    torch.testing.assert_close(weight + factors.delta(weight).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_factors(factors)(weight)(slice(2, 5)), expected[2:5], rtol=1e-6, atol=1e-6)
    both = Factors.stacked([factors, Factors(rows, factors.a[:1], factors.b[:, :1], columns)]).to("cpu")
    assert all(torch.equal(one, other) for one, other in zip(both.parts()[0].tensors(), factors.tensors(), strict=True))


def test_exports_and_their_checks_read_the_column_scale() -> None:
    weight, v = made()
    weight = weight.float()
    factors = COLUMNS.factors(prepare(COLUMNS, lambda: weight, v[None]), ALONE, 0.8)
    expected = dense_edit(weight, v, 0.8, "columns")
    by_rows = by_definition(COLUMNS, v[None], [0.8], chunk=160)(weight)
    for rows in (slice(0, 9), slice(9, 24)):
        torch.testing.assert_close(edited_rows(weight[rows], factors, rows).double(), expected[rows], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(by_rows(rows), expected[rows], rtol=1e-12, atol=1e-12)
    assert sketch(factors)[0] == pytest.approx(float((factors.b @ factors.a).norm()), rel=1e-6)
    x = torch.randn(1, 40)
    lost = storage_rounding(weight, factors, x, torch.bfloat16, is_base=True)
    assert 0 < float(lost.norm()) < 0.02 * float((x.double() @ expected.T).norm())
