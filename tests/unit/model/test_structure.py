"""The structural fallback: what it finds, what it refuses, and models that can't be edited."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError
from abliterate.model import loader
from abliterate.model.architectures import ATTENTION, MLP, Architecture, find_targets, missing_components
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.residuals import capture_residuals
from abliterate.model.structure import Call, LayerProbe, discover, prove
from abliterate.pipeline.export_trial import export_trial
from abliterate.pipeline.run import run
from abliterate.settings.schema import LoadSettings
from support.models import CPU, PROMPTS, find_architecture, make_chat, make_model, save_model
from support.runs import Recorder, quick_settings
from support.zoo import ZOO, load_specimen, make_specimen


def load(folder: Path, **settings: Any) -> loader.LoadedModel:
    """`load_model` with a one-prompt probe."""
    return loader.load_model(
        str(folder),
        LoadSettings(**settings),
        CPU,
        lambda tokenizer, at: PromptEncoder(tokenizer, at).encode(PROMPTS[:1]),
        print,
    )


class Experts(nn.Module):
    """An MLP that is a list of experts, as models from elsewhere have them; the last is never chosen."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, 4, bias=False)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(d_model, d_hidden)}) for _ in range(4))
        for expert in self.experts:
            expert["down"] = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, -2), torch.zeros_like(x).flatten(0, -2)
        chosen = self.gate(flat)[:, :3].softmax(-1)
        for index in range(3):
            rows = (chosen.argmax(-1) == index).nonzero()[:, 0]
            if len(rows):
                expert = self.experts[index]
                out[rows] += chosen[rows, index, None] * expert["down"](torch.relu(expert["up"](flat[rows])))
        return out.view_as(x)


class Scaled(nn.Module):
    """A block whose output is scaled channel by channel on its way to the stream."""

    def __init__(self, block: nn.Module, d_model: int) -> None:
        super().__init__()
        self.block, self.gamma = block, nn.Parameter(torch.rand(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) * self.gamma


class Nothing(nn.Module):
    """A layer that passes on what enters."""

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_looked_through_in_float32(dtype: torch.dtype) -> None:
    model = make_model("gemma2").to(dtype)
    assert dict(discover(model, "x").components) == {ATTENTION: ("self_attn.o_proj",), MLP: ("mlp.down_proj",)}
    assert model.dtype == dtype


def test_experts_in_a_list_are_all_found() -> None:
    torch.manual_seed(0)
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp = Experts(32, 16).eval().requires_grad_(False)
    found = discover(model, "x")
    assert dict(found.components) == {ATTENTION: ("self_attn.o_proj",), MLP: ("mlp.experts.*.down",)}
    assert len(find_targets(model, found, 32)) == 3 * 5


def test_output_that_is_no_copy_is_unclear() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp, 32)
    with pytest.raises(InputError, match=r"unclear \(the output of mlp\.block\.down_proj reaches .*load\.components"):
        discover(model, "x")


def test_layer_that_writes_nothing_is_unclear() -> None:
    model = make_model("llama")
    model.model.layers[2] = Nothing()
    with pytest.raises(InputError, match="no module in layer 2"):
        discover(model, "x")


def test_several_streams_are_unclear() -> None:
    with pytest.raises(InputError, match=r"0 lists of 4 modules .* some see \(2, 1, 6, 32\)"):
        discover(make_specimen("gemma3n"), "x")


@pytest.mark.parametrize(
    ("path", "norm"),
    [
        ("self_attn.o_proj", "post_attention_layernorm"),
        ("mlp.down_proj", "post_feedforward_layernorm"),
        ("laurel.linear_right", "laurel.post_laurel_norm"),
        ("per_layer_projection", "post_per_layer_input_norm"),
    ],
)
def test_several_streams_get_multiples_of_what_the_table_names(path: str, norm: str) -> None:
    """Gemma 3n: the change of a stream is the change behind the module's norm, times a factor of either sign."""
    model = make_specimen("gemma3n")
    layer = model.model.layers[0]
    calls: list[Call] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, dict(kwargs))), with_kwargs=True)
    model(torch.arange(5, 11)[None], use_cache=False)
    handle.remove()
    probe = LayerProbe(layer, calls[0])
    assert torch.equal(layer.get_submodule(norm)(probe.outputs[path][0]), probe.outputs[norm][0])
    change = (probe._play(probe._all_but(norm), {norm: probe.delta}) - probe.base).flatten(0, -2)
    v = probe.delta / probe.delta.norm()
    along = change @ v
    assert (along.abs() > 1e-3 * probe.delta.norm()).any()
    assert (change - along[:, None] * v).norm() < 1e-4 * change.norm()


