"""Checkpoints that are quantized themselves: from files written by hand to a run, its export, and what a user reloads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError
from abliterate.export.adapter import peft_refusal
from abliterate.export.base_weights import Matrices
from abliterate.export.check_behaviour import Precision
from abliterate.model import quantized
from abliterate.model.loader import LoadedModel, load_config, load_model
from abliterate.model.weights import dense_weight
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.settings.schema import LoadSettings
from abliterate.types import Prompt
from support import packing
from support.exports import FLOAT32, Case, make_job, write
from support.models import (
    CPU,
    logits_of,
    make_chat,
    make_editor,
    make_loaded,
    make_model,
    make_params,
    make_tokenizer,
    save_model,
    write_dense,
)
from support.runs import Recorder, quick_settings, run_in

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": INT4}},
    "ignore": ["lm_head"],
}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}


def fp8_rows(weight: Tensor) -> packing.Packed:
    """FBGEMM's FP8: a scale for each row."""
    return packing.fp8(weight, block=(1, weight.shape[1]), suffix=".weight_scale")


FORMATS: dict[str, tuple[Callable[[Tensor], packing.Packed], dict[str, Any]]] = {
    "fp8": (packing.fp8, FP8),
    "gptq": (packing.gptq, GPTQ),
    "awq": (packing.awq, AWQ),
    "compressed-tensors": (packing.packed_int4, COMPRESSED),
    "fbgemm_fp8": (fp8_rows, FBGEMM),
}


def load(path: Path, **settings: Any) -> LoadedModel:
    """As a run loads it; nothing may be warned of."""
    return load_model(
        str(path), LoadSettings(**settings), CPU, lambda tokenizer, at: make_chat(tokenizer).encode([Prompt("Hi")]), pytest.fail
    )


def quantize(folder: Path, name: str, family: str = "llama") -> tuple[Path, dict[str, Tensor]]:
    """(a tiny model's directory in that format, {matrix: what it means})."""
    pack, entry = FORMATS[name]
    base = save_model(make_model(family), folder / "base")
    return folder / name, packing.quantize_folder(base, folder / name, pack, entry)


