"""An export that loads the model as a whole has every tensor of its base, or names those it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from abliterate.export import checked, merged, unloaded
from abliterate.export.safetensors_copy import SINGLE, read_header, shard_files
from abliterate.export.tensor_index import unloaded_tensors
from abliterate.model.loader import load_model
from abliterate.settings.schema import LoadSettings
from abliterate.types import Prompt, Trial
from support import packing
from support.exports import FLOAT32, Case, make_case, make_job, odd_checkpoint, write
from support.models import CPU, logits_of, make_chat, make_editor, make_model, make_params, save_model, write_dense
from support.zoo import ZOO, make_specimen

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory, by the index."""
    return {name: tensor for path in shard_files(folder) for name, tensor in load_file(path).items()}


def add(folder: Path, extra: dict[str, Tensor], **config: Any) -> None:
    """Add tensors to a checkpoint of one file, and entries to its config."""
    save_file(load_file(folder / SINGLE) | extra, folder / SINGLE, {"format": "pt"})
    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(record | config), encoding="utf-8")


def predicting_layer(folder: Path) -> dict[str, Tensor]:
    """A layer 3 as GLM-4.5 and DeepSeek-V3 have it, which predicts one more token: 25 tensors."""
    tensors = load_file(folder / SINGLE)
    layer = {name.replace("layers.2.", "layers.3."): 2 * t for name, t in tensors.items() if ".layers.2." in name}
    named = {"eh_proj.weight": torch.randn(32, 64), "shared_head.norm.weight": torch.ones(32)}
    dtype = next(iter(layer.values())).dtype
    return layer | {f"model.layers.3.{name}": tensor.to(dtype) for name, tensor in named.items()}


def glm(folder: Path) -> tuple[Case, dict[str, Tensor]]:
    """A mixture of experts in bfloat16 whose config says float32: (a trial on it, the tensors that its class doesn't load)."""
    case = make_case(folder, "glm4_moe", stored="bfloat16")
    extra = predicting_layer(Path(case.job.source))
    add(Path(case.job.source), extra, num_nextn_predict_layers=1, dtype="float32")
    return case, extra


def llama_with(folder: Path, names: dict[str, Tensor]) -> tuple[Case, dict[str, Tensor]]:
    """A model that is stored in another dtype than its config says, with further tensors."""
    case = make_case(folder, stored="float32")
    odd_checkpoint(Path(case.job.source))
    add(Path(case.job.source), names)
    return case, names


def multi_token(folder: Path) -> tuple[Case, dict[str, Tensor]]:
    """As Qwen3-Next and MiMo name them, in several dtypes."""
    return llama_with(
        folder, {"mtp.fc.weight": torch.randn(4, 8).bfloat16(), "mtp.0.norm.weight": torch.ones(3), "mtp.step": torch.tensor(7)}
    )


def leftovers(folder: Path) -> tuple[Case, dict[str, Tensor]]:
    """Buffers of an old version, and a head for another task."""
    names = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(3)}
    return llama_with(folder, names | {"value_head.weight": torch.randn(1, 32).half()})


BASES = pytest.mark.parametrize("make", [glm, multi_token, leftovers])


@BASES
def test_a_whole_export_has_every_tensor_of_its_base(make: Any, tmp_path: Path) -> None:
    case, extra = make(tmp_path)
    base = tensors_of(Path(case.job.source))
    if make is glm:
        assert (len(base), len(extra)) == (83, 25)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record
    found = tensors_of(tmp_path / "out")
    assert found.keys() == base.keys()
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    facts = write("merged", case.job, tmp_path / "again")
    assert facts["streamed"] is False
    assert "missing" not in facts
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config.get("num_nextn_predict_layers") == (1 if make is glm else None)
    # Plain transformers loads it by the new index, as the trial was.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(case.job.source, dtype=torch.float32)
    write_dense(expected, case.editor, case.params, case.mode)
    torch.testing.assert_close(logits_of(model), logits_of(expected), **FLOAT32)


@BASES
def test_an_export_without_one_of_them_is_no_exact_copy(make: Any, tmp_path: Path) -> None:
    case, extra = make(tmp_path)
    assert case.check("merged", tmp_path / "out")[0]
    lost, changed = sorted(extra)[:2]
    for path in shard_files(tmp_path / "out"):
        tensors = load_file(path)
        if lost in tensors:
            del tensors[lost]
            tensors[changed] = tensors[changed] + 1
            save_file(tensors, path, {"format": "pt"})
    ok, record = case.check("merged", tmp_path / "out")
    assert not ok
    assert record["checks"] == {"weights": True, "untouched": False}
    assert sorted(record["differs"]) == [lost, changed]
    card = checked(record, Trial(0, make_params(0), "complete", {}), 10)
    assert "Everything else is the base's" not in card
    assert f"`{lost}`" in card


