"""Models that can't be edited as they should be: each is refused with a sentence, never edited wrongly or in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from abliterate.errors import InputError
from abliterate.model import loader
from abliterate.model.architectures import ATTENTION, MLP, find_targets
from abliterate.model.coverage import check_coverage, coverage_of
from abliterate.model.residuals import capture_residuals
from abliterate.settings.schema import LoadSettings
from support.models import CPU, PROMPTS, find_architecture, make_chat
from support.zoo import NOT_EDITABLE, make_specimen


def edit(model: Any, architecture: Any) -> None:
    """As far as a run goes before it measures anything."""
    targets = find_targets(model, architecture, model.config.get_text_config().hidden_size)
    check_coverage(coverage_of(model, architecture, targets), allow_partial=False)


def edit_config(folder: Path) -> None:
    """The same of a config without weights."""
    found = loader.skeleton(str(folder), LoadSettings(), CPU, measure=True)
    assert found is not None
    edit(found.model, found.architecture)


@pytest.mark.parametrize("name", NOT_EDITABLE)
def test_refused_with_weights(name: str) -> None:
    model = make_specimen(name)
    with pytest.raises(InputError, match=NOT_EDITABLE[name].refused):
        edit(model, loader.architecture_of(model, LoadSettings()))


@pytest.mark.parametrize("name", NOT_EDITABLE)
def test_refused_by_the_config_alone(name: str, tmp_path: Path) -> None:
    """Random weights aren't taken for a proof of what trained ones don't do: scales begin at 1."""
    make_specimen(name).config.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=NOT_EDITABLE[name].refused):
        edit_config(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "components", "seen"),
    [
        (
            "deepseek_v4",
            {ATTENTION: "self_attn.o_b_proj", MLP: "mlp.experts|mlp.shared_experts.down_proj"},
            r"\(2, \d+, 4, 32\)",
        ),
        ("qwen4_exp", {ATTENTION: "linear_attn.out_proj", MLP: "mlp.experts|mlp.shared_expert.down_proj"}, r"\(2, \d+, 128\)"),
    ],
)
def test_streams_in_one_are_refused_where_the_settings_name_the_modules(
    name: str, components: dict[str, str], seen: str
) -> None:
    """Residuals of such layers would be those of other positions or streams."""
    model = make_specimen(name)
    settings = LoadSettings(decoder_layers=NOT_EDITABLE[name].stack, components=components)
    architecture = loader.architecture_of(model, settings)
    edit(model, architecture)
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, torch.nn.ModuleList)
    with pytest.raises(InputError, match=f"hidden states {seen} for 2 prompts .* can't be edited"):
        capture_residuals(model, layers, make_chat(), PROMPTS, batch_size=2)


@pytest.mark.parametrize("config", ["T5Config", "Qwen2_5OmniConfig", "WhisperConfig"])
def test_what_does_not_write_on_is_refused(config: str, tmp_path: Path) -> None:
    getattr(transformers, config)().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no class for .* that continues a prompt"):
        edit_config(tmp_path)


def test_mllamas_cross_attention_layers_are_passed_over() -> None:
    """Without an image they add nothing; residuals keep their places."""
    model = make_specimen("mllama")
    architecture = find_architecture("mllama_text_model")
    layers = model.get_submodule("model.language_model.layers")
    assert isinstance(layers, torch.nn.ModuleList)
    found = capture_residuals(model, layers, make_chat(), PROMPTS, batch_size=2)
    assert found.shape == (len(PROMPTS), len(layers) + 1, 32)
    changes = (found[:, 1:] - found[:, :-1]).abs().amax(dim=(0, 2))
    assert (changes > 0).tolist() == [True, False, True, True]
    assert {target.layer for target in find_targets(model, architecture, 32)} == {0, 1, 2, 3}
