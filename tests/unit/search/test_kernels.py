"""Kernels: their shapes, their records, and the ranges in which they are searched."""

from __future__ import annotations

import math

import optuna
import pytest

from abliterate.export.recipe import KernelPart
from abliterate.report.tables import SearchRecord, exact_trial_table, kernel_text
from abliterate.search.space import Space
from abliterate.settings.schema import SearchSettings
from abliterate.types import FALLS, Kernel, Trial, TrialParams

KERNEL = {"max_coeff": 1.2, "position": 6.0, "min_coeff": 0.3, "distance": 4.0}


@pytest.mark.parametrize("shape", FALLS)
def test_every_shape_falls_from_the_largest_coeff_to_the_edge_and_is_0_beyond(shape: str) -> None:
    kernel = Kernel(**KERNEL, shape=shape)
    assert kernel.coeff(6) == 1.2
    assert kernel.coeff(2) == kernel.coeff(10) == pytest.approx(0.3, abs=1e-15)
    assert kernel.coeff(1) == kernel.coeff(11) == 0
    falling = [kernel.coeff(layer) for layer in range(6, 11)]
    assert falling == sorted(falling, reverse=True)
    assert falling == [pytest.approx(kernel.coeff(12 - layer)) for layer in range(6, 11)]
    assert {Kernel(0.7, 6.0, 0.7, 4.0, shape).coeff(layer) for layer in range(2, 11)} == {0.7}


@pytest.mark.parametrize("t", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_falls_are_their_formulas(t: float) -> None:
    """A bell of σ = ½ whose value at the distance is moved to the edge; half a period of a cosine."""
    bell = math.exp(-(t**2) / (2 * 0.5**2))
    assert 1 - FALLS["gaussian"](t) == pytest.approx((bell - math.exp(-2)) / (1 - math.exp(-2)), abs=1e-15)
    assert 1 - FALLS["cosine"](t) == pytest.approx(math.cos(math.pi * t / 2) ** 2, abs=1e-15)
    assert FALLS["linear"](t) == t


def test_a_linear_kernel_is_what_it_was() -> None:
    """Bit for bit, in the formula and in the record, so that earlier runs are continued and read."""
    kernel = Kernel(1.3, 5.37, 0.21, 3.9)
    assert kernel.coeff(4) == 1.3 + (abs(4 - 5.37) / 3.9) * (0.21 - 1.3)
    assert set(kernel.to_record()) == set(KERNEL)
    assert Kernel.from_record(KERNEL) == Kernel(**KERNEL)


@pytest.mark.parametrize("shape", ["gaussian", "cosine"])
def test_records_tables_and_recipes_name_other_shapes(shape: str) -> None:
    kernel = Kernel(**KERNEL, shape=shape)
    params = TrialParams("per layer", 5.0, {"attn.o_proj": kernel})
    assert TrialParams.from_record(params.to_record()) == params
    assert KernelPart(**kernel.to_record()).model_dump() == kernel.to_record()
    assert kernel_text(kernel) == f"1.20 @ 6.0 → 0.30 ± 4.0 {shape}"
    scores = {"refusals": 1, "kl": {"mean": 0.1, "median": 0.1, "max": 0.1}}
    table = exact_trial_table(SearchRecord((Trial(0, params, "complete", scores),), (), None, None), [])
    assert "attn.o_proj.shape" in [column.key for column in table.columns]


@pytest.mark.parametrize("shape", ["square", "", None, 3, ["linear"]])
def test_a_record_of_an_unknown_shape_is_refused(shape: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        Kernel.from_record({**KERNEL, "shape": shape})


def test_positions_may_be_anywhere_and_kernels_have_the_settings_shape() -> None:
    space = Space(SearchSettings(position=(0.0, 1.0), kernel="cosine"), 12, ("attn.o_proj",))
    kernels = [params.kernels["attn.o_proj"] for params in space.samples(300, seed=0)]
    positions = [kernel.position for kernel in kernels]
    assert 0 <= min(positions) < 0.5
    assert 10.5 < max(positions) <= 11
    assert {kernel.shape for kernel in kernels} == {"cosine"}
    trial = optuna.create_study().ask()
    space.suggest(trial)
    assert (trial.distributions["attn.o_proj.position"].low, trial.distributions["attn.o_proj.position"].high) == (0.0, 11.0)
