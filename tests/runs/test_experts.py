"""A whole run on a mixture of experts that refuses: the demo model with each MLP as several, nearly equal, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError
from abliterate.model.loader import demo_path
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline.run import run
from abliterate.settings.schema import Settings
from support.models import make_tokenizer
from support.runs import Recorder, quick_settings, run_in

EXPERTS = 4


@torch.no_grad()
def save_routed_demo(folder: Path) -> None:
    """Two of four experts for each token; beside them a shared one that is all zeros."""
    demo = AutoModelForCausalLM.from_pretrained(demo_path() / "model", dtype=torch.float32)
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps")
    kept += (
        "tie_word_embeddings",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "rope_parameters",
    )
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **{name: getattr(demo.config, name) for name in kept},
            intermediate_size=256,
            moe_intermediate_size=256,
            shared_expert_intermediate_size=16,
            num_experts=EXPERTS,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        )
    ).requires_grad_(False)
    missing, _ = model.load_state_dict(demo.state_dict(), strict=False)
    assert all(".mlp." in name for name in missing)
    for layer, old in zip(model.model.layers, demo.model.layers, strict=True):
        experts = layer.mlp.experts
        experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]))
        noise = 1 + 0.02 * torch.randn(EXPERTS, *old.mlp.down_proj.weight.shape)
        experts.down_proj.copy_(old.mlp.down_proj.weight * noise)
        layer.mlp.shared_expert.down_proj.weight.zero_()
    model.bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    demo.generation_config.save_pretrained(folder)


@pytest.fixture(scope="module")
def finished(
    prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Settings, Recorder]:
    """A finished run: (directory, result, settings, what it said)."""
    folder = tmp_path_factory.mktemp("routed")
    save_routed_demo(folder / "base")
    settings = quick_settings(prompt_files, folder / "cache", model=str(folder / "base"))
    result, recorder = run_in(folder / "run", settings)
    return folder / "run", result, settings, recorder


def test_experts_are_edited_and_the_export_is_the_trial(
    finished: tuple[Path, dict[str, Any], Settings, Recorder],
) -> None:
    _, result, _, recorder = finished
    before = result["baseline"]["refusals"]
    assert before >= 10
    assert min(trial["scores"]["refusals"] for trial in result["trials"] if trial["state"] == "complete") < before / 2
    export = result["export"]
    assert (export["verified"], export["streamed"]) == (True, True), export
    assert export["verification"]["module_error"]["off"] == []
    assert recorder.warnings == []


def test_any_trial_is_exported_later(finished: tuple[Path, dict[str, Any], Settings, Recorder], tmp_path: Path) -> None:
    path, result, settings, _ = finished
    number = next(trial["number"] for trial in result["trials"] if trial["state"] == "complete")
    directory = RunDirectory(path)
    later = pipeline_export_trial.export_trial(settings, Recorder(), directory, number, tmp_path / "out", scores=True)
    record = later.to_record()["export"]
    assert record["verified"], record
    assert record["verification"]["checks"].keys() >= {"weights", "untouched", "kl", "refusals", "modules"}
    adapter = settings.model_copy(update={"export": settings.export.model_copy(update={"kind": "adapter"})})
    with pytest.raises(AbliterateError, match=r"An adapter can't hold this trial's edits \(.* fused experts"):
        pipeline_export_trial.export_trial(adapter, Recorder(), RunDirectory(path), number, tmp_path / "adapter")


def test_that_an_adapter_holds_no_experts_is_said_before_a_run(
    finished: tuple[Path, dict[str, Any], Settings, Recorder], tmp_path: Path
) -> None:
    _, _, settings, _ = finished
    adapter = settings.model_copy(update={"export": settings.export.model_copy(update={"kind": "adapter"})})
    recorder = Recorder()
    with pytest.raises(InputError, match=r"An adapter can't hold edits of this model \(.* fused experts.*--export merged"):
        run(adapter, recorder, RunDirectory(tmp_path / "run"))
    assert recorder.stages == []
    assert not (tmp_path / "run").exists()
