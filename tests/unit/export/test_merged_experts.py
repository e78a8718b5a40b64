"""Exports of edited experts: streamed wherever the files hold them in a known way, and checked expert by expert."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from abliterate.edits import Factors
from abliterate.errors import AbliterateError, InputError
from abliterate.export import EXPORTERS
from abliterate.export.base_weights import Matrices
from abliterate.export.check_behaviour import ModuleProbe, _largest_error, module_outputs, probe_inputs, storage_rounding
from abliterate.export.safetensors_copy import SINGLE, NotStreamable, shard_files
from abliterate.export.tensor_index import find_places
from abliterate.model.loader import load_config, load_weights
from abliterate.model.weights import dense_weight
from abliterate.settings.schema import LoadSettings
from support.exports import FLOAT32, MODES, ON, Case, make_job, write
from support.models import CPU, EXPERTS, logits_of, make_editor, make_loaded, make_model, save_model

STACK = "model.layers.1.mlp.experts"


def make_case(
    model: PreTrainedModel, folder: Path, change: Callable[[Path], None] = lambda path: None, **settings: Any
) -> Case:
    """A trial on a saved model, whose files are then changed."""
    path = save_model(model, folder / "base")
    change(path / SINGLE)
    loaded = make_loaded(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), str(path))
    editor = make_editor(loaded, **settings)
    return Case(make_job(loaded, editor.factors(ON)), editor, ON, settings.get("mode", "full"))


def trial_logits(case: Case, model: PreTrainedModel) -> Tensor:
    """What the trial does, in memory."""
    loaded = make_loaded(model)
    editor = make_editor(loaded, mode=case.mode)
    editor.apply(ON)
    return logits_of(loaded.model)


def reloaded(folder: Path) -> PreTrainedModel:
    """As a user loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("mode", [MODES[0], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:])])
@pytest.mark.parametrize("family", EXPERTS)
def test_merged_is_streamed_and_equals_the_trial(family: str, mode: str, tmp_path: Path) -> None:
    case = make_case(make_model(family), tmp_path, mode=mode)
    facts = write("merged", case.job, tmp_path / "out")
    torch.testing.assert_close(logits_of(reloaded(tmp_path / "out")), trial_logits(case, make_model(family)), **FLOAT32)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record
    assert facts["streamed"], facts


