"""llama.cpp's names of the tensors to edit, for one model of each kind of layer; the expected names are written by hand."""

from __future__ import annotations

import gguf
import pytest
import torch
import transformers

from abliterate.export.gguf_names import tensor_names
from abliterate.model.architectures import find_targets
from abliterate.model.checkpoint import auto_class
from abliterate.settings.schema import LoadSettings
from support.models import _IDS, find_architecture
from support.zoo import ZOO

# {specimen: (llama.cpp's architecture, the tensors of each layer)}
NAMES = {
    "gpt2": ("GPT2", ("attn_output ffn_down",) * 3),
    "qwen3_vl": ("QWEN3VL", ("attn_output ffn_down",) * 3),
    "mixtral": ("LLAMA", ("attn_output ffn_down_exps",) * 3),
    "deepseek_v3": ("DEEPSEEK2", ("attn_output ffn_down", *("attn_output ffn_down_exps ffn_down_shexp",) * 2)),
    "gemma4_moe": ("GEMMA4", ("attn_output ffn_down ffn_down_exps",) * 3),
    "qwen3_5": ("QWEN35", ("ssm_out ffn_down", "attn_output ffn_down", "ssm_out ffn_down")),
    "lfm2_moe": ("LFM2MOE", ("shortconv.out_proj ffn_down", "attn_output ffn_down", "shortconv.out_proj ffn_down_exps")),
    "nemotron_h": ("NEMOTRON_H_MOE", ("ssm_out", "attn_output", "ffn_down_exps ffn_down_shexp", "ffn_down")),
}


@pytest.mark.parametrize("specimen", NAMES)
def test_every_module_to_edit_has_its_tensor(specimen: str) -> None:
    architecture, layers = NAMES[specimen]
    config = getattr(transformers, ZOO[specimen].config)(**{**_IDS, **ZOO[specimen].options})
    with torch.device("meta"):
        model = auto_class(config, LoadSettings()).from_config(config)
    text = config.get_text_config()
    targets = {target.name: target for target in find_targets(model, find_architecture(text.model_type), text.hidden_size)}
    names = tensor_names(gguf.MODEL_ARCH[architecture], text.num_hidden_layers, targets)
    assert names.keys() == targets.keys() == ZOO[specimen].names
    expected = [f"blk.{index}.{name}.weight" for index, layer in enumerate(layers) for name in layer.split()]
    assert sorted(names.values()) == sorted(expected)
    assert all(name.startswith(f"blk.{targets[target].layer}.") for target, name in names.items())
