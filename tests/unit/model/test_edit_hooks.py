"""Adapters and the editor, against a dense reference that writes W' into a copy's weights."""

from __future__ import annotations

import copy

import pytest
import torch

from abliterate.edits import METHODS, Factors
from abliterate.errors import TrialError
from abliterate.model.architectures import Target
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.weights import dense_weight
from abliterate.types import Kernel, TrialParams
from support.models import (
    dense_edit,
    logits_of,
    make_directions,
    make_editor,
    make_loaded,
    make_model,
    make_params,
    write_dense,
)

MODES = ("full", "pre", "none", "columns")
FAMILIES = ("llama", "llama_biased", "qwen2", "gpt2", "gemma2", "phi3", "falcon")
OFF = TrialParams("global", 1.0, dict.fromkeys(("attn.o_proj", "mlp.down_proj"), Kernel(0.0, 1.0, 0.0, 2.0)))


def factors(rows: int, columns: int, fill: float = 0.1) -> Factors:
    """Some rank-1 factors."""
    return Factors(None, torch.full((1, columns), fill), torch.full((rows, 1), fill))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_dense_reference(family: str, mode: str) -> None:
    loaded = make_loaded(make_model(family))
    editor = make_editor(loaded, mode=mode)
    for seed in (0, 1, 2):
        params = make_params(seed)
        editor.apply(params)
        dense = copy.deepcopy(make_model(family))
        write_dense(dense, editor, params, mode)
        torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_edit_changes_logits(mode: str) -> None:
    loaded = make_loaded(make_model("llama"))
    base = logits_of(loaded.model)
    make_editor(loaded, mode=mode).apply(make_params(0))
    assert (logits_of(loaded.model) - base).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_package_dense_equals_ours(mode: str) -> None:
    weight, v = torch.randn(16, 24, dtype=torch.float64), make_directions(1, 16).at(0.0).double()
    torch.testing.assert_close(METHODS[mode].dense(weight, v, 0.8), dense_edit(weight, v, 0.8, mode))


@pytest.mark.parametrize("family", ["llama_biased", "gpt2"])
def test_nothing_wanted_is_identity_bit_for_bit(family: str) -> None:
    loaded = make_loaded(make_model(family))
    base = logits_of(loaded.model)
    editor = make_editor(loaded)
    editor.apply(OFF)
    assert editor.hooks.active == frozenset()
    assert torch.equal(logits_of(loaded.model), base)


@pytest.mark.parametrize("family", ["llama_biased", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_clear_gives_the_base_back_bit_for_bit(family: str, mode: str) -> None:
    loaded = make_loaded(make_model(family))
    base = logits_of(loaded.model)
    editor = make_editor(loaded, mode=mode)
    editor.apply(make_params(0))
    assert not torch.equal(logits_of(loaded.model), base)
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)
    assert not any(target.module._forward_hooks for target in loaded.targets)


def test_weights_are_never_written() -> None:
    loaded = make_loaded(make_model("llama"))
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    make_editor(loaded).apply(make_params(0))
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"representation": "svd"}, {"coeff_grid": 0.25, "direction_grid": 0.5}])
def test_incremental_equals_reset(options: dict[str, object]) -> None:
    loaded, again = make_loaded(make_model("llama_biased")), make_loaded(make_model("llama_biased"))
    kept, reset = make_editor(loaded, **options), make_editor(again, incremental=False, **options)
    for seed in (0, 1, 2, 2, 0, 3, 5, 4, 4, 1):
        params = OFF if seed == 3 else make_params(seed)
        kept.apply(params)
        reset.apply(params)
        assert kept.hooks.active == reset.hooks.active
        assert torch.equal(logits_of(loaded.model), logits_of(again.model))


def test_only_changed_modules_are_written() -> None:
    loaded = make_loaded(make_model("llama"))
    adapters = EditHooks(loaded.targets)
    names = [target.name for target in loaded.targets]
    made: list[str] = []

    def want(keys: dict[str, int]) -> None:
        def maker(name: str):  # type: ignore[no-untyped-def]
            rows, columns = dense_weight(loaded.model.get_submodule(name)).shape
            return lambda: made.append(name) or factors(rows, columns)

        adapters.apply({name: (key, maker(name)) for name, key in keys.items()})

    want({names[0]: 1, names[1]: 1})
    want({names[0]: 1, names[1]: 2, names[2]: 1})
    assert made == [names[0], names[1], names[1], names[2]]
    assert (adapters.hits, adapters.misses) == (1, 4)
    want({names[2]: 1})
    assert adapters.active == {names[2]}
    assert (adapters.hits, adapters.misses) == (2, 4)


