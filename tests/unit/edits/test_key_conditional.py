"""The key-conditional edit: its closed form against a dense solve, and the laws that it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from abliterate.directions import Blend, Directions, Keys, ModuleInputs
from abliterate.directions.inputs import from_tensors, to_tensors
from abliterate.edits import METHODS, exact_factors, prepare
from abliterate.edits.key_conditional import ENERGY, KEYS, RIDGE, KeyConditional
from support.contracts import EditContract

D_IN = 40


def make_inputs(d_in: int = D_IN, n: int = 12, seed: int = 0) -> ModuleInputs:
    """Inputs with a large part in common, as those of real modules have."""
    generator = torch.Generator().manual_seed(seed)
    common = 5 * torch.randn(d_in, generator=generator)
    harmful, harmless = (common + torch.randn(n, d_in, generator=generator) for _ in range(2))
    return ModuleInputs(harmful, harmless)


class _OfWidth(KeyConditional):
    """The method for whatever module it is given, with inputs of that width, because the contract uses many shapes."""

    def prepare(self, read_weight, directions):  # type: ignore[no-untyped-def]
        return _bound(read_weight().shape[-1]).prepare(read_weight, directions)

    def along(self, rows: Tensor, v: Tensor) -> Tensor:
        return _bound(rows.shape[-1]).along(rows, v)


def _bound(d_in: int) -> KeyConditional:
    keys = Keys(torch.eye(d_in), torch.eye(d_in))
    return KeyConditional(KeyConditional().reduced(make_inputs(d_in)) if d_in >= 8 else keys)


class TestContract(EditContract):
    """With keys of each matrix's width."""

    method = _OfWidth()