def fuse(path: Path) -> None:
    """Experts under the model's own names, as the Hub has some: transformers takes them as they are."""
    model = AutoModelForCausalLM.from_pretrained(path.parent)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path, {"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_checkpoint_that_holds_stacks(family: str, tmp_path: Path) -> None:
    case = make_case(make_model(family), tmp_path, fuse)
    assert f"{STACK}.down_proj" in load_file(Path(case.job.source) / SINGLE)
    assert write("merged", case.job, tmp_path / "out")["streamed"]
    torch.testing.assert_close(logits_of(reloaded(tmp_path / "out")), trial_logits(case, make_model(family)), **FLOAT32)
    assert case.check("merged", tmp_path / "out")[0]


def drop_prefix(path: Path) -> None:
    """Saved without the head's prefix, which transformers adds as it loads."""
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def in_doubles(path: Path) -> None:
    """The same numbers, but not in the dtype that the config says: such files aren't edited in place."""
    odd = {name: tensor.double() if tensor.dim() > 1 else tensor for name, tensor in load_file(path).items()}
    save_file(odd, path, {"format": "pt"})


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [drop_prefix, in_doubles])
def test_renamed_is_streamed_and_odd_as_a_whole(family: str, mode: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    case = make_case(make_model(family), tmp_path, change, mode=mode)
    facts = write("merged", case.job, tmp_path / "out")
    assert facts["streamed"] is (change is drop_prefix)
    torch.testing.assert_close(logits_of(reloaded(tmp_path / "out")), trial_logits(case, make_model(family)), **FLOAT32)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_only_what_is_edited_changes(family: str, tmp_path: Path) -> None:
    """Routers, biases, the other projections of experts: the bytes of the base."""
    case = make_case(make_model(family), tmp_path)
    write("merged", case.job, tmp_path / "out")
    base, out = load_file(Path(case.job.source) / SINGLE), load_file(tmp_path / "out" / SINGLE)
    changed = {name for name in base if not torch.equal(base[name], out[name])}
    kinds = ("down_proj", "o_proj.weight") if family == "gpt_oss" else ("down_proj.weight", "o_proj.weight")
    assert changed == {name for name in base if name.endswith(kinds)}
    assert changed


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_matrix_is_read_from_the_files_as_the_model_has_it(family: str, tmp_path: Path) -> None:
    """More experts than ten: their order is that of numbers, not of letters."""
    options = {"num_experts": 12} if family == "qwen3_moe" else {"num_local_experts": 12}
    case = make_case(make_model(family, **options), tmp_path)
    files = Matrices(case.job.source, case.job.load, case.job.architecture)
    assert files.whole is None, files.reason
    model = reloaded(Path(case.job.source))
    for name, target in files.targets.items():
        assert torch.equal(files.of(target), dense_weight(model.get_submodule(name)))
    assert files.count(files.targets[STACK]) == 12


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_definition_holds_in_half_precision(family: str, stored: str, tmp_path: Path) -> None:
    case = make_case(make_model(family).to(getattr(torch, stored)), tmp_path)
    ok, record = case.check("merged", tmp_path / "out")
    assert ok, record
    assert record["weight_error"]["max"] < torch.finfo(getattr(torch, stored)).eps


def spoil(factors: dict[str, Factors]) -> dict[str, Factors]:
    """One expert of one layer is left as it was."""
    parts = factors[STACK].parts()
    scales = [None if scale is None else torch.ones_like(scale) for scale in (parts[2].row_scale, parts[2].column_scale)]
    parts[2] = Factors(scales[0], parts[2].a, torch.zeros_like(parts[2].b), scales[1])
    return factors | {STACK: Factors.stacked(parts)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_one_expert_left_out_is_found(family: str, mode: str, tmp_path: Path) -> None:
    case = make_case(make_model(family), tmp_path, mode=mode)
    ok, record = case.check("merged", tmp_path / "out", case.with_factors(spoil))
    assert not ok
    assert record["weight_error"]["off"] == [f"{STACK}[2]"]


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_probes_of_the_reloaded_export(family: str, spoilt: bool, tmp_path: Path) -> None:
    """Verification by the modules' outputs, expert by expert, with the trial's hooks and with the export's weights."""
    case = make_case(make_model(family), tmp_path)
    write("merged", case.with_factors(spoil) if spoilt else case.job, tmp_path / "out")
    model, inputs = make_model(family), probe_inputs(case.job.factors)
    editor = make_editor(make_loaded(model))
    base = module_outputs(model, inputs, torch.float32)
    editor.apply(ON)
    edited = module_outputs(model, inputs, torch.float32)
    found = module_outputs(EXPORTERS["merged"].load(tmp_path / "out", case.job, CPU, torch.float32), inputs, torch.float32)
    for name, x in inputs.items():
        weight = dense_weight(model.get_submodule(name))
        rounding = storage_rounding(weight, case.job.factors[name], x, torch.float32)
        error = _largest_error(ModuleProbe(x, base[name], edited[name], rounding), found[name], 1e-7)
        assert error < 1e-3 or (spoilt and name == STACK and error == pytest.approx(1, abs=0.01))
    assert inputs[STACK].shape[0] == 4


def test_adapter_of_experts_is_refused(tmp_path: Path) -> None:
    case = make_case(make_model("qwen3_moe"), tmp_path)
    with pytest.raises(AbliterateError, match=r"An adapter can't hold .* fused experts, as in model\.layers\.0\.mlp\.experts"):
        write("adapter", case.job, tmp_path / "out")
    attention = {name: factors for name, factors in case.job.factors.items() if factors.a.ndim == 2}
    facts = write("adapter", replace(case.job, factors=attention), tmp_path / "attention")
    assert facts["edited_modules"] == len(attention) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: None, "the files hold 3 of the 4 experts in model.layers.1.mlp.experts"),
        (lambda one: one.bfloat16(), "is stored as BF16"),
        (lambda one: torch.cat([one, one]), "has the shape (64, 16), not (32, 16)"),
    ],
)
def test_files_that_hold_something_else_are_not_streamed(
    change: Callable[[Tensor], Tensor | None], reason: str, tmp_path: Path
) -> None:
    path = make_case(make_model("qwen3_moe"), tmp_path).job.source
    tensors = load_file(Path(path) / SINGLE)
    changed = change(tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight"))
    if changed is not None:
        tensors["model.layers.1.mlp.experts.2.down_proj.weight"] = changed
    save_file(tensors, Path(path) / SINGLE, {"format": "pt"})
    model = make_model("qwen3_moe")
    with pytest.raises(NotStreamable, match=re.escape(reason)):
        find_places(shard_files(Path(path)), model, make_loaded(model).targets, torch.float32)


def test_what_transformers_computes_is_not_streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A family whose stacks are turned round while they are loaded, as those of Qwen3-VL are."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    path = Path(make_case(make_model("gpt_oss"), tmp_path).job.source)
    rule = WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", operations=[Transpose(1, 2)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [rule])
    model = make_model("gpt_oss")
    with pytest.raises(NotStreamable, match=r"transformers converts model\.layers\.0\.mlp\.experts\.down_proj"):
        find_places(shard_files(path), model, make_loaded(model).targets, torch.float32)


def test_experts_that_do_not_fit_together_are_a_sentence(tmp_path: Path) -> None:
    path = make_case(make_model("qwen3_moe"), tmp_path).job.source
    tensors = load_file(Path(path) / SINGLE)
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]])
    save_file(tensors, Path(path) / SINGLE, {"format": "pt"})
    config = load_config(path, LoadSettings())
    with pytest.raises(InputError, match=r"such as experts, don't fit together; download it again"):
        load_weights(path, LoadSettings(), config, torch.float32, None)