def test_without_incremental_everything_is_written() -> None:
    loaded = make_loaded(make_model("llama"))
    editor = make_editor(loaded, incremental=False)
    editor.apply(make_params(0))
    editor.apply(make_params(0))
    assert editor.hooks.hits == 0
    assert editor.hooks.misses == 2 * len(editor.plan(make_params(0)))


def test_failing_maker_leaves_the_module_off() -> None:
    loaded = make_loaded(make_model("llama"))
    base = logits_of(loaded.model)
    adapters, name = EditHooks(loaded.targets), loaded.targets[0].name

    def fail() -> Factors:
        raise TrialError("no factors")

    adapters.apply({name: (1, lambda: factors(32, 32))})
    with pytest.raises(TrialError):
        adapters.apply({name: (2, fail)})
    assert adapters.active == frozenset()
    assert torch.equal(logits_of(loaded.model), base)
    adapters.apply({name: (2, lambda: factors(32, 32))})
    assert adapters.active == {name}


def test_half_precision_model_keeps_its_dtype() -> None:
    loaded = make_loaded(make_model("llama_biased").bfloat16())
    base = logits_of(loaded.model)
    make_editor(loaded).apply(make_params(0))
    edited = logits_of(loaded.model)
    assert edited.dtype == torch.bfloat16
    assert not torch.equal(edited, base)


def test_autocast_recasts_factors() -> None:
    loaded = make_loaded(make_model("llama"))
    make_editor(loaded).apply(make_params(0))
    exact = logits_of(loaded.model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits_of(loaded.model).float()
    assert (rough - exact).norm() / exact.norm() < 0.05


def test_svd_of_high_rank_equals_exact() -> None:
    exact, svd = make_loaded(make_model("llama")), make_loaded(make_model("llama"))
    make_editor(exact).apply(make_params(0))
    make_editor(svd, representation="svd", rank=32).apply(make_params(0))
    torch.testing.assert_close(logits_of(svd.model), logits_of(exact.model), rtol=1e-3, atol=1e-4)


def test_svd_memo_changes_nothing_and_hits() -> None:
    with_memo, without = make_loaded(make_model("llama")), make_loaded(make_model("llama"))
    kept = make_editor(with_memo, representation="svd", incremental=False)
    fresh = make_editor(without, representation="svd", incremental=False, memo_size=0)
    for seed in (0, 1, 0):
        kept.apply(make_params(seed))
        fresh.apply(make_params(seed))
        assert torch.equal(logits_of(with_memo.model), logits_of(without.model))
    assert kept.memo.hits == len(kept.plan(make_params(0)))
    assert fresh.memo.hits == 0


def test_zero_direction_edits_nothing() -> None:
    loaded = make_loaded(make_model("llama"))
    editor = make_editor(loaded)
    editor.directions.vectors[1:].zero_()
    assert editor.plan(make_params(0)) == {}


def test_factors_are_what_is_applied() -> None:
    loaded = make_loaded(make_model("llama"))
    editor = make_editor(loaded)
    params = make_params(1)
    dense = copy.deepcopy(make_model("llama"))
    for name, part in editor.factors(params).items():
        weight = dense.get_submodule(name).weight
        weight.copy_(weight + part.delta(weight))
    editor.apply(params)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_the_row_scale() -> None:
    """Most scales lie between 0.99 and 1.01, where bfloat16 has three numbers: s − 1 is what is stored."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 256, bias=False).bfloat16().requires_grad_(False)
    scale = 1 + 0.003 * torch.randn(256)
    adapters = EditHooks([Target("m", 0, "mlp.down_proj", linear)])
    x = torch.randn(8, 256).bfloat16()
    plain = linear(x).float()
    adapters.apply({"m": ("k", lambda: Factors(scale, torch.zeros(1, 256), torch.zeros(256, 1)))})
    change, expected = linear(x).float() - plain, plain * (scale - 1)
    # The output's own rounding is as large as the change, but has no direction.
    fitted = (change * expected).sum() / (expected * expected).sum()
    assert fitted == pytest.approx(1, abs=0.1)