def harmless_basis(inputs: ModuleInputs) -> Tensor:
    """Q (d_in, q) float64, the leading left singular vectors of the harmless inputs as columns, at most half of the space."""
    sets = [rows.double().T / len(rows) ** 0.5 for rows in (inputs.harmless, inputs.along) if rows is not None]
    u, _, _ = torch.linalg.svd(torch.cat(sets, dim=1), full_matrices=False)
    return u[:, : D_IN // 2]


def dense(weight: Tensor, k: Tensor, q: Tensor, v: Tensor, strength: float) -> Tensor:
    """ΔW = L C as the issue writes it, with every matrix whole."""
    projected = k - q @ q.T @ k
    energy = torch.linalg.matrix_norm(projected) ** 2
    ridge = RIDGE * energy / k.shape[1] * torch.eye(k.shape[1], dtype=torch.float64)
    c = torch.linalg.inv(k.T @ projected + ridge) @ projected.T
    return -strength * torch.outer(v, v @ weight @ k) @ c


def unit(d: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(
        torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=0
    )


@pytest.mark.parametrize(("strength", "along"), [(1.0, 0), (4.0, 0), (8.0, 30)])
def test_closed_form(strength: float, along: int) -> None:
    inputs = make_inputs()
    if along:
        inputs = replace(inputs, along=make_inputs(n=along, seed=1).harmless)
    keys, selector = KeyConditional().solved(inputs)
    weight, v = torch.randn(24, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), unit(24, 4)
    expected = dense(weight, keys.T, harmless_basis(inputs), v, strength)
    torch.testing.assert_close(-strength * torch.outer(v, v @ weight @ keys.T @ selector), expected, rtol=1e-10, atol=1e-12)
    method = METHODS["key-conditional"].of(inputs)
    assert method is not None
    torch.testing.assert_close(method.dense(weight, v, strength) - weight, expected, rtol=1e-5, atol=1e-5)
    prepared = prepare(method, lambda: weight.float(), v[None])
    found = exact_factors(method, prepared, [Blend((0,), (1.0,))], [strength])
    assert found.row_scale is None
    assert found.a.shape == (1, D_IN)
    torch.testing.assert_close(found.delta(weight).double(), expected, rtol=1e-5, atol=1e-5)


def test_laws() -> None:
    """ΔW Q = 0; outputs keep everything but v; harmful inputs are changed, and harmless ones aren't, to rounding of float32."""
    inputs = make_inputs()
    basis, method = harmless_basis(inputs), METHODS["key-conditional"].of(inputs)
    assert method is not None
    weight, v = torch.randn(24, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), unit(24, 4)
    _, selector = KeyConditional().solved(inputs)
    assert basis.shape == (D_IN, 12)
    assert (selector @ basis).abs().max() < 1e-12
    delta = method.dense(weight, v, 1.0) - weight
    assert (delta @ basis).abs().max() < 1e-5
    assert (delta - torch.outer(v, v @ delta)).abs().max() < 1e-12
    harmful, harmless = (rows.double() @ delta.T @ v for rows in (inputs.harmful, inputs.harmless))
    assert harmless.abs().max() < 1e-4
    # At strength 1 and with a small ridge, a harmful input loses nearly all that is written of it along v.
    before = inputs.harmful.double() @ weight.T @ v
    assert float((before + harmful).norm()) < 0.1 * float(before.norm())


def test_twice_the_strength_is_twice_the_edit_and_scale_does_not_matter() -> None:
    inputs = make_inputs()
    weight, v = torch.randn(24, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), unit(24, 4)
    method = METHODS["key-conditional"].of(inputs)
    scaled = METHODS["key-conditional"].of(ModuleInputs(64 * inputs.harmful, 0.25 * inputs.harmless))
    assert method is not None
    assert scaled is not None
    one = method.dense(weight, v, 1.0) - weight
    torch.testing.assert_close(method.dense(weight, v, 2.0) - weight, 2 * one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.dense(weight, v, 1.0) - weight, one, rtol=1e-5, atol=1e-5)


def test_harmful_inputs_within_the_span_of_harmless_ones_allow_no_edit() -> None:
    inputs = make_inputs()
    assert METHODS["key-conditional"].of(ModuleInputs(inputs.harmless.flip(0), inputs.harmless)) is None
    mixed = torch.randn(12, 12, generator=torch.Generator().manual_seed(1)) @ inputs.harmless
    nearly = mixed + 1e-5 * torch.randn(12, D_IN, generator=torch.Generator().manual_seed(2))
    assert METHODS["key-conditional"].of(ModuleInputs(nearly, inputs.harmless)) is None
    assert ENERGY == 1e-6
    zero = torch.zeros(3, D_IN)
    assert METHODS["key-conditional"].of(ModuleInputs(zero, inputs.harmless)) is None
    assert METHODS["key-conditional"].of(ModuleInputs(inputs.harmful, zero)) is not None


def test_sizes() -> None:
    """At most 16 keys, of narrow modules at most half of the space for harmless inputs."""
    keys = KeyConditional().reduced(make_inputs(n=60))
    assert keys.keys.shape == keys.selector.shape == (KEYS, D_IN)
    u, _, _ = torch.linalg.svd(make_inputs(n=60).harmless.double().T, full_matrices=False)
    seen = (keys.selector.double() @ u).norm(dim=0)
    assert seen[: D_IN // 2].max() < 1e-6
    assert seen[D_IN // 2 :].min() > 1e-4
    assert KeyConditional().reduced(make_inputs(n=3)).keys.shape == (3, D_IN)


def test_several_directions_are_removed_one_after_another() -> None:
    inputs = make_inputs()
    (keys, selector), method = KeyConditional().solved(inputs), METHODS["key-conditional"].of(inputs)
    assert method is not None
    weight = torch.randn(24, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    table, coeffs = torch.stack([unit(24, 5), unit(24, 6)]), [1.5, 0.7]
    prepared = prepare(method, lambda: weight.float(), table)
    found = exact_factors(method, prepared, [Blend((0,), (1.0,)), Blend((1,), (1.0,))], coeffs).delta(weight).double()
    removed = weight
    for v, coeff in zip(table, coeffs, strict=True):
        removed = removed - coeff * torch.outer(v, v @ removed)
    torch.testing.assert_close(found, (removed - weight) @ keys.T @ selector, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("harmful", "harmless", "why"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), "same width"),
        (torch.full((2, 3), torch.nan), torch.zeros(2, 3), "finite"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "float32"),
        (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3), "float32"),
        (torch.zeros(2000, 3), torch.zeros(2, 3), "1024"),
        (torch.zeros(3), torch.zeros(2, 3), "float32"),
    ],
)
def test_inputs_of_a_strangers_file(harmful: Tensor, harmless: Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ModuleInputs(harmful, harmless)
    assert Directions(torch.ones(2, 3)).inputs == {}


def test_keys_of_a_strangers_file() -> None:
    with pytest.raises(ValueError, match="as many as the rows of C"):
        Keys(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="finite"):
        Keys(torch.zeros(2, 3), torch.full((2, 3), torch.nan))


def test_inputs_as_tensors_are_in_one_order_and_the_same_again() -> None:
    rows = [torch.randn(count, 3, generator=torch.Generator().manual_seed(count)) for count in (2, 4, 5)]
    inputs = {"b": ModuleInputs(*rows), "a": ModuleInputs(*rows[:2]), "c": Keys(rows[0], rows[0])}
    tensors = to_tensors(inputs)
    assert list(tensors) == sorted(tensors)
    again = from_tensors(dict(reversed(tensors.items())))
    assert list(to_tensors(again)) == list(tensors)
    assert again.keys() == inputs.keys()
    for name, own in inputs.items():
        assert type(again[name]) is type(own)
        for part, tensor in vars(own).items():
            found = getattr(again[name], part)
            assert found is tensor or torch.equal(found, tensor)
