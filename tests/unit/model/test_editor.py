"""What the editor keeps between trials: within its budget, and with the same edits for less of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abliterate.artifacts.refined import RefinedStore
from abliterate.directions import Blend, Directions
from abliterate.edits import (
    METHODS,
    Factors,
    Prepared,
    SvdMemo,
    check_several,
    is_refinable,
    needs_inputs,
    scales_columns,
    scales_rows,
)
from abliterate.edits.base import ROW_CHUNK
from abliterate.edits.full import NormPreserving
from abliterate.edits.svd import relative_error
from abliterate.errors import InputError
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import dense_weight
from abliterate.types import Kernel, Range, RefinedParams, TrialParams, weight_name
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
from support.refined import own_edits

MODES = [name for name in sorted(METHODS) if not needs_inputs(METHODS[name])]


def with_budget(editor: Editor, budget: float) -> Editor:
    """The same editor with another budget of bytes."""
    parts = (editor._targets, editor.directions, editor._settings, editor.hooks)
    made = Editor(*parts, SvdMemo(100), budget)
    made.prepare()
    return made


def held(editor: Editor) -> int:
    """Bytes of prepared modules, tensor by tensor, but for those in main memory."""
    return sum(
        tensor.nbytes
        for name, prepared in editor._prepared.items()
        if name not in editor.offloaded
        for tensor in (prepared.a, prepared.p, prepared.norms)
    )


def assert_equal_factors(found: dict[str, Factors], expected: dict[str, Factors]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, one in found.items():
        other = expected[name]
        assert all(torch.equal(*pair) for pair in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_directions_are_one_tensor_for_all_modules(mode: str) -> None:
    editor = make_editor(make_loaded(make_model("llama")), mode=mode)
    editor.prepare()
    assert len(editor._prepared) == 6
    assert len({prepared.directions.data_ptr() for prepared in editor._prepared.values()}) == 1
    assert {prepared.directions.dtype for prepared in editor._prepared.values()} == {torch.float64}


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("options", [{"mode": mode} for mode in MODES] + [{"representation": "svd"}], ids=str)
def test_edits_are_the_same_whatever_the_budget(
    options: dict[str, Any], accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an accelerator: here too everything lies in main memory, but by the way of what is offloaded there."""
    monkeypatch.setattr("abliterate.model.editor._has_own_memory", lambda device: accelerator)
    plain = make_editor(make_loaded(make_model("llama")), **options)
    plain.prepare()
    whole_size = held(plain)
    for budget in (0, whole_size // 3, whole_size - 1, whole_size, 10**9):
        editor = with_budget(plain, budget)
        assert held(editor) <= budget
        assert editor.budget_bytes == budget - held(editor)
        short = budget < whole_size
        assert bool(editor.offloaded) == (short and accelerator)
        assert bool(editor.unprepared) == (short and not accelerator)
        if budget:
            assert held(editor) > 0, "what fits into the budget is kept"
        for seed in range(4):
            assert_equal_factors(editor.factors(make_params(seed)), plain.factors(make_params(seed)))
        assert held(editor) <= budget


def test_modules_beyond_the_budget_are_prepared_in_each_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_editor(make_loaded(make_model("llama")))
    prepared: list[int] = []
    prepare = plain._method.prepare
    monkeypatch.setattr(type(plain._method), "prepare", lambda self, *args: prepared.append(1) or prepare(*args))
    editor = with_budget(plain, 0)
    assert len(prepared) == 6
    editor.factors(make_params(0))
    assert len(prepared) > 6
    ample = with_budget(plain, 10**9)
    prepared.clear()
    ample.factors(make_params(0))
    assert prepared == []


class Largest(TorchDispatchMode):
    """Notes the largest new float32 or float64 tensor that operations give."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.elements = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            wide = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
            if wide and tensor.untyped_storage().data_ptr() not in self._given:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_is_never_copied_whole(mode: str) -> None:
    """Neither to prepare it nor for the few rows that the closed form can't express."""
    d_out, d_in = 4 * ROW_CHUNK, 48
    weight = torch.randn(d_out, d_in).bfloat16()
    directions = make_directions(2, d_out).table().double().clone()
    directions[0] = 0
    directions[0, 9] = 1  # one-hot: a degenerate row at λ = 1
    with Largest([weight, directions]) as seen:
        prepared = METHODS[mode].prepare(lambda: weight, directions)
        factors = METHODS[mode].factors(prepared, Blend((0,), (1.0,)), 1.0)
    assert factors.a.shape[0] == (2 if mode == "full" else 1)
    assert 0 < seen.elements <= ROW_CHUNK * d_in


def test_a_dense_change_needs_one_matrix() -> None:
    """The svd representation decomposes ΔW, which is made without a float32 copy of W beside it."""
    weight = torch.randn(4 * ROW_CHUNK, 24).bfloat16()
    factors = Factors(torch.rand(len(weight)) + 0.5, torch.randn(1, 24), torch.randn(len(weight), 1))
    expected = (factors.row_scale - 1)[:, None] * weight.float() + factors.b @ factors.a  # type: ignore[operator]
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and "to_copy" in str(func):
                sizes.append(result.numel())
            return result

    with Sizes():
        found = factors.delta(weight)
    assert torch.equal(found, expected)
    assert max(sizes) <= ROW_CHUNK * 24


class Weaker(NormPreserving):
    """An edit with a number of its own, without which nothing is computed."""

    name = "weaker"
    parameters: ClassVar[dict[str, Range]] = {"share": Range(0.1, 1.0)}

    def __init__(self, share: float | None = None) -> None:
        self._share = share

    def at(self, numbers: Mapping[str, float]) -> Weaker:
        return Weaker(**numbers)

    def factors(self, prepared: Prepared, blend: Blend, coeff: float) -> Factors:
        assert self._share is not None
        return super().factors(prepared, blend, self._share * coeff)

    def product(self, prepared: Prepared, blends: Sequence[Blend], coeffs: Tensor) -> Factors:
        assert self._share is not None
        return super().product(prepared, blends, self._share * coeffs)


def test_numbers_of_a_mode_count_in_the_memo_and_in_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "weaker", Weaker())
    assert scales_rows(METHODS["weaker"])
    assert not scales_columns(METHODS["weaker"])
    check_several(METHODS["weaker"], 3)
    assert not is_refinable(METHODS["weaker"])
    assert is_refinable(METHODS["full"])
    editor = make_editor(make_loaded(make_model("llama")), mode="weaker", representation="svd")
    strong, weak = (editor.factors(replace(make_params(2), extra={"share": share})) for share in (1.0, 0.2))
    assert editor.memo.hits == 0
    for name, factors in strong.items():
        assert float((weak[name].b @ weak[name].a).norm()) < 0.5 * float((factors.b @ factors.a).norm())


