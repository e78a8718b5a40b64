"""The matrix: tiny models of many families, each found, edited, evaluated, exported and read back as it should be."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import logits_of, save_model, write_dense
from zoo import GATE, HARMFUL, HARMLESS, NORM, ZOO, Lab, everywhere, export, last_layers, make_lab, scale_of

from abliterate.errors import AbliterateError
from abliterate.model.architectures import ATTENTION, MLP
from abliterate.model.structure import find_stack, writers_of
from abliterate.scorers.kl import kl_divergence
from abliterate.types import Kernel, TrialParams

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


@pytest.fixture(scope="module", params=ZOO)
def name(request: pytest.FixtureRequest) -> str:
    """Each specimen in turn."""
    return request.param


@pytest.fixture(scope="module")
def lab(name: str) -> Lab:
    """One lab per specimen."""
    return make_lab(name)


@pytest.fixture(autouse=True)
def _no_edit(lab: Lab) -> Iterator[None]:
    lab.editor.clear()
    yield
    lab.editor.clear()


def test_modules_are_those_written_down(name: str, lab: Lab) -> None:
    assert {target.name for target in lab.loaded.targets} == ZOO[name].names
    assert lab.loaded.architecture.found_by == ZOO[name].found_by


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
    assert lab.editor.adapters.active == {target.name for target in lab.loaded.targets}
    write_dense(dense, lab.editor, everywhere(n_layers), "full")
    found = logits_of(lab.loaded.model)
    torch.testing.assert_close(found, logits_of(dense), **CLOSE)
    assert (found - base).abs().max() > 1e-3
    off = TrialParams("per layer", 1.0, {name: Kernel(0.0, 0.0, 0.0, 1.0) for name in (ATTENTION, MLP)})
    lab.editor.apply(off)
    assert torch.equal(logits_of(lab.loaded.model), base)


def test_engine_is_used_or_says_why_not(name: str, lab: Lab) -> None:
    if name in SLOWER:
        assert lab.mechanisms == SLOWER[name]
        assert all(re.match(r"The trial engine( without .*)? fails .*a slower way is tried", said) for said in lab.warnings)
        return
    assert (lab.mechanisms == "reference") == (name in BY_REFERENCE)
    assert [warning.split(":")[0] for warning in lab.warnings[:1]] == ["The trial engine can't be used"] * (
        name in BY_REFERENCE
    )
    assert len(lab.warnings) == 2 * (name in BY_REFERENCE)


@pytest.mark.parametrize("edited", [everywhere, last_layers])
def test_engine_gives_the_references_numbers(lab: Lab, edited: object) -> None:
    lab.editor.apply(edited(lab.loaded.info.n_layers))  # type: ignore[operator]
    expected, found = (engine.first_logprobs(HARMLESS) for engine in (lab.reference, lab.engine))
    assert kl_divergence(expected, found).max() < 1e-5
    said = [[response.text for response in engine.respond(HARMFUL) or []] for engine in (lab.reference, lab.engine)]
    assert said[0] == said[1]


def test_merged_reads_back_as_the_edit(name: str, lab: Lab, tmp_path: Path) -> None:
    facts, model = export(lab, "merged", save_model(lab.loaded.model, tmp_path / "base"), tmp_path / "out")
    assert facts["streamed"] == (name not in WHOLE), facts
    base = lab.loaded.model.state_dict()
    changed = {
        path.removesuffix(".weight") if path.endswith(".weight") else path.removesuffix(".down_proj")  # fused experts
        for path, tensor in model.state_dict().items()
        if not torch.equal(tensor, base[path])
    }
    assert changed == ZOO[name].names
    lab.editor.apply(everywhere(lab.loaded.info.n_layers))
    torch.testing.assert_close(logits_of(model), logits_of(lab.loaded.model), **CLOSE)


def test_adapter_reads_back_as_the_edit_or_is_refused(name: str, lab: Lab, tmp_path: Path) -> None:
    base = save_model(lab.loaded.model, tmp_path / "base")
    if name in NO_ADAPTER:
        with pytest.raises(AbliterateError, match=f"An adapter can't hold .*{NO_ADAPTER[name]}.*--export merged"):
            export(lab, "adapter", base, tmp_path / "out")
        return
    _, model = export(lab, "adapter", base, tmp_path / "out")
    lab.editor.apply(everywhere(lab.loaded.info.n_layers))
    torch.testing.assert_close(logits_of(model), logits_of(lab.loaded.model), **CLOSE)
