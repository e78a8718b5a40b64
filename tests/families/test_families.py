"""The matrix: tiny models of many families, each found, edited, evaluated, exported and read back as it should be."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from abliterate.errors import AbliterateError, InputError
from abliterate.model import loader
from abliterate.model.architectures import ATTENTION, MLP, find_targets
from abliterate.model.coverage import coverage_of
from abliterate.model.experts import is_fused
from abliterate.model.inputs import UNCAPTURED, Text, capture_inputs
from abliterate.model.structure import discover, find_stack, starred, writers_of
from abliterate.scorers.kl import kl_divergence
from abliterate.settings.schema import LoadSettings
from abliterate.types import Kernel, TrialParams
from support.models import CPU, logits_of, make_editor, save_model, write_dense
from support.zoo import GATE, HARMFUL, HARMLESS, NORM, ZOO, Lab, everywhere, export, last_layers, make_lab, scale_of

# Whose files hold their experts otherwise than stacked or one by one, so that an export loads and saves the whole.
WHOLE = {"ernie4_5_vl_moe", "qwen3_vl_moe"}
# Whose caches keep rows where they can't be selected; any other model is evaluated by the engine, without a warning.
BY_REFERENCE = {"minimax", "recurrent_gemma", "mamba", "mamba2", "falcon_mamba", "granite4_vision"}
# Whose layers aren't those of their caches, or are passed over: what is left is the engine's, with a warning for each attempt.
SLOWER = {"longcat_flash": "prefix · drafts · rows leave", "mllama": "rows leave"}
# What PEFT makes of their modules.
_EXPERTS = "down_proj for something else"
NO_ADAPTER = {
    **dict.fromkeys(("qwen3_next_dense", "deepseek_v2_dense", "deepseek_v3_dense", "glm4_moe_dense"), _EXPERTS),
    **dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h_latent"), "incompatible with Mamba"),
    **{
        name: "fused experts"
        for name, specimen in ZOO.items()
        if any("experts" in paths.split(".")[-1] for paths in " ".join(specimen.layers).split())
    },
}
CLOSE = {"rtol": 1e-3, "atol": 2e-5}


# Specimens that are built like another one: ./scripts/test --all has them.
_ALIKE = """
qwen2_5_vl qwen3_vl llava_next internvl glm4v glm46v glm4v_moe aya_vision cohere2_vision idefics2 smolvlm
llava_onevision ovis2 deepseek_vl chameleon exaone4_5 kimi_k25 qwen2_5_omni qwen3_omni_moe aria minicpmv4_6
mistral4_vl mistral_large4 minimax_m3_vl gemma4_unified hunyuan_vl nemotron_h_omni voxtral qwen3_5_vl gemma4_vl
lfm2_vl arcee apertus helium seed_oss ministral ministral3 hunyuan ernie4_5 persimmon gpt_bigcode gpt_neox_japanese
biogpt nanochat vaultgemma internlm3 iquestcoder starcoder2 stablelm exaone4 olmo olmo3 glm4 granitemoehybrid_dense
deepseek_v2_dense glm4_moe_dense
mistral smollm3 gptj mpt nemotron jamba_dense falcon_mamba zamba lfm3 mistral3 idefics3 llama4_vl step3p7 flex_olmo mellum
dots1 minimax_m2 solar_open kolibri1 laguna afmoe cohere2_moe hy_v3 axk2 granitemoe_swa glm_moe_dsa mistral4 lfm2_moe
qwen3_5_moe
"""
ALIKE = frozenset(_ALIKE.split())
assert set(ZOO) > ALIKE


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in ZOO])
def name(request: pytest.FixtureRequest) -> str:
    """Each specimen in turn."""
    return request.param


@pytest.fixture(scope="module")
def lab(name: str) -> Lab:
    """One lab per specimen."""
    return make_lab(name)


@pytest.fixture(scope="module")
def saved(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The specimen as a user would have it on disk."""
    folder = tmp_path_factory.mktemp("saved")
    yield save_model(lab.loaded.model, folder / "base")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _no_edit(lab: Lab) -> Iterator[None]:
    lab.editor.clear()
    yield
    lab.editor.clear()