def in_fp8(folder: Path) -> tuple[Case, Path, dict[str, Tensor]]:
    """A checkpoint in FP8 whose predicting layer is quantized, too: (a trial on it, its dense base, what its matrices mean)."""
    base = save_model(make_model("llama").bfloat16(), folder / "base")
    layer = {name.replace("layers.2.", "layers.3."): t for name, t in load_file(base / SINGLE).items() if ".layers.2." in name}
    add(base, layer | {"model.layers.3.eh_proj.weight": torch.randn(32, 64).bfloat16()})
    meaning = packing.quantize_folder(base, folder / "fp8", packing.fp8, FP8)
    add(folder / "fp8", {"model.layers.0.mlp.down_proj.input_scale": torch.ones(1)})

    def probe(tokenizer: Any, device: Any) -> Any:
        return make_chat(tokenizer).encode([Prompt("Hi")])

    loaded = load_model(str(folder / "fp8"), LoadSettings(dequantize=True, dtypes=["bfloat16"]), CPU, probe, pytest.fail)
    editor, params = make_editor(loaded), make_params(0)
    return Case(make_job(loaded, editor.factors(params)), editor, params, "full"), base, meaning


def test_quantized_ones_are_made_dense(tmp_path: Path) -> None:
    """Scales of a model's own modules, such as those of activations, end with the quantization."""
    case, base, meaning = in_fp8(tmp_path)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record
    found, plain = tensors_of(tmp_path / "out"), tensors_of(base)
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if ".layers.3." in name:
            expected = meaning[name].bfloat16() if name in meaning else plain[name]
            assert torch.equal(tensor, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))


def test_what_cannot_be_carried_over_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a format that only its package reads."""
    case, _, _ = in_fp8(tmp_path)
    monkeypatch.setattr(unloaded, "FILES", {})
    names = sorted(name for name in tensors_of(tmp_path / "fp8") if ".layers.3." in name)
    assert "model.layers.3.eh_proj.weight_scale_inv" in names
    facts = write("merged", case.job, tmp_path / "again")
    assert sorted(facts["missing"]) == names
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert f"**{len(names)} tensors of the base aren't in this export**" in card
    assert all(f"`{name}`" in card for name in names)
    ok, record = case.check("merged", tmp_path / "out")
    assert not ok
    assert record["checks"] == {"weights": True, "untouched": False}
    assert sorted(record["differs"]) == names


def test_large_ones_fill_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, extra = multi_token(tmp_path)
    carry_over = unloaded.carry_over
    monkeypatch.setattr(merged, "carry_over", lambda folder, found: carry_over(folder, found, size=50))
    assert case.check("merged", tmp_path / "out")[0]
    files = [path.name for path in shard_files(tmp_path / "out")]
    assert files == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert tensors_of(tmp_path / "out").keys() == tensors_of(Path(case.job.source)).keys()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    stored = [stored for path in shard_files(tmp_path / "out") for stored in read_header(path).values()]
    assert index["metadata"]["total_size"] == sum(one.end - one.start for one in stored)
    assert set(extra) <= index["weight_map"].keys()


def test_names_that_are_loaded_under_others_are_loaded() -> None:
    """Single experts, and a checkpoint without the head's prefix."""
    model = make_model("glm4_moe")
    names = ["layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.2.gate_proj.weight", "lm_head.weight"]
    assert unloaded_tensors([*names, "model.layers.3.mlp.experts.2.gate_proj.weight"], model) == [
        "model.layers.3.mlp.experts.2.gate_proj.weight"
    ]


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "qwen3_next", "deepseek_vl", "mixtral", "llama4"])
def test_nothing_that_a_class_saves_is_unloaded(family: str, tmp_path: Path) -> None:
    """Whatever it renames, stacks or splits; of all 160 families in the zoo none is an exception."""
    model = make_specimen(family) if family in ZOO else make_model(family)
    model.save_pretrained(tmp_path)
    assert unloaded_tensors(tensors_of(tmp_path), model) == []
