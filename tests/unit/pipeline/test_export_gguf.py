"""`abliterate export --gguf`: a GGUF file of the run's model is edited, and everything else in it stays."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result
from abliterate.errors import AbliterateError, InputError
from abliterate.export import base_weights
from abliterate.export import gguf as export_gguf_module
from abliterate.export.gguf import check_columns
from abliterate.model import loader
from abliterate.objectives import DEFAULT
from abliterate.pipeline import export_gguf as export_gguf_pipeline
from abliterate.pipeline.export_gguf import GgufRequest, export_gguf
from abliterate.types import Baseline, Trial
from support.cli import forbidden
from support.exports import make_run
from support.gguf_files import metadata_of, raw_tensors, tensors_of, types_of, write_gguf
from support.models import (
    dense_edit,
    logits_of,
    make_editor,
    make_loaded,
    make_model,
    make_params,
    save_model,
    write_dense,
)
from support.runs import Recorder

WIDE = {"intermediate_size": 64}  # rows that the blocks of 32 entries divide
PLAIN = {"self_attn.o_proj": "attn_output", "mlp.down_proj": "ffn_down"}
TENSORS = PLAIN | {"mlp.experts": "ffn_down_exps", "mlp.shared_expert.down_proj": "ffn_down_shexp"}
# The largest error of a type, as a share of the largest entry in its block.
STEP = {"F32": 1e-6, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.6 / 127}


class Made:
    """A run of one trial on a tiny model, and a GGUF file of that model."""

    def __init__(self, folder: Path, family: str, kind: str, mode: str = "full", count: int = 1, **options: Any) -> None:
        self.model: PreTrainedModel = make_model(family, **options)
        self.count = count
        self.settings, self.directory = make_run(folder, save_model(self.model, folder / "base"), count, edit={"mode": mode})
        self.base = write_gguf(self.model, folder / "base.gguf", kind)
        self.out = folder / "out.gguf"
        self.recorder = Recorder()

    def export(self, kind: str = "", number: int = 0, **over: Any) -> Result:
        request = GgufRequest(over.get("base", self.base), over.get("out", self.out), kind)
        return export_gguf(self.settings, self.recorder, self.directory, number, request)

    def definitions(self, base: Path, mode: str) -> dict[str, Tensor]:
        """{tensor: W' by definition, of the file's own W}, by no code of the export."""
        stored, editor = tensors_of(base), make_editor(make_loaded(self.model), mode=mode, count=self.count)
        found = {}
        for name, key in editor.plan(make_params(0)).items():
            layer, within = name.removeprefix("model.layers.").split(".", 1)
            tensor = f"blk.{layer}.{TENSORS[within]}.weight"
            weight, (vectors, coeffs) = stored[tensor].double(), editor.vectors(make_params(0), key)
            matrices = weight if weight.ndim == 3 else weight[None]
            found[tensor] = torch.stack([dense_edit(each, vectors, coeffs, mode) for each in matrices]).view(weight.shape)
        return found


def assert_edited(made: Made, mode: str, types: Mapping[str, str]) -> None:
    """Edited tensors are as defined within their type's rounding; all other bytes are the base's, and so are the metadata."""
    expected, found, kinds = made.definitions(made.base, mode), tensors_of(made.out), types_of(made.out)
    assert expected
    for name, weight in expected.items():
        assert kinds[name] == types[name.split(".")[2]], name
        bound = STEP[kinds[name]] * weight.abs().amax(dim=-1, keepdim=True) + 1e-6
        assert ((found[name] - weight).abs() <= bound).all(), name
        assert (tensors_of(made.base)[name] - weight).norm() > 3 * bound.mean(), "the edit is larger than the rounding"
    before, after = raw_tensors(made.base), raw_tensors(made.out)
    assert list(before) == list(after)
    assert {name for name in before if before[name] != after[name]} == set(expected)
    old, new = metadata_of(made.base), metadata_of(made.out)
    assert list(new)[: len(old)] == list(old)
    assert {key: new[key] for key in old if key != "general.name"} == {key: old[key] for key in old if key != "general.name"}
    assert new["general.name"][1] == "tiny abliterated"
    assert {key: new[key][1] for key in list(new)[len(old) :] if key.endswith(("trial", "model"))} == {
        "abliterate.base_model": "base",
        "abliterate.trial": 0,
    }
    assert str(made.out.parent) not in made.out.read_bytes().decode("latin-1"), "no local path is in the file"


CASES = {
    "llama": ("llama", "F32", "full", {"attn_output": "F32", "ffn_down": "F32"}),
    "qwen2": ("qwen2", "BF16", "pre", {"attn_output": "BF16", "ffn_down": "BF16"}),
    "qwen3": ("qwen3", "F16", "none", {"attn_output": "F16", "ffn_down": "F16"}),
    "gemma3": ("gemma3", "Q8_0", "full", {"attn_output": "Q8_0", "ffn_down": "Q8_0"}),
    "qwen2_moe": ("qwen2_moe", "F16", "full", {"attn_output": "F16", "ffn_down_exps": "F16", "ffn_down_shexp": "F16"}),
    "four bits": ("llama", "Q4_0", "full", {"attn_output": "Q8_0", "ffn_down": "Q8_0"}),
}


@pytest.mark.parametrize("case", CASES)
def test_edited_matrices_are_as_defined_and_all_else_stays(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, kind, mode, types = CASES[case]
    made = Made(tmp_path, family, kind, mode, **({} if family == "qwen2_moe" else WIDE))
    for module in (base_weights, loader):
        monkeypatch.setattr(module, "load_weights", forbidden)
    monkeypatch.setattr(export_gguf_module, "CHUNK", 200)  # several pieces of a matrix
    result = made.export()
    assert_edited(made, mode, types)
    record = result.export
    assert (record.kind, record.path, record.trial, record.verified) == ("gguf", "out.gguf", 0, True)
    assert record.verification["checks"] == {"weights": True, "untouched": True}
    assert record.tensor_types == [{"base": kind, "export": next(iter(types.values()))}]
    assert record.bytes == made.out.stat().st_size
    assert any(next(iter(types.values())) in note for note in made.recorder.notes)
    assert made.recorder.warnings == []
    assert {path.name for path in tmp_path.iterdir()} == {"base", "base.gguf", "out.gguf", "run"}


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("mode", ["full", "columns"])
def test_several_directions_are_removed(family: str, mode: str, tmp_path: Path) -> None:
    made = Made(tmp_path, family, "F32", mode, count=2)
    assert made.export().export.verified
    assert_edited(made, mode, dict.fromkeys(("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp"), "F32"))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_result_is_the_edited_model_in_transformers_gguf_reader(family: str, tmp_path: Path) -> None:
    made = Made(tmp_path, family, "F16")
    made.export()

    def loaded(path: Path) -> PreTrainedModel:
        options = {"config": made.model.config, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, **options).eval()

    expected = loaded(made.base)
    write_dense(expected, make_editor(make_loaded(loaded(made.base))), make_params(0), "full")
    found, plain = logits_of(loaded(made.out)), logits_of(loaded(made.base))
    error, edit = (found - logits_of(expected)).norm(), (plain - logits_of(expected)).norm()
    assert error < 0.01 * edit


def test_an_edit_that_four_bits_lose_is_told(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama", "Q4_0", **WIDE)
    result = made.export("q4_0")
    assert set(types_of(made.out).values()) == {"Q4_0", "F32"}
    assert result.export.verification["lost_to_storage"] > 0.1
    assert len(made.recorder.warnings) == 1
    assert "--gguf-type Q8_0 or F16 keeps it" in made.recorder.warnings[0]


def test_k_quants_are_read_and_written_as_q8_0(tmp_path: Path) -> None:
    random, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q6_K
    packed = random.integers(0, 256, (32, 210), dtype=np.uint8)  # one block of 256 entries a row
    packed[:, -2:] = np.full((32, 1), 1e-4, dtype=np.float16).view(np.uint8)
    model = make_model("llama", intermediate_size=256)
    model.model.layers[1].mlp.down_proj.weight.copy_(torch.tensor(gguf.dequantize(packed, kind)))

    def change(writer: gguf.GGUFWriter) -> None:
        del writer.tensors[0]["blk.1.ffn_down.weight"]
        writer.add_tensor("blk.1.ffn_down.weight", packed, raw_dtype=kind)

    made = Made.__new__(Made)
    made.model, made.count, made.recorder, made.out = model, 1, Recorder(), tmp_path / "out.gguf"
    made.settings, made.directory = make_run(tmp_path, save_model(model, tmp_path / "base"))
    made.base = write_gguf(model, tmp_path / "base.gguf", "F16", change)
    made.export()
    name = "blk.1.ffn_down.weight"
    assert (types_of(made.base)[name], types_of(made.out)[name], types_of(made.out)["blk.1.attn_output.weight"]) == (
        "Q6_K",
        "Q8_0",
        "F16",
    )
    expected = made.definitions(made.base, "full")[name]
    assert (tensors_of(made.out)[name] - expected).norm() < 0.01 * expected.norm()
    with pytest.raises(InputError, match="can't write tensors as Q6_K; choose --gguf-type from F32, F16"):
        made.export("Q6_K", out=tmp_path / "second.gguf")


def test_refined_trials_are_edited_by_their_own_directions(tmp_path: Path) -> None:
    made = Made(tmp_path, "llama", "F32", **WIDE)
    names = ["model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"]
    vectors = torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    coeffs = {names[0]: 0.7, names[1]: 1.1}
    params = RefinedStore(made.directory.refined).put(1, coeffs, dict(zip(names, vectors, strict=True)), {})
    result = Result.read(made.directory)
    trial = Trial(1, params, "complete", result.trials[0].scores)
    result.searched([*result.trials, trial], [trial], Baseline(9, 12, {}, {"count": 9}), DEFAULT)
    result.write(made.directory)
    made.export(number=1)
    before, after = tensors_of(made.base), tensors_of(made.out)
    edited = {"blk.0.attn_output.weight": (0.7, vectors[0]), "blk.2.ffn_down.weight": (1.1, vectors[1])}
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(edited)
    for name, (coeff, v) in edited.items():
        assert (after[name] - dense_edit(before[name].double(), v.double(), coeff, "full")).abs().max() < 1e-6


def without_scores(writer: gguf.GGUFWriter) -> None:
    del writer.tensors[0]["blk.2.ffn_down.weight"]


def narrower(writer: gguf.GGUFWriter) -> None:
    del writer.tensors[0]["blk.2.ffn_down.weight"]
    writer.add_tensor("blk.2.ffn_down.weight", np.zeros((32, 32), dtype=np.float32))


def with_number(key: str, value: int) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_uint32(key, value)


def with_architecture(name: str) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_string("general.architecture", name)


MISFITS: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "architecture": (with_architecture("gemma2"), "its architecture is gemma2, and the model's llama"),
    "unknown": (with_architecture("llama9"), "its architecture is 'llama9', which the library gguf doesn't know"),
    "layers": (with_number("llama.block_count", 4), "it has 4 layers, and the model has 3"),
    "width": (with_number("llama.embedding_length", 48), "it has 48 entries in a hidden state, and the model has 32"),
    "missing": (without_scores, "it has no tensor blk.2.ffn_down.weight"),
    "shape": (narrower, r"blk.2.ffn_down.weight has the shape \(32, 32\), not \(32, 64\)"),
    "parts": (with_number("split.count", 2), "is one of several parts; join them"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), "llama", "F32", **WIDE)


def assert_refused(made: Made, part: str, error: type[AbliterateError] = InputError, **over: Any) -> None:
    """One sentence, and nothing is written."""
    before = sorted(made.out.parent.iterdir())
    with pytest.raises(error, match=part):
        made.export(**over)
    assert sorted(made.out.parent.iterdir()) == before


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_of_another_model_is_refused(case: str, made: Made, tmp_path: Path) -> None:
    change, part = MISFITS[case]
    assert_refused(made, part, base=write_gguf(made.model, tmp_path / "base.gguf", "F32", change))


def test_other_weights_of_the_same_sizes_are_refused(made: Made, tmp_path: Path) -> None:
    other = write_gguf(make_model("llama", 1, **WIDE), tmp_path / "other.gguf", "F32")
    assert_refused(made, r"the weights in blk.0.ffn_down.weight are others than the model's \(cosine", base=other)


def test_edits_from_inputs_are_for_tensors_whose_columns_stay_in_order(made: Made) -> None:
    names = {"a": "blk.0.ffn_down_exps.weight", "b": "blk.0.attn_output.weight", "c": "blk.0.ssm_out.weight"}
    base = SimpleNamespace(tensors={name: SimpleNamespace(name=tensor) for name, tensor in names.items()})
    check_columns(base, ["a", "b"], "least-squares")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"least-squares is computed from .*blk.0.ssm_out.weight in another .*--kind merged"):
        check_columns(base, ["a", "c"], "least-squares")  # type: ignore[arg-type]


def test_nothing_is_replaced_and_nothing_unreadable_is_taken(made: Made, tmp_path: Path) -> None:
    assert_refused(made, "exists and is not replaced", out=made.base)
    assert_refused(made, "No such file", base=tmp_path / "nowhere.gguf")
    assert_refused(made, "have 64 entries, which TQ1_0 can't pack in blocks of 256", kind="TQ1_0")
    half = tmp_path / "half.gguf"
    half.write_bytes(made.base.read_bytes()[:-1000])
    assert_refused(made, "it ends within the tensor", base=half)


def test_a_full_disk_is_told_before_anything_is_written(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert_refused(made, "free some space", AbliterateError)


def test_a_base_that_fails_while_it_is_read_is_told_as_the_base(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room = export_gguf_pipeline.check_room

    def gone(size: int, folder: Path) -> None:
        check_room(size, folder)
        made.base.rename(away)

    away = made.base.with_name("away.gguf")
    monkeypatch.setattr(export_gguf_pipeline, "check_room", gone)
    with pytest.raises(
        AbliterateError, match=r"^The GGUF file base.gguf can't be read any more \(No such file or directory\);"
    ):
        made.export()
    away.rename(made.base)
    assert not made.out.exists()


@pytest.mark.parametrize("fault", ["edit", "other"])
def test_a_wrong_file_never_gets_its_name(fault: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "edit":
        monkeypatch.setattr(export_gguf_module, "edited_rows", lambda old, factors, rows: old)
    else:
        honest = export_gguf_module.marked
        monkeypatch.setattr(
            "abliterate.pipeline.export_gguf.marked", lambda fields, new: dict(list(honest(fields, new).items())[1:])
        )
    part = "differs from the trial .* and was removed"
    assert_refused(made, part, AbliterateError)


def test_a_missing_library_is_told_with_the_extra(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(made, r"pip install '.\[gguf\]'")
