"""Quantized storages: each matrix as a packer of our own, element by element, says that it is; modules found and edited.

Kernels need a GPU: the modules here are transformers' own, or stand for a package's by its names, and multiply by the matrix
that was packed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, FP8Experts, FP8Linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, convert_moe_packed_tensors

from abliterate.errors import InputError
from abliterate.model.coverage import check_coverage, coverage_of
from abliterate.model.formats import STORAGES, storage_of, storage_remedy
from abliterate.model.formats.awq import awq
from abliterate.model.formats.base import scaled
from abliterate.model.formats.compressed import CompressedTensors, compressed
from abliterate.model.formats.gptq import gptq
from abliterate.model.formats.mxfp4 import mxfp4
from abliterate.model.weights import dense_weight, n_matrices, out_features, shape_of
from support import packing
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

CLOSE = {"rtol": 1e-6, "atol": 1e-7}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def random_matrix(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    """Rows of different sizes; the first is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator) * torch.linspace(0.1, 2, d_out)[:, None]
    weight[0] = 0
    return weight


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_was_packed(bits: int, version: int, act_order: bool) -> None:
    parts, dense = packing.gptq(random_matrix(32, 64)[1:33] + 0.1, bits=bits, version=version, act_order=act_order)
    tensors = [parts[name] for name in (".qweight", ".qzeros", ".scales", ".g_idx")]
    torch.testing.assert_close(gptq(*tensors, version), dense, **CLOSE)


def test_gptq_zero_points_wrap_round() -> None:
    """A group without negative weights has the zero point 0, which version 1 stores as 2^bits − 1."""
    parts, dense = packing.gptq(random_matrix(32, 64)[1:].abs().repeat(2, 1)[:32] + 0.1)
    assert int(parts[".qzeros"][0, 0]) & 15 == 15
    torch.testing.assert_close(gptq(parts[".qweight"], parts[".qzeros"], parts[".scales"], parts[".g_idx"], 1), dense, **CLOSE)


def test_awq_is_what_was_packed() -> None:
    parts, dense = packing.awq(random_matrix(32, 48) + 0.1)
    torch.testing.assert_close(awq(parts[".qweight"], parts[".qzeros"], parts[".scales"]), dense, **CLOSE)
    with pytest.raises(InputError, match="GEMM layout"):
        awq(parts[".qweight"].T, parts[".qzeros"], parts[".scales"])


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (20, 12)])
def test_fp8_blocks(block: tuple[int, int]) -> None:
    parts, dense = packing.fp8(random_matrix(48, 40), block=block)
    weight, scale = parts[".weight"], parts[".weight_scale_inv"]
    torch.testing.assert_close(scaled(weight, scale.nan_to_num(), block), dense.nan_to_num(), **CLOSE)
    if block == (16, 16):  # 40 columns in blocks of 16 end in half a one, which transformers refuses
        with pytest.raises(InputError, match="don't fit blocks of one size"):
            scaled(weight, scale[:, :2].repeat(1, 11))


def test_fp8_scales_of_every_shape() -> None:
    weight = random_matrix(32, 64).to(torch.float8_e4m3fn)
    rows, one = torch.rand(32, 1), torch.tensor(0.5)
    blocks = torch.rand(2, 4)
    torch.testing.assert_close(scaled(weight, rows), weight.float() * rows)
    torch.testing.assert_close(scaled(weight, rows[:, 0]), weight.float() * rows)
    torch.testing.assert_close(scaled(weight, one), weight.float() * 0.5)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, blocks, torch.float32)
    torch.testing.assert_close(scaled(weight, blocks), theirs)
    powers = torch.randint(120, 130, (2, 4), dtype=torch.uint8)
    torch.testing.assert_close(scaled(weight, powers), Fp8Dequantize(None)._dequantize_one(weight, powers, torch.float32))
    torch.testing.assert_close(scaled(weight, powers.view(torch.float8_e8m0fnu)), scaled(weight, powers))