def test_the_table_and_the_structure_find_the_modules_written_down(name: str, lab: Lab) -> None:
    assert {target.name for target in lab.loaded.targets} == ZOO[name].names
    assert lab.loaded.architecture.found_by == ZOO[name].found_by
    if not ZOO[name].unproven:
        found = discover(lab.loaded.model, "unknown")
        assert found.found_by == "structure"
        assert found.layers == ZOO[name].stack
        assert {target.name for target in find_targets(lab.loaded.model, found, 32)} == ZOO[name].names


def test_each_module_is_proven_to_write(name: str, lab: Lab) -> None:
    specimen, d_model = ZOO[name], lab.loaded.info.d_model
    if specimen.unproven:
        pytest.skip(specimen.unproven)
    path, calls = find_stack(lab.loaded.model, d_model)
    found = writers_of(lab.loaded.layers, calls, d_model)
    assert path == specimen.stack
    assert [{writer.path for writer in layer} for layer in found] == [set(paths.split()) for paths in specimen.layers]
    for index, layer in enumerate(found):
        for writer in layer:
            expected = scale_of(name, index, writer.path)
            if expected == NORM:
                assert writer.norm
            else:
                assert not writer.norm
                assert 0 < writer.scale < 1 if expected == GATE else writer.scale == pytest.approx(expected, rel=1e-3)
    mixing = {writer.path for layer in found for writer in layer if writer.mixes}
    components = {target.component: set[bool]() for target in lab.loaded.targets}
    for target in lab.loaded.targets:
        components[target.component].add(target.name.removeprefix(f"{path}.{target.layer}.") in mixing)
    assert components.items() <= {ATTENTION: {True}, MLP: {False}}.items()


def test_edited_logits_are_the_dense_ones(lab: Lab) -> None:
    n_layers = lab.loaded.info.n_layers
    base = logits_of(lab.loaded.model)
    dense = copy.deepcopy(lab.loaded.model)
    lab.editor.apply(everywhere(n_layers))
    assert lab.editor.hooks.active == {target.name for target in lab.loaded.targets}
    write_dense(dense, lab.editor, everywhere(n_layers), "full")
    found = logits_of(lab.loaded.model)
    torch.testing.assert_close(found, logits_of(dense), **CLOSE)
    assert (found - base).abs().max() > 1e-3
    off = TrialParams("per layer", 1.0, {name: Kernel(0.0, 0.0, 0.0, 1.0) for name in (ATTENTION, MLP)})
    lab.editor.apply(off)
    assert torch.equal(logits_of(lab.loaded.model), base)


def test_engine_is_used_or_says_why_not_and_gives_the_references_numbers(name: str, lab: Lab) -> None:
    by_reference = name in BY_REFERENCE
    if name in SLOWER:
        assert lab.mechanisms == SLOWER[name]
        assert all(re.match(r"The trial engine( without .*)? fails .*a slower way is tried", said) for said in lab.warnings)
    else:
        assert (lab.mechanisms == "reference") == by_reference
        assert [warning.split(":")[0] for warning in lab.warnings[:1]] == ["The trial engine can't be used"] * by_reference
        assert len(lab.warnings) == 2 * by_reference
    for edited in (everywhere, last_layers):
        lab.editor.apply(edited(lab.loaded.info.n_layers))
        expected, found = (engine.first_logprobs(HARMLESS) for engine in (lab.reference, lab.engine))
        assert kl_divergence(expected, found).max() < 1e-5
        said = [[response.text for response in engine.respond(HARMFUL) or []] for engine in (lab.reference, lab.engine)]
        assert said[0] == said[1]


def test_exports_read_back_as_the_edit_or_are_refused(name: str, lab: Lab, saved: Path, tmp_path: Path) -> None:
    facts, merged = export(lab, "merged", saved, tmp_path / "merged")
    assert facts["streamed"] == (name not in WHOLE), facts
    base = lab.loaded.model.state_dict()
    changed = {
        path.removesuffix(".weight") if path.endswith(".weight") else path.removesuffix(".down_proj")  # fused experts
        for path, tensor in merged.state_dict().items()
        if not torch.equal(tensor, base[path])
    }
    assert changed == ZOO[name].names
    lab.editor.apply(everywhere(lab.loaded.info.n_layers))
    expected = logits_of(lab.loaded.model)
    torch.testing.assert_close(logits_of(merged), expected, **CLOSE)
    if name in NO_ADAPTER:
        with pytest.raises(AbliterateError, match=f"An adapter can't hold .*{NO_ADAPTER[name]}.*--kind merged"):
            export(lab, "adapter", saved, tmp_path / "adapter")
    else:
        _, adapter = export(lab, "adapter", saved, tmp_path / "adapter")
        torch.testing.assert_close(logits_of(adapter), expected, **CLOSE)