def quantize_experts(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny GPT-OSS whose experts are MXFP4, as the real one's are: (its directory, {parameter: what it means})."""
    base = save_model(make_model("gpt_oss", hidden_size=64, intermediate_size=64), folder / "base")
    shutil.copytree(base, folder / "mxfp4")
    tensors, meaning = load_file(base / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        blocks, scales, dense = packing.mxfp4(tensors.pop(name).transpose(1, 2).contiguous())
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meaning[name] = dense.transpose(1, 2)
    save_file(tensors, folder / "mxfp4" / "model.safetensors", metadata={"format": "pt"})
    put_entry(folder / "mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return folder / "mxfp4", meaning


def put_entry(folder: Path, entry: Mapping[str, Any]) -> None:
    """Change what config.json says of the quantization."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(entry)}), encoding="utf-8")


def with_meaning(path: Path, meaning: Mapping[str, Tensor]) -> PreTrainedModel:
    """The dense model that a quantized one stands for, made of the base's directory."""
    model = AutoModelForCausalLM.from_pretrained(path.parent / "base", dtype=torch.float32)
    state = model.state_dict()
    for name, tensor in meaning.items():
        state[name].copy_(tensor)
    return model.eval().requires_grad_(False)


def entry_of(folder: Path) -> Any:
    """What a directory's config.json says of quantization."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("fp8", "full"), ("fp8", "none"), ("gptq", "none"), ("awq", "full")),
        *(("compressed-tensors", "none"), ("fbgemm_fp8", "full"), ("mxfp4", "full"), ("mxfp4", "none")),
    ],
)
def test_dense_edited_exported_reloaded(name: str, mode: str, tmp_path: Path) -> None:
    path, meaning = quantize_experts(tmp_path) if name == "mxfp4" else quantize(tmp_path, name)
    loaded = load(path, dequantize=True)
    assert loaded.info.quantization == f"{name} (dequantized)"
    dense = with_meaning(path, meaning)
    assert torch.equal(logits_of(loaded.model), logits_of(dense))
    editor, params = make_editor(loaded, mode=mode), make_params(1)
    editor.apply(params)
    edited = logits_of(loaded.model)
    write_dense(dense, editor, params, mode)
    torch.testing.assert_close(edited, logits_of(dense), **FLOAT32)
    job = make_job(loaded, editor.factors(params))
    facts = write("merged", job, tmp_path / "out")
    assert (facts["streamed"], facts["dequantized"], facts["reason"]) == (False, name, f"its weights are quantized ({name})")
    assert entry_of(tmp_path / "out") is None
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), edited, **FLOAT32)
    ok, record = Case(job, editor, params, mode).check("merged", tmp_path / "out")
    assert ok, record
    assert record["checks"] == {"weights": True, "untouched": True}


@pytest.mark.parametrize("name", ["fp8", "mxfp4"])
def test_on_a_cpu_it_is_as_transformers_makes_it_dense(name: str, tmp_path: Path) -> None:
    """Without the setting, too: there are no kernels for a CPU."""
    path, _ = quantize_experts(tmp_path) if name == "mxfp4" else quantize(tmp_path, name, "llama")
    loaded = load(path)
    assert loaded.info.quantization == f"{name} (dequantized)"
    options = {"fp8": transformers.FineGrainedFP8Config, "mxfp4": transformers.Mxfp4Config}[name](dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=options)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(theirs), rtol=0, atol=0)


def test_experts_of_fp8_are_joined_as_dense_ones_are(tmp_path: Path) -> None:
    path, meaning = quantize(tmp_path, "fp8", "qwen3_moe")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in meaning
    loaded = load(path)
    for index, expert in enumerate(dense_weight(loaded.model.get_submodule("model.layers.0.mlp.experts"))):
        assert torch.equal(expert, meaning[f"model.layers.0.mlp.experts.{index}.down_proj.weight"])
    assert len(loaded.targets) == 6


def made(folder: Path, tensors: Mapping[str, Tensor], entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the loader is given of files with these tensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = transformers.LlamaConfig(quantization_config=dict(entry))
    return {name: tensor[...] for name, tensor in quantized.dense_state(str(folder), config, LoadSettings()).items()}


@pytest.mark.parametrize("name", [".weight_scale_inv", ".scale", ".qscale_weight", ".weight_scale"])
def test_scales_under_every_name_in_use(name: str, tmp_path: Path) -> None:
    parts, dense = packing.fp8(torch.randn(32, 48), suffix=name)
    found = made(tmp_path, {f"a{ending}": part for ending, part in parts.items()} | {"b.weight": torch.ones(3)}, FP8)
    assert found.keys() == {"a.weight", "b.weight"}
    assert torch.equal(found["a.weight"], dense)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """As transformers saves FP8 experts, DeepSeek packs them as FP4, and Llama 4 has them from FBGEMM."""
    pairs = [packing.fp8(torch.randn(32, 48)) for _ in range(2)]
    stack, scales = (torch.stack([parts[name] for parts, _ in pairs]) for name in (".weight", ".weight_scale_inv"))
    found = made(tmp_path, {"e.down_proj": stack, "e.down_proj_scale_inv": scales}, FP8)
    assert torch.equal(found["e.down_proj"], torch.stack([dense for _, dense in pairs]))
    blocks, exponents, dense = packing.mxfp4(torch.randn(16, 64))
    packed = {"e.0.w2.weight": blocks.flatten(-2).view(torch.int8), "e.0.w2.scale": exponents.view(torch.float8_e8m0fnu)}
    assert torch.equal(made(tmp_path, packed, FP8)["e.0.w2.weight"], dense)
    down, scale = torch.randn(2, 8, 6).to(torch.float8_e4m3fn), torch.rand(2, 6, 1)
    found = made(tmp_path, {"e.down_proj": down, "e.down_proj_scale": scale}, FBGEMM)
    torch.testing.assert_close(found["e.down_proj"], down.float() * scale.transpose(1, 2))


def test_fp8_blocks_that_are_cut_off(tmp_path: Path) -> None:
    """DeepSeek's latent projections have 576 rows in blocks of 128; transformers refuses them on a CPU."""
    base = save_model(make_model("llama"), tmp_path / "base")
    meaning = packing.quantize_folder(
        base, tmp_path / "fp8", lambda weight: packing.fp8(weight, block=(20, 20)), FP8 | {"weight_block_size": [20, 20]}
    )
    assert torch.equal(logits_of(load(tmp_path / "fp8").model), logits_of(with_meaning(tmp_path / "fp8", meaning)))


def test_stored_in_bfloat16_it_is_rounded_once(tmp_path: Path) -> None:
    path, meaning = quantize(tmp_path, "gptq")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}), encoding="utf-8")
    loaded = load(path, dequantize=True)
    base = Matrices(str(path), LoadSettings(), loaded.architecture)
    for target in loaded.targets:
        assert torch.equal(base.of(target), meaning[f"{target.name}.weight"].bfloat16())


