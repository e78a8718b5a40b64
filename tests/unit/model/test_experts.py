"""Fused experts: edited as every expert's matrix edited by hand, in all modes, and never as matrices in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.directions import Blend
from abliterate.edits import METHODS, Factors, prepare
from abliterate.errors import InputError
from abliterate.model.experts import down_outputs, is_fused
from abliterate.model.loader import LoadedModel
from abliterate.model.weights import dense_weight, stored_weight
from abliterate.types import Kernel, TrialParams
from support.exports import MODES, ON
from support.memory import LiveBytes
from support.models import (
    EXPERTS,
    dense_edit,
    logits_of,
    make_directions,
    make_editor,
    make_loaded,
    make_model,
    make_params,
    write_dense,
)
from support.zoo import make_specimen

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Of the zoo: experts without a gate; classes outside transformers' registry, with clamps or with idle experts beside them.
OTHERS = ("nemotron_h", "step3p7", "longcat_flash")
OFF = TrialParams("global", 1.0, dict.fromkeys(("attn.o_proj", "mlp.down_proj"), Kernel(0.0, 1.0, 0.0, 2.0)))


def tiny(family: str) -> PreTrainedModel:
    """A family of `support.models.EXPERTS`, or a specimen of the zoo."""
    return make_specimen(family) if family in OTHERS else make_model(family)


def stacks(loaded: LoadedModel) -> list[Any]:
    """The modules that are fused experts."""
    return [target.module for target in loaded.targets if is_fused(target.module)]


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", [*EXPERTS, *OTHERS])
def test_every_matrix_that_writes_is_a_target(family: str) -> None:
    loaded = make_loaded(tiny(family))
    d_model = loaded.info.d_model
    covered = {id(stored_weight(target.module)) for target in loaded.targets}
    for name, parameter in loaded.model.named_parameters():
        writes = any(part in name for part in ("o_proj.weight", "out_proj", "down_proj", "output_linear", ".w2."))
        if writes and "vision" not in name and "_bias" not in name and not name.endswith(".bias"):
            assert id(parameter) in covered, name
            assert d_model in parameter.shape
    assert stacks(loaded)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*EXPERTS, *OTHERS])
def test_logits_equal_dense_reference(family: str, mode: str) -> None:
    loaded = make_loaded(tiny(family))
    editor = make_editor(loaded, mode=mode)
    for params in (make_params(0), make_params(1), ON):
        editor.apply(params)
        dense = tiny(family)
        write_dense(dense, editor, params, mode)
        torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_any_experts_implementation(family: str, implementation: str) -> None:
    loaded = make_loaded(make_model(family))
    loaded.model.set_experts_implementation(implementation)
    base = logits_of(loaded.model)
    editor = make_editor(loaded)
    editor.apply(ON)
    dense = make_model(family)
    dense.set_experts_implementation(implementation)
    write_dense(dense, editor, ON, "full")
    torch.testing.assert_close(logits_of(loaded.model), logits_of(dense), rtol=1e-4, atol=1e-5)
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)
    assert loaded.model.get_experts_implementation()[""] == implementation


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [*EXPERTS, *OTHERS])
def test_off_and_cleared_are_the_base_bit_for_bit(family: str, mode: str) -> None:
    loaded = make_loaded(tiny(family))
    base = logits_of(loaded.model)
    before = {name: parameter.clone() for name, parameter in loaded.model.named_parameters()}
    attributes = [dict(vars(module)) for module in stacks(loaded)]
    editor = make_editor(loaded, mode=mode)
    editor.apply(OFF)
    assert torch.equal(logits_of(loaded.model), base)
    editor.apply(ON)
    assert (logits_of(loaded.model) - base).abs().max() > 1e-3
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)
    assert [vars(module).keys() for module in stacks(loaded)] == [found.keys() for found in attributes]
    assert all(
        vars(module).get("config") is found.get("config") for module, found in zip(stacks(loaded), attributes, strict=True)
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.model.named_parameters())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
def test_laws_hold_for_each_expert(family: str, mode: str) -> None:
    """Read off the module as it runs: its outputs for unit vectors, without the biases."""
    loaded = make_loaded(make_model(family))
    editor = make_editor(loaded, mode=mode)
    module = stacks(loaded)[1]
    weight = dense_weight(module)
    count, d_model, d_in = weight.shape
    bias = module.down_proj_bias if family == "gpt_oss" else torch.zeros(count, d_model)
    editor.apply(ON)
    columns = [down_outputs(module, torch.eye(d_in)[i].expand(count, -1)) - bias for i in range(d_in)]
    edited = torch.stack(columns, dim=-1)  # (E, d_model, d_in)
    v = editor.directions.at(1.0)
    for one, old in zip(edited, weight, strict=True):
        torch.testing.assert_close(one, dense_edit(old, v, 1.0, mode).float(), rtol=1e-4, atol=1e-6)
        if mode == "full":
            torch.testing.assert_close(one.norm(dim=1), old.norm(dim=1), rtol=1e-4, atol=1e-6)
        if mode == "none":
            assert (v @ one).abs().max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("one_hot", [False, True])
def test_a_stack_is_its_matrices_one_by_one(mode: str, one_hot: bool) -> None:
    """Zero rows and (one_hot) degenerate ones among them, whose number differs between the experts."""
    torch.manual_seed(0)
    stack = torch.randn(5, 16, 24)
    stack[2, 3] = 0
    table = make_directions(2, 16).table().double()
    if one_hot:
        table[0] = torch.nn.functional.one_hot(torch.tensor(4), 16).double()
        stack[3, 4] = 0
    blend, method = Blend((0,), (1.0,)), METHODS[mode]
    prepared = prepare(method, lambda: stack, table)
    batched = method.factors(prepared, blend, 1.0)
    singles = [method.factors(method.prepare(lambda one=one: one, table), blend, 1.0) for one in stack]  # type: ignore[misc]
    ranks = {single.a.shape[0] for single in singles}
    assert ranks == ({1, 2} if one_hot and mode == "full" else {1})
    for index, single in enumerate(singles):
        torch.testing.assert_close(batched.parts()[index].delta(stack[index]), single.delta(stack[index]))
        expected = dense_edit(stack[index], table[0], 1.0, mode) - stack[index].double()
        torch.testing.assert_close(single.delta(stack[index]).double(), expected, rtol=1e-4, atol=1e-5)
    again = Factors.stacked(singles)
    torch.testing.assert_close(again.delta(stack), batched.delta(stack))
    parked, (few,) = prepared.parked().fetched([blend])
    assert torch.equal(method.factors(parked, few, 1.0).delta(stack), batched.delta(stack))


def test_bytes_of_a_prepared_stack_count_every_expert() -> None:
    loaded = make_loaded(make_model("qwen3_moe"))
    editor = make_editor(loaded)
    editor.prepare()
    module = next(target for target in loaded.targets if is_fused(target.module))
    count, d_model, d_in = dense_weight(module.module).shape
    prepared = editor._prepared[module.name]
    assert prepared.nbytes == count * (3 * d_in * 4 + 3 * d_model * 8 + d_model * 8)
    assert len(editor._tables) == 1


def test_without_room_the_same_logits() -> None:
    loaded = make_loaded(make_model("qwen3_moe"))
    editor = make_editor(loaded)
    editor.apply(ON)
    expected = logits_of(loaded.model)
    editor.clear()
    again = make_editor(loaded)
    again.budget_bytes = 0
    again.apply(ON)
    assert len(again.unprepared) == len(loaded.targets)
    assert torch.equal(logits_of(loaded.model), expected)


def test_svd_of_experts_is_refused_unless_the_edit_is_rank_one() -> None:
    loaded = make_loaded(make_model("qwen3_moe"))
    with pytest.raises(InputError, match=r"can't express edits of the fused experts in model\.layers\.0\.mlp\.experts"):
        make_editor(loaded, representation="svd")
    exact, svd = make_editor(loaded, mode="pre"), make_editor(loaded, mode="pre", representation="svd")
    assert torch.equal(exact.factors(ON)["model.layers.0.mlp.experts"].a, svd.factors(ON)["model.layers.0.mlp.experts"].a)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_half_precision(family: str, mode: str) -> None:
    """As near to the float32 edit as the base is to the float32 base; routing is given, because a near-tie would flip it."""
    exact, half = make_loaded(make_model(family)), make_loaded(make_model(family).bfloat16())
    x, share = torch.randn(50, exact.info.d_model), torch.rand(50, 2)
    routed = torch.stack([torch.arange(50) % 4, (torch.arange(50) + 1) % 4], dim=1)

    def outputs() -> tuple[Tensor, Tensor]:
        rough = stacks(half)[0](x.bfloat16(), routed, share.bfloat16())
        assert rough.dtype == torch.bfloat16
        return rough.float(), stacks(exact)[0](x, routed, share)

    noise = relative(*outputs())
    for loaded in (exact, half):
        make_editor(loaded, mode=mode).apply(ON)
    assert relative(*outputs()) < 1.5 * noise


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_pass_holds_an_edited_matrix_for_each_expert(implementation: str) -> None:
    """Many large experts and one token: a ΔW of each would be 16 MB, one of a single expert 256 KiB."""
    options = {"num_experts": 64, "hidden_size": 256, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
    loaded = make_loaded(make_model("qwen3_moe", **options))
    loaded.model.set_experts_implementation(implementation)
    editor = make_editor(loaded)
    token = {"input_ids": torch.tensor([[7]])}
    with torch.no_grad():
        with LiveBytes(loaded.model) as live:
            loaded.model(**token)
        base = live.peak
        editor.apply(ON)
        with LiveBytes(loaded.model) as live:
            loaded.model(**token)
    assert live.peak < base + 64 * 2**10


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_expert_for_all_and_twice_for_one(family: str) -> None:
    """Routing as the router never draws it: experts without a token, all tokens at one, one expert twice for a token."""
    loaded = make_loaded(make_model(family))
    module = stacks(loaded)[0]
    x, share = torch.randn(5, loaded.info.d_model), torch.rand(5, 2)
    dense = make_model(family)
    editor = make_editor(loaded)
    write_dense(dense, editor, ON, "full")
    for routed in (torch.full((5, 2), 3), torch.tensor([[0, 0], [3, 0], [0, 3], [3, 3], [1, 1]])):
        expected = copy.deepcopy(dense.model.layers[0].mlp.experts)(x, routed, share)
        base = module(x, routed, share)
        editor.apply(ON)
        torch.testing.assert_close(module(x, routed, share), expected, rtol=1e-4, atol=1e-5)
        editor.clear()
        assert torch.equal(module(x, routed, share), base)


def test_idle_experts_give_back_what_they_are_given() -> None:
    """LongCat: experts beyond the last matrix; all of a token's, some, one of them twice, and none."""
    loaded = make_loaded(make_specimen("longcat_flash"))
    module = stacks(loaded)[0]
    editor = make_editor(loaded)
    dense = make_specimen("longcat_flash")
    write_dense(dense, editor, ON, "full")
    expected = dense.model.layers[0].mlp.experts
    x, share = torch.randn(5, loaded.info.d_model), torch.rand(5, 2)
    routed = torch.tensor([[4, 5], [0, 4], [4, 4], [1, 3], [5, 3]])
    editor.apply(ON)
    torch.testing.assert_close(module(x, routed, share), expected(x, routed, share), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_autocast_recasts_factors(family: str, mode: str) -> None:
    loaded = make_loaded(make_model(family))
    module, x = stacks(loaded)[0], torch.randn(40, loaded.info.d_model)
    routing = () if family == "llama4" else (torch.arange(80).view(40, 2) % 4, torch.rand(40, 2))
    make_editor(loaded, mode=mode).apply(ON)
    exact = module(x, *routing)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module(x, *routing).float()
    assert relative(rough, exact) < 0.03


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_one_adapter_at_a_time(family: str) -> None:
    loaded = make_loaded(make_model(family))
    base = logits_of(loaded.model)
    editor = make_editor(loaded)
    editor.apply(ON)
    with pytest.raises(ValueError, match="another adapter"):
        make_editor(loaded)
    editor.clear()
    make_editor(loaded).apply(OFF)
    assert torch.equal(logits_of(loaded.model), base)