def test_mxfp4_is_what_was_packed_and_what_transformers_makes_of_it() -> None:
    weight = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    blocks, scales, dense = packing.mxfp4(weight)
    assert (dense - weight).norm() < 0.2 * weight.norm()
    torch.testing.assert_close(mxfp4(blocks, scales), dense, rtol=0, atol=0)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    torch.testing.assert_close(mxfp4(blocks, scales), theirs, rtol=0, atol=0)


def test_compressed_tensors_is_what_was_packed() -> None:
    parts, dense = packing.packed_int4(random_matrix(16, 32)[1:17] + 0.1)
    torch.testing.assert_close(compressed(parts), dense, **CLOSE)
    with pytest.raises(InputError, match="of 16 bits can't be read"):
        compressed(parts | {".weight_packed": parts[".weight_packed"].repeat(1, 4)})


@pytest.mark.parametrize(
    "case", ["int4 with zero points", "int8 rows", "int8 groups", "fp8 rows", "fp8 blocks", "nvfp4", "mxfp4"]
)
def test_compressed_tensors_as_its_package_reads_it(case: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    kind, weight = case.split()[0], random_matrix(64, 128)[1:].repeat(2, 1)[:64]
    arguments, format_ = {
        "int4": ({"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}, "pack-quantized"),
        "int8": ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}, "int-quantized"),
        "fp8": ({"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}, "float-quantized"),
        "nvfp4": ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "nvfp4-pack-quantized"),
        "mxfp4": ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, "mxfp4-pack-quantized"),
    }[kind]
    state = {"weight": weight, "weight_scale": weight.abs().amax(1, keepdim=True) / (127 if kind == "int8" else 448)}
    if case == "int8 groups":
        arguments = arguments | {"strategy": "group", "group_size": 32}
        state["weight_scale"] = weight.unflatten(1, (-1, 32)).abs().amax(-1) / 127
    elif case == "fp8 blocks":
        arguments = arguments | {"strategy": "block", "block_structure": [32, 32]}
        state["weight_scale"] = weight.reshape(2, 32, 4, 32).abs().amax((1, 3)) / 448
    elif kind == "int4":
        parts = weight.unflatten(1, (-1, 32))
        state["weight_scale"] = (parts.amax(-1) - parts.amin(-1)) / 15
        state["weight_zero_point"] = (-8 - parts.amin(-1) / state["weight_scale"]).round().clamp(-8, 7).to(torch.int8)
    elif kind == "nvfp4":
        state["weight_global_scale"] = 448 * 6 / weight.abs().max().reshape(1)
        blocks = weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * state["weight_global_scale"]
        state["weight_scale"] = blocks.to(torch.float8_e4m3fn).float()
    elif kind == "mxfp4":
        state["weight_scale"] = torch.exp2(torch.log2(weight.unflatten(1, (-1, 32)).abs().amax(-1) / 6).ceil())
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments), format=format_
    )
    compressor = compressors.BaseCompressor.get_value_from_registry(format_)
    packed = compressor.compress(state, scheme)
    theirs = compressor.decompress(packed, scheme)["weight"].float()
    ours = compressed({f".{name}": tensor for name, tensor in packed.items()}, (32, 32) if case == "fp8 blocks" else None)
    assert (theirs - weight).norm() < 0.3 * weight.norm()
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if kind == "nvfp4" else 1e-5, atol=1e-6)


class QuantLinear(nn.Module):
    """Stands for a package's layer: its tensors under its names, and a product as its kernel gives it."""

    def __init__(self, parts: dict[str, Tensor], dense: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        for name, tensor in parts.items():
            self.register_buffer(name.removeprefix("."), tensor)
        self.register_buffer("bias", bias)
        self.out_features, self.in_features = dense.shape
        self.kernel = dense

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel.to(x.dtype), self.bias)


def swapped_gptq(linear: nn.Linear) -> nn.Module:
    """GPTQModel's `TorchLinear`, which says the version that its zero points are in."""
    parts, dense = packing.gptq(linear.weight, version=2)
    module = QuantLinear(parts, dense, linear.bias)
    module.scales = module.scales.float()  # half precision on a CPU would hide differences
    module.qzero_format = lambda: 2  # type: ignore[assignment]
    return module