def test_a_run_on_fp8_and_any_trial_of_it(prompt_files: dict[str, str], tmp_path: Path) -> None:
    packing.quantize_folder(packing.DEMO, tmp_path / "demo", packing.fp8, FP8)
    few = {"search": {"trials": 2}, "response": {"max_new_tokens": 8}}
    settings = quick_settings(prompt_files, tmp_path / "cache", model=str(tmp_path / "demo"), **few)
    result, recorder = run_in(tmp_path / "run", settings)
    assert result["model"]["quantization"] == "fp8 (dequantized)"
    assert recorder.warnings == []
    assert any("quantized (fp8)" in note and "made dense" in note for note in recorder.notes)
    assert min(t["scores"]["refusals"] for t in result["trials"]) < result["baseline"]["refusals"] / 2
    export = result["export"]
    assert (export["verified"], export["dequantized"], export["dtype"]) == (True, "fp8", "bfloat16"), export
    assert "**dequantized**" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    assert entry_of(tmp_path / "run" / "model") is None
    number = next(t["number"] for t in result["trials"] if t["state"] == "complete")
    again = pipeline_export_trial.export_trial(
        settings, Recorder(), RunDirectory(tmp_path / "run"), number, tmp_path / "later", scores=True
    )
    assert again.export.verified, again.export
    assert again.export.verification["checks"].keys() >= {"weights", "untouched", "kl", "refusals", "modules"}
    assert again.export.dequantized == "fp8"
    assert "**dequantized**" in (tmp_path / "later" / "README.md").read_text(encoding="utf-8")


def test_what_is_left_out_of_an_export_is_found(tmp_path: Path) -> None:
    path, _ = quantize(tmp_path, "fp8")
    loaded = load(path)
    editor, params = make_editor(loaded), make_params(1)
    job = make_job(loaded, editor.factors(params))
    names = sorted(job.factors)
    write("merged", replace(job, factors={name: job.factors[name] for name in names[1:]}), tmp_path / "out")
    ok, record = Case(job, editor, params, "full").check("merged", tmp_path / "out")
    assert not ok
    assert record["weight_error"]["off"] == names[:1]


@pytest.mark.parametrize("bits", [4, 8])
def test_checkpoints_of_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = save_model(make_model("llama", hidden_size=64, intermediate_size=128), tmp_path / "base")
    entry = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(base, quantization_config=entry, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "bnb"
    )
    make_tokenizer().save_pretrained(tmp_path / "bnb")
    native, dense = load(tmp_path / "bnb"), load(tmp_path / "bnb", dequantize=True)
    assert native.info.quantization == f"bitsandbytes_{bits}bit"
    assert dense.info.quantization == f"bitsandbytes_{bits}bit (dequantized)"
    for ours, theirs in zip(dense.targets, native.targets, strict=True):
        torch.testing.assert_close(dense_weight(ours.module), dense_weight(theirs.module).float(), rtol=1e-2, atol=5e-3)
    editor, params = make_editor(dense), make_params(1)
    editor.apply(params)
    job, edited = make_job(dense, editor.factors(params)), logits_of(dense.model)
    for kind in ("merged", "adapter"):
        write(kind, job, tmp_path / kind)
        assert Case(job, editor, params, "full").check(kind, tmp_path / kind)[0]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), edited, **FLOAT32)
    editor.clear()
    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(dense.model, str(tmp_path / "adapter")).eval()), edited, **FLOAT32
    )


