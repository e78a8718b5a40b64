"""Models spread over several places by `load.device_map`: here main memory and the disk, the two devices that a CPU has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.model import loader
from abliterate.model.weights import dense_weight, device_and_dtype
from abliterate.settings.schema import LoadSettings
from support.models import CPU, PROMPTS, logits_of, make_chat, make_editor, save_model, write_dense
from support.runs import outcomes, quick_settings, run_in
from support.zoo import everywhere, make_specimen


def spread(folder: Path, budget: str) -> loader.LoadedModel:
    """A saved model with so much of it in main memory, and the rest on the disk."""
    load = LoadSettings(device_map="auto", max_memory={"cpu": budget})
    return loader.load_model(str(folder), load, CPU, lambda tokenizer, at: make_chat().encode(PROMPTS[:1]), print)


@pytest.mark.parametrize("name", ["llama_biased", "qwen3_moe", "gpt_oss", "gpt2"])
def test_offloaded_modules_are_read_and_edited(name: str, tmp_path: Path) -> None:
    model = make_specimen(name)
    folder = save_model(model, tmp_path / "m")
    size = sum(parameter.nbytes for parameter in model.parameters())
    loaded = spread(folder, f"{size * 6 // 10 // 1000}KB")
    elsewhere = [target for target in loaded.targets if any(one.is_meta for one in target.module.parameters())]
    assert elsewhere
    for target in loaded.targets:
        assert torch.equal(dense_weight(target.module), dense_weight(model.get_submodule(target.name)))
        assert device_and_dtype(target.module)[0] == CPU
    editor = make_editor(loaded)
    base = logits_of(loaded.model)
    torch.testing.assert_close(base, logits_of(model))
    editor.apply(everywhere(loaded.info.n_layers))
    found = logits_of(loaded.model)
    write_dense(model, editor, everywhere(loaded.info.n_layers), "full")
    torch.testing.assert_close(found, logits_of(model), rtol=1e-3, atol=2e-5)
    assert (found - base).abs().max() > 1e-3
    editor.clear()
    assert torch.equal(logits_of(loaded.model), base)


def test_a_run_of_a_spread_model_is_the_run(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    short: dict[str, Any] = {
        "search": {"trials": 2},
        "response": {"max_new_tokens": 6, "detect_prefix": False},
        "export": {"kind": "none"},
    }
    place = {"load": {"device_map": "auto", "max_memory": {"cpu": "6MB"}}}
    plain, _ = run_in(tmp_path / "plain", quick_settings(prompt_files, tmp_path / "a", **short))
    found, recorder = run_in(tmp_path / "spread", quick_settings(prompt_files, tmp_path / "b", **short, **place))
    assert outcomes(found) == outcomes(plain)
    assert recorder.warnings == []