def swapped_marlin(linear: nn.Linear) -> nn.Module:
    """The same after a kernel has repacked its words."""
    module = swapped_gptq(linear)
    module.qweight = module.qweight.flip(0)
    return module


def swapped_awq(linear: nn.Linear) -> nn.Module:
    """AutoAWQ's `WQLinear_GEMM`."""
    parts, dense = packing.awq(linear.weight)
    module = QuantLinear(parts, dense, linear.bias)
    module.scales = module.scales.float()
    return module


def swapped_fp8(linear: nn.Linear) -> nn.Module:
    """transformers' own `FP8Linear`, without its kernel."""
    parts, dense = packing.fp8(linear.weight)
    module = FP8Linear(linear.in_features, linear.out_features, block_size=(16, 16), has_bias=linear.bias is not None)
    module.weight = nn.Parameter(parts[".weight"], requires_grad=False)
    module.weight_scale_inv = nn.Parameter(parts[".weight_scale_inv"], requires_grad=False)
    module.bias = linear.bias
    module.forward = lambda x: nn.functional.linear(x, dense, linear.bias)  # type: ignore[method-assign,assignment]
    return module


def swapped_compressed(linear: nn.Linear) -> nn.Module:
    """A layer of compressed-tensors before its first pass."""
    parts, dense = packing.packed_int4(linear.weight)
    module = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    module.bias = linear.bias
    del module.weight
    for name, tensor in parts.items():
        module.register_parameter(name.removeprefix("."), nn.Parameter(tensor, requires_grad=False))
    module.quantization_scheme = SimpleNamespace(weights=SimpleNamespace(block_structure=None))  # type: ignore[assignment]
    module.quantization_status = "compressed"  # type: ignore[assignment]
    module.forward = lambda x: nn.functional.linear(x, dense, linear.bias)  # type: ignore[method-assign,assignment]
    return module


def swapped_other(linear: nn.Linear) -> nn.Module:
    """A layer whose packing nobody reads."""

    class EetqLinear(QuantLinear):
        pass

    codes = torch.zeros(linear.in_features, linear.out_features, dtype=torch.int8)
    return EetqLinear({".weight": codes}, linear.weight.detach(), linear.bias)


def swapped_torchao(linear: nn.Linear) -> nn.Module:
    """torchao's int8 rows, the real thing."""
    torchao = pytest.importorskip("torchao.quantization")
    module = copy.deepcopy(linear)
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig())
    return module


SWAPS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "gptq": swapped_gptq,
    "gptq, repacked": swapped_marlin,
    "awq": swapped_awq,
    "fp8": swapped_fp8,
    "compressed-tensors": swapped_compressed,
    "by its product": swapped_other,
    "torchao": swapped_torchao,
}