def test_layers_that_a_config_counts_otherwise() -> None:
    """LongCat: a layer has two of every block and experts beside them; its config counts the blocks."""
    model = make_specimen("longcat_flash")
    assert ZOO["longcat_flash"].unproven
    for layer, paths in zip(model.model.layers, ZOO["longcat_flash"].layers, strict=True):
        found = prove(layer, first_call(model, layer), 32)
        assert {writer.path for writer in found} == set(paths.split())
        assert all(writer.scale == pytest.approx(1, rel=1e-3) and not writer.norm for writer in found)


def test_cross_attention_layers_write_when_there_is_an_image() -> None:
    """Mllama: both blocks behind gates of one number, which begin at 0."""
    model = make_specimen("mllama")
    layer = model.model.language_model.layers[1]
    for gate in (layer.cross_attn_attn_gate, layer.cross_attn_mlp_gate):
        gate.fill_(0.5)
    call = first_call(model, layer, cross_attention_states=torch.randn(1, 4, 32))
    found = {writer.path: writer.scale for writer in prove(layer, call, 32)}
    assert found == pytest.approx(dict.fromkeys(("cross_attn.o_proj", "mlp.down_proj"), math.tanh(0.5)), rel=1e-3)


def first_call(model: Any, layer: nn.Module, **inputs: Any) -> Call:
    """How a text of six tokens calls a layer."""
    calls: list[Call] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, dict(kwargs))), with_kwargs=True)
    model(torch.arange(5, 11)[None], use_cache=False, **inputs)
    handle.remove()
    return calls[0]


def test_shared_modules_are_refused() -> None:
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(InputError, match="layers share modules"):
        find_targets(model, find_architecture("llama"), 32)


def test_layers_that_lack_a_component_are_counted() -> None:
    loaded = load_specimen("mamba")
    assert missing_components(loaded.targets, loaded.architecture, 3) == {}
    both = Architecture("x", (), "backbone.layers", {ATTENTION: ("mixer.out_proj",), MLP: ("mlp.down_proj",)})
    assert missing_components(find_targets(loaded.model, both, 32), both, 3) == {MLP: 3}


def test_run_and_later_export_of_a_family_found_by_structure(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    folder = save_model(make_specimen("biogpt"), tmp_path / "m")
    (tmp_path / "markers.txt").write_text("e\n", encoding="utf-8")
    settings = quick_settings(
        prompt_files,
        tmp_path / "cache",
        model=str(folder),
        search={"trials": 2},
        response={"max_new_tokens": 4},
        evaluation={"markers": str(tmp_path / "markers.txt")},
        efficiency={"use_certified_stop": False},
    )
    recorder = Recorder()
    with contextlib.suppress(AbliterateError):  # what a random model refuses is chance: there may be no front
        run(settings, recorder, RunDirectory(tmp_path / "run"), resume=False)
    assert any("isn't in the table" in note and "self_attn.out_proj" in note and "fc2" in note for note in recorder.notes)
    assert recorder.trials
    final = tmp_path / "export"
    export_trial(settings, Recorder(), RunDirectory(tmp_path / "run"), 0, final)
    assert json.loads((final / "abliterate.json").read_text(encoding="utf-8"))["export"]["verified"]


@pytest.mark.parametrize(
    "name", ["qwen2_vl", "qwen3_vl", "gemma3_vl", "mistral3", "llava", "gemma3n", "gemma4", "biogpt", "mamba"]
)
def test_models_load_from_disk_whole(name: str, tmp_path: Path) -> None:
    model = make_specimen(name)
    loaded = load(save_model(model, tmp_path / "m"))
    assert type(loaded.model) is type(model)
    assert {target.name for target in loaded.targets} == ZOO[name].names
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[path]) for path, tensor in loaded.model.state_dict().items())
    residuals = capture_residuals(loaded.model, loaded.layers, make_chat(), PROMPTS, batch_size=2)
    assert residuals.shape == (len(PROMPTS), len(ZOO[name].layers) + 1, 32)
    assert (residuals[:, 1:] - residuals[:, :-1]).abs().amax(dim=(0, 2)).min() > 0
