"""scripts/inflate_model.py: another shape, the same function, also under edits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from abliterate.model.loader import demo_path
from abliterate.types import Prompt
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from inflate_model import Inflation, Shape, inflate

from support.models import make_chat, make_model, save_model

DEMO = Shape(12, 128, 256, 4, 2, 32)
PROMPTS = [Prompt("Hi"), Prompt("Tell me how to mangle the mailbox.")]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of every position of two prompts."""
    batch = make_chat().encode(PROMPTS)
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "shape",
    [
        Shape(12, 128, 256, 4, 2, 32),
        Shape(15, 192, 300, 4, 2, 32),
        Shape(12, 256, 256, 12, 4, 32),
        Shape(14, 512, 512, 8, 4, 64),
        Shape(24, 320, 700, 6, 2, 96),
    ],
    ids=str,
)
def test_the_demo_keeps_its_logits(shape: Shape, tmp_path: Path) -> None:
    inflate(demo_path() / "model", tmp_path / "large", shape, torch.float32)
    large = load(tmp_path / "large")
    found, expected = logits(large), logits(load(demo_path() / "model"))
    assert large.config.num_hidden_layers == shape.layers
    assert large.model.layers[0].mlp.down_proj.weight.shape == (shape.width, shape.mlp)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_llama_keeps_its_logits(tmp_path: Path) -> None:
    small = make_model("llama_biased")
    save_model(small, tmp_path / "small")
    inflate(tmp_path / "small", tmp_path / "large", Shape(5, 64, 96, 8, 4, 16), torch.float32)
    torch.testing.assert_close(logits(load(tmp_path / "large")), logits(small), rtol=1e-4, atol=1e-4)


def test_what_is_added_costs_what_it_would_cost(tmp_path: Path) -> None:
    """Random, not zero, wherever no output depends on it."""
    inflate(demo_path() / "model", tmp_path / "large", Shape(14, 256, 512, 8, 4, 64), torch.float32)
    model = load(tmp_path / "large")
    for layer in model.model.layers:
        for part in (layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (part.weight != 0).float().mean() > 0.99
    silent = [layer for layer in model.model.layers if not layer.mlp.down_proj.weight.any()]
    assert len(silent) == 2


def test_shapes_that_cannot_be(tmp_path: Path) -> None:
    for shape in (Shape(12, 128, 256, 4, 2, 48), Shape(12, 64, 256, 4, 2, 32), Shape(12, 128, 256, 4, 4, 32)):
        with pytest.raises(ValueError):
            Inflation(DEMO, shape, 0)