# Refined parameters: a coeff and a direction for each module.


def refined_params(loaded: LoadedModel, store: RefinedStore, seed: int = 0) -> RefinedParams:
    """Random λ of both signs, one module off, one that isn't named, and one with a nearly one-hot direction."""
    generator = torch.Generator().manual_seed(seed)
    names = [target.name for target in loaded.targets][:-1]
    coeffs = dict(zip(names, (2 * torch.rand(len(names), generator=generator) - 0.5).tolist(), strict=True))
    coeffs[names[1]] = 0.0
    rows = torch.randn(len(names), loaded.info.d_model, generator=generator)
    rows[0] = 1e-3 * rows[0]
    rows[0, 3] = 1.0
    directions = dict(zip(names, torch.nn.functional.normalize(rows, dim=1), strict=True))
    return store.put(seed, coeffs | {names[0]: 1.0}, directions, {})


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
def test_refined_edits_are_those_of_the_definition(mode: str, family: str) -> None:
    """Of every module by its own λ and v, in float64; fused experts share those of their module."""
    loaded, store = make_loaded(make_model(family)), RefinedStore()
    editor, params = make_editor(loaded, mode=mode, store=store), refined_params(loaded, store)
    found, given = editor.factors(params), store.directions(params)
    assert found.keys() == {name for name, coeff in params.coeffs.items() if coeff != 0}
    assert editor.first_layers([params]) == [0]
    for target in loaded.targets:
        if target.name not in found:
            continue
        weight = dense_weight(target.module)
        matrices = weight if weight.ndim == 3 else weight[None]
        for matrix, factors in zip(matrices, found[target.name].parts(), strict=True):
            scale = factors.entry_scale()
            scaled = matrix.double() if scale is None else scale.double() * matrix.double()
            edited = scaled + factors.b.double() @ factors.a.double()
            expected = dense_edit(matrix, given[target.name], params.coeffs[target.name], mode)
            assert float((edited - expected).norm() / expected.norm()) < 1e-6
            assert float((edited - matrix).norm() / expected.norm()) > 1e-3


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mode", MODES)
def test_a_trials_own_edits_as_refined_ones_are_the_trial(mode: str, family: str, count: int) -> None:
    loaded, store = make_loaded(make_model(family)), RefinedStore()
    editor = make_editor(loaded, mode=mode, store=store, count=count)
    base = logits_of(loaded.model)
    for scope in ("global", "per layer"):
        params = replace(make_params(0, loaded.info.n_layers, scope), extra={weight_name(0): 0.6})
        editor.apply(params)
        expected = logits_of(loaded.model)
        editor.apply(store.put(0, *own_edits(editor, params), {}))
        torch.testing.assert_close(logits_of(loaded.model), expected, rtol=1e-5, atol=1e-5)
        assert float((expected - base).abs().max()) > 1e-2
    editor.suspend()
    assert torch.equal(logits_of(loaded.model), base)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mode", MODES)