def swapped(model: PreTrainedModel, storage: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(a model whose targets are quantized, the same with dense layers that multiply by the same matrices)."""
    quantized, dense = copy.deepcopy(model), copy.deepcopy(model)
    for target in make_loaded(model).targets:
        module = SWAPS[storage](model.get_submodule(target.name))  # type: ignore[arg-type]
        quantized.set_submodule(target.name, module)
        eye = torch.eye(module.in_features)  # type: ignore[arg-type]
        bias = getattr(module, "bias", None)
        matrix = (module(eye) - (0 if bias is None else bias)).T
        dense.get_submodule(target.name).weight = nn.Parameter(matrix.contiguous(), requires_grad=False)
    return quantized.eval(), dense.eval()


@pytest.mark.parametrize("mode", ["full", "none"])
@pytest.mark.parametrize("family", ["llama_biased", "qwen3"])
@pytest.mark.parametrize("storage", SWAPS)
def test_edits_of_quantized_modules_are_those_of_their_matrices(storage: str, family: str, mode: str) -> None:
    quantized, dense = swapped(make_model(family), storage)
    loaded = make_loaded(quantized)
    assert len(loaded.targets) == 6
    for target in loaded.targets:
        assert storage_of(target.module) is not None
        torch.testing.assert_close(dense_weight(target.module).float(), dense.get_submodule(target.name).weight, **FLOAT32)
        assert shape_of(target.module) == tuple(dense_weight(target.module).shape)
    before = logits_of(quantized)
    torch.testing.assert_close(before, logits_of(dense), **FLOAT32)
    editor, params = make_editor(loaded, mode=mode), make_params(1)
    editor.apply(params)
    edited = logits_of(quantized)
    assert (edited - before).norm() > 0.01 * before.norm()
    write_dense(dense, editor, params, mode)
    torch.testing.assert_close(edited, logits_of(dense), **FLOAT32)
    editor.clear()
    assert torch.equal(logits_of(quantized), before)


def test_a_storage_has_one_holder() -> None:
    linear = nn.Linear(32, 32).requires_grad_(False)
    modules = [swap(linear) for name, swap in SWAPS.items() if name != "torchao"]
    for module in modules:
        assert sum(storage.holds(module) for storage in STORAGES.values()) == 1
    assert storage_of(linear) is None
    assert storage_remedy(linear) == ""


class FbgemmFp8Linear(nn.Linear):
    """Stands for FBGEMM's: rows with a scale each."""


class CompressedTensorsFP8Linear(nn.Linear):
    """Stands for that of transformers, whose scales are (1, d_out) as its kernel wants them."""


@pytest.mark.parametrize(("kind", "shape"), [(FbgemmFp8Linear, (24, 1)), (CompressedTensorsFP8Linear, (1, 24))])
def test_fp8_rows(kind: type[nn.Linear], shape: tuple[int, int]) -> None:
    module, scale = kind(24, 24), torch.rand(24)
    module.weight = nn.Parameter(random_matrix(24, 24).to(torch.float8_e4m3fn), requires_grad=False)
    module.weight_scale = nn.Parameter(scale.reshape(shape))  # type: ignore[assignment]
    torch.testing.assert_close(dense_weight(module), module.weight.float() * scale[:, None])


def fp8_experts() -> FP8Experts:
    """transformers' own, with three experts of 32 × 16."""
    config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=16, num_experts=3, num_local_experts=3)
    module = FP8Experts(config, block_size=(16, 16))
    for name in ("down_proj", "gate_up_proj"):
        getattr(module, name).data = torch.randn(getattr(module, name).shape).to(torch.float8_e4m3fn)
        getattr(module, f"{name}_scale_inv").data = torch.rand(getattr(module, f"{name}_scale_inv").shape)
    return module.requires_grad_(False)


def mxfp4_experts() -> tuple[Mxfp4GptOssExperts, Tensor]:
    """transformers' own as its kernel holds them, with a layout that is a transposition; and W (3, 32, 64)."""
    config: Any = SimpleNamespace(num_local_experts=3, intermediate_size=64, hidden_size=32)
    module = Mxfp4GptOssExperts(config)
    blocks, scales, dense = packing.mxfp4(torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0)))
    layout = SimpleNamespace(unswizzle_data=lambda data: data)

    def held(data: Tensor) -> Any:
        return SimpleNamespace(storage=SimpleNamespace(layout=layout, data=data.transpose(-1, -2)))

    del module.down_proj, module.gate_up_proj
    module.down_proj, module.gate_up_proj = held(blocks.flatten(-2)), None  # type: ignore[assignment]
    module.down_proj_precision_config = SimpleNamespace(weight_scale=held(scales))
    return module, dense