def test_the_config_alone_tells_what_the_weights_do(name: str, lab: Lab, tmp_path: Path) -> None:
    loaded = lab.loaded
    loaded.model.config.save_pretrained(tmp_path / "m")
    skeleton = loader.skeleton(str(tmp_path / "m"), LoadSettings(), CPU, measure=True)
    assert skeleton is not None
    assert {target.name for target in skeleton.targets} == ZOO[name].names
    assert next(skeleton.model.parameters()).is_meta
    coverage = coverage_of(loaded.model, loaded.architecture, loaded.targets)
    assert coverage_of(skeleton.model, skeleton.architecture, skeleton.targets) == coverage
    assert coverage.share == 1
    assert coverage.left_out == ()
    layers = loaded.layers
    names = [{path: starred(layer, path) for path in ZOO[name].layers[i].split()} for i, layer in enumerate(layers)]
    assert {group.path for group in coverage.groups} == {path for layer in names for path in layer.values()}
    for group in coverage.groups:
        holding = [(i, path) for i, layer in enumerate(names) for path, common in layer.items() if common == group.path]
        parameters = sum(weights_of(layers[i].get_submodule(path)) for i, path in holding)
        same_path = [other for other in coverage.groups if other.path == group.path]
        assert sum(other.layers for other in same_path) == len({i for i, _ in holding})
        assert sum(other.parameters for other in same_path) == parameters


def weights_of(module: nn.Module) -> int:
    """Entries of a module's matrix or of its experts' down projections."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters["down_proj" if "down_proj" in parameters else "weight"].numel()


def test_edit_before_a_norm_takes_the_direction_out_of_what_is_normalized(name: str, lab: Lab) -> None:
    """λ = 1 in mode `none`: what joins the stream, w∘y/rms(y), has nothing along v/w."""
    if NORM not in str(ZOO[name].scales.values()) or name == "minimax":  # MiniMax norms the stream itself
        return
    _, calls = find_stack(lab.loaded.model, 32)
    norms = [{writer.norm for writer in layer if writer.norm} for layer in writers_of(lab.loaded.layers, calls, 32)]
    editor = make_editor(lab.loaded, mode="none")
    kernels = {component: Kernel(1.0, 0.0, 1.0, 100.0) for component in (ATTENTION, MLP)}
    seen: list[tuple[Tensor, Tensor]] = []

    def note(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        weight = norm.forward(torch.ones(32))  # its rms is 1
        seen.append((weight, output))

    handles = [
        layer.get_submodule(path).register_forward_hook(note)
        for layer, paths in zip(lab.loaded.layers, norms, strict=True)
        for path in paths
    ]
    try:
        v = editor.directions.at(1.5)
        logits_of(lab.loaded.model)
        before = max(along(v, weight, output) for weight, output in seen)
        seen.clear()
        editor.apply(TrialParams("global", 1.5, kernels))
        logits_of(lab.loaded.model)
        assert len(seen) == sum(map(len, norms)) > 0
        assert max(along(v, weight, output) for weight, output in seen) < 1e-5 < 0.1 < before
    finally:
        editor.clear()
        for handle in handles:
            handle.remove()


def along(v: Tensor, weight: Tensor, output: Tensor) -> float:
    """The largest part along v of what was normalized, given the norm's weights and output."""
    return float((torch.nn.functional.normalize(output / weight, dim=-1) @ v).abs().max())


def test_inputs_are_captured_where_auto_counts_on_it(lab: Lab) -> None:
    loaded = lab.loaded
    if loaded.architecture.found_by == "structure" or any(is_fused(target.module) for target in loaded.targets):
        return  # where the mode is full
    text = [Text([5, 9, 3], [7, 2])]
    if loaded.architecture.family in UNCAPTURED:
        with contextlib.suppress(InputError):
            capture_inputs(loaded.model, loaded.targets, text, batch_size=1, device=CPU)
        return
    found = capture_inputs(loaded.model, loaded.targets, text, batch_size=1, device=CPU)
    assert {len(rows) for rows in found.values()} == {2}