def test_several_directions_are_removed_one_after_another(mode: str, family: str) -> None:
    """With a weight each; a direction that is zero, or has a weight of 0, is left out."""
    loaded = make_loaded(make_model(family))
    editor, dense = make_editor(loaded, mode=mode, count=3), copy.deepcopy(loaded.model)
    editor.directions.vectors[2, 0] = 0
    kernels = dict.fromkeys(("attn.o_proj", "mlp.down_proj"), Kernel(1.2, 1.0, 0.5, 9.0))
    params = TrialParams("per layer", 0.0, kernels, {weight_name(0): 0.6, weight_name(1): 0.0})
    ranks = {target.layer: editor.factors(params)[target.name].a.shape[-2] for target in loaded.targets}
    assert ranks == {0: 2, 1: 1, 2: 2}
    editor.apply(params)
    write_dense(dense, editor, params, mode)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)


def test_refined_edits_as_low_rank_are_as_near_as_a_trials() -> None:
    loaded, store = make_loaded(make_model("llama")), RefinedStore()
    exact, low = (make_editor(loaded, store=store, representation=form) for form in ("exact", "svd"))
    params = make_params(0)
    refined = store.put(0, *own_edits(exact, params), {})
    for name, factors in low.factors(params).items():
        weight = dense_weight(loaded.model.get_submodule(name))
        errors = [
            relative_error(exact.factors(given)[name].delta(weight), found)
            for given, found in ((params, factors), (refined, low.factors(refined)[name]))
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-2)
        assert 1e-3 < errors[0] < 0.9
    assert low.memo.hits > 0  # the second time the same factors are known


def test_other_directions_are_written_anew_and_the_same_ones_are_not() -> None:
    loaded, store = make_loaded(make_model("llama")), RefinedStore()
    editor = make_editor(loaded, store=store)
    first, second = (refined_params(loaded, store, seed) for seed in (0, 1))
    second = store.put(2, first.coeffs, store.directions(second), {})  # the same λ of every module
    editor.apply(first)
    expected = logits_of(loaded.model)
    written = editor.hooks.misses
    editor.suspend()
    editor.apply(first)
    assert editor.hooks.misses == written
    editor.apply(second)
    assert editor.hooks.misses == 2 * written
    assert not torch.allclose(logits_of(loaded.model), expected)
    editor.apply(first)
    assert torch.equal(logits_of(loaded.model), expected)


def test_the_grids_of_the_search_leave_refined_coeffs_alone() -> None:
    loaded, store = make_loaded(make_model("llama")), RefinedStore()
    editor, params = make_editor(loaded, store=store, coeff_grid=0.25, direction_grid=1.0), refined_params(loaded, store)
    planned = {name: key[2] for name, key in editor.plan(params).items()}
    assert planned == {name: (coeff,) for name, coeff in params.coeffs.items() if coeff}


def test_the_grid_of_coeffs_holds_for_each_of_several_directions() -> None:
    loaded = make_loaded(make_model("llama"))
    editor = make_editor(loaded, count=3, coeff_grid=0.02)
    weights = {weight_name(place): weight for place, weight in enumerate((0.9, 0.333, 0.001))}
    coeffs = [coeff for key in editor.plan(replace(make_params(1), extra=weights)).values() for coeff in key[2]]
    assert len(coeffs) >= 9
    assert all(coeff / 0.02 == pytest.approx(round(coeff / 0.02)) for coeff in coeffs)
    assert min(coeffs) == 0  # a weak direction is off, as a weak module is


def test_plans_ask_for_each_blend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed for every module and trial, blends would take longer than the model's passes."""
    asked: list[float] = []
    plain = Directions._blends
    monkeypatch.setattr(Directions, "_blends", lambda self, x, *rest: asked.append(x) or plain(self, x, *rest))
    editor = make_editor(make_loaded(make_model("llama")), count=3)
    trials = [make_params(seed, scope=scope) for scope in ("global", "per layer") for seed in range(8)]
    plans = [editor.plan(params) for params in trials]
    assert len(asked) <= 8 + 3  # one position for each global trial, and the layers
    for plan, params in zip(plans, trials, strict=True):
        editor.factors(params)
        assert min(editor._by_name[name].layer for name in plan) == editor.first_layers([params])[0]
    assert len(asked) <= 8 + 3
    monkeypatch.setattr("abliterate.directions.base.KEPT", 2)
    for x in (0.1, 0.2, 0.3, 0.1):
        assert editor.directions.blends(x) == plain(editor.directions, x, None, "")
    assert len(editor.directions._found) <= 2


def test_refined_directions_of_another_size_or_of_another_run_are_a_sentence() -> None:
    loaded, store = make_loaded(make_model("llama")), RefinedStore()
    editor = make_editor(loaded, store=store)
    name = loaded.targets[0].name
    short = store.put(0, {name: 1.0}, {name: torch.tensor([1.0, 0.0])}, {})
    with pytest.raises(InputError, match="have 2 entries, and the model's hidden states 32"):
        editor.apply(short)
    assert editor.hooks.active == frozenset()
    with pytest.raises(InputError, match="no run directory"):
        make_editor(loaded).apply(refined_params(loaded, store))