def test_checkpoints_of_torchao(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    base = save_model(make_model("llama"), tmp_path / "base")
    entry = transformers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(base, quantization_config=entry, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "ao"
    )
    make_tokenizer().save_pretrained(tmp_path / "ao")
    native, dense = load(tmp_path / "ao"), load(tmp_path / "ao", dequantize=True)
    assert (native.info.quantization, dense.info.quantization) == ("torchao", "torchao (dequantized)")
    torch.testing.assert_close(logits_of(dense.model), logits_of(native.model), **FLOAT32)
    editor, params = make_editor(native), make_params(1)
    editor.apply(params)
    job = make_job(native, editor.factors(params))
    write("merged", job, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(again), logits_of(native.model), **FLOAT32)
    assert Case(job, editor, params, "full").check("merged", tmp_path / "out")[0]


def test_compressed_tensors_runs_as_it_is_with_its_package(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    path, meaning = quantize(tmp_path, "compressed-tensors")
    loaded = load(path)
    assert loaded.info.quantization == "compressed-tensors"
    torch.testing.assert_close(logits_of(loaded.model), logits_of(with_meaning(path, meaning)), **FLOAT32)


def sentence(path: Path, **settings: Any) -> str:
    """What a person is told who loads a checkpoint that can't be loaded so."""
    with pytest.raises(InputError) as caught:
        load(path, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = quantize(tmp_path, "gptq")
    assert "quantized already (gptq)" in sentence(path, quantization="bnb_4bit")
    monkeypatch.setattr(quantized, "_is_there", lambda name: False)
    text = sentence(path)
    assert "pip install optimum gptqmodel, or load its weights dense with --set load.dequantize=true" in text
    monkeypatch.setattr(quantized, "_is_there", lambda name: True)
    put_entry(path, FBGEMM)
    assert "needs a GPU" in sentence(path)
    put_entry(path, {"quant_method": "of tomorrow"})
    assert "'of tomorrow', which transformers doesn't know" in sentence(path, dequantize=True)
    put_entry(path, GPTQ | {"checkpoint_format": "marlin"})
    assert "'marlin'" in sentence(path, dequantize=True)
    put_entry(path, AWQ | {"version": "gemv"})
    assert "'gemv'" in sentence(path, dequantize=True)
    put_entry(path, COMPRESSED)  # the files are GPTQ's
    assert "is stored as I32 without scales that are known" in sentence(path, dequantize=True)


def test_a_scale_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """Read without it, FP8 would be a matrix of another size."""
    path, _ = quantize(tmp_path, "fp8")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.down_proj.weight is stored as F8_E4M3 without scales" in sentence(path)


def test_kernels_that_are_missing_at_the_first_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = quantize(tmp_path, "fp8")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ImportError("finegrained-fp8 kernel unavailable: install kernels\nand more")

    monkeypatch.setattr("abliterate.model.loader._generates", fails)
    assert "fp8: finegrained-fp8 kernel unavailable" in sentence(path)


def test_dequantize_of_a_dense_checkpoint_changes_nothing(tmp_path: Path) -> None:
    path = save_model(make_model("llama"), tmp_path / "base")
    assert load(path, dequantize=True).info.quantization == "none"


@pytest.mark.parametrize(("method", "dora", "refused"), [("fp8", True, True), ("gptq", True, True), ("gptq", False, False)])
def test_adapters_onto_quantized_bases(method: str, dora: bool, refused: bool, tmp_path: Path) -> None:
    path, _ = quantize(tmp_path, method)
    loaded = load(path, dequantize=True)
    reason = peft_refusal(load_config(str(path), LoadSettings()), LoadSettings(), loaded.targets, dora=dora)
    assert bool(reason) == refused
    if refused:
        assert f"onto a base that is quantized as {method}" in reason
        with pytest.raises(AbliterateError, match=r"--kind merged"):
            write("adapter", make_job(loaded, make_editor(loaded).factors(make_params(1))), tmp_path / "adapter")


def test_tolerances_have_a_row_for_every_label() -> None:
    for name, row in (("none", "none"), ("bnb_4bit", "bnb_4bit"), ("gptq", "checkpoint"), ("fp8 (dequantized)", "dequantized")):
        precision = Precision(torch.float32, torch.bfloat16, name)
        assert precision.row == row
        assert precision.entry >= torch.finfo(torch.float32).eps
        assert precision.refusals(100) >= 1


def test_labels_that_are_no_quantization_of_a_checkpoint() -> None:
    assert [quantized.checkpoint_quantization(name) for name in ("none", "bnb_8bit", "mxfp4 (dequantized)", "awq")] == [
        "",
        "",
        "mxfp4",
        "awq",
    ]


def test_make_loaded_knows_what_is_dense() -> None:
    assert make_loaded(make_model("llama")).info.quantization == "none"