def test_quantized_experts_are_read() -> None:
    module = fp8_experts()
    wanted = torch.zeros(3, 32, 16)
    for e in range(3):
        for r in range(32):
            wanted[e, r] = module.down_proj[e, r].float() * module.down_proj_scale_inv[e, r // 16, 0]
    torch.testing.assert_close(dense_weight(module), wanted)
    assert (out_features(module), n_matrices(module)) == (32, 3)
    packed, dense = mxfp4_experts()
    torch.testing.assert_close(dense_weight(packed), dense, rtol=0, atol=0)
    assert (out_features(packed), n_matrices(packed)) == (32, 3)


class Unheard(nn.Module):
    """A layer of a package of tomorrow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(32, 6, dtype=torch.int32))


@pytest.mark.parametrize("what", ["FP8Experts", "Mxfp4GptOssExperts", "Unheard", "FP8GroupedLinear"])
def test_what_cannot_be_edited_is_left_out_with_the_remedy(what: str) -> None:
    model = make_model("llama" if "Experts" not in what else "qwen3_moe" if what == "FP8Experts" else "gpt_oss")
    if what == "FP8Experts":
        model.set_submodule("model.layers.1.mlp.experts", fp8_experts())
    elif what == "Mxfp4GptOssExperts":
        model.set_submodule("model.layers.1.mlp.experts", mxfp4_experts()[0])
    else:
        module = Unheard() if what == "Unheard" else type(what, (nn.Linear,), {})(48, 32)
        if what != "Unheard":
            module.weight = nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
        model.set_submodule("model.layers.1.mlp.down_proj", module)
    loaded = make_loaded(model)
    coverage = coverage_of(model, loaded.architecture, loaded.targets)
    (left,) = coverage.left_out
    assert (left.path.split(".")[0], left.layers) == ("mlp", 1)
    assert what in left.left_out
    assert "--set load.dequantize=true" in left.left_out
    # Of what isn't known the size isn't either, so it may be most of all.
    assert (left.parameters == 0) == (what == "Unheard")
    if what == "Unheard":
        with pytest.raises(InputError, match=r"of unknown size.*--allow-partial"):
            check_coverage(coverage, allow_partial=False)


def test_nothing_but_what_cannot_be_edited_is_an_error_with_the_remedy() -> None:
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = layer.self_attn.o_proj = Unheard()
    with pytest.raises(InputError, match=r"weights in model\.layers\.0\..* can't be edited: .*Unheard.*load\.dequantize=true"):
        make_loaded(model)


def test_a_layer_that_is_not_linear_is_an_error() -> None:
    class BitLinear(QuantLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / x.norm(dim=-1, keepdim=True))

    with pytest.raises(InputError, match="doesn't multiply by one matrix"):
        dense_weight(BitLinear({".weight": torch.zeros(8, 8, dtype=torch.uint8)}, torch.randn(32, 32), None))


def test_hqq_says_what_it_is() -> None:
    class HQQLinear(QuantLinear):
        def dequantize(self) -> Tensor:
            return self.kernel

    module = HQQLinear({".W_q": torch.zeros(32, 6, dtype=torch.uint8)}, torch.randn(32, 48), None)
    assert torch.equal(dense_weight(module), module.kernel)


def test_full_edit_keeps_row_norms_of_a_dequantized_matrix() -> None:
    parts, dense = packing.gptq(random_matrix(32, 64)[1:].repeat(2, 1)[:32])
    weight = gptq(parts[".qweight"], parts[".qzeros"], parts[".scales"], parts[".g_idx"], 1)
    edited = dense_edit(weight, make_directions(3, 32).at(1), 1.0, "full")
    torch.testing.assert_close(edited.norm(dim=1), dense.double().norm(dim=1), rtol=1e-6, atol=1e-9)


def test_compressed_tensors_that_round_their_inputs_have_the_matrix_that_they_round() -> None:
    """Static scales of inputs are small, so a product with ones would be cut off."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle")
    linear = nn.Linear(64, 32, bias=False)
    weights = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = quantization.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    lifecycle.initialize_module_for_quantization(linear, scheme)
    linear.weight_scale.data = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    linear.input_scale.data.fill_(0.002)
    linear.quantization_status = quantization.QuantizationStatus.FROZEN
    found = CompressedTensors().dense(linear)
    assert (found - linear.weight).abs().max() < 0.01 * linear.weight.abs().max()
    assert not torch.equal(found, linear.weight), "it is rounded"
