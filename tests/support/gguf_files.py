"""Write tiny transformers models as GGUF files, with llama.cpp's names and its layout of q and k; and read them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

# {model_type: llama.cpp's architecture}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3_text": "gemma3"} | {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
}
Change = Callable[[gguf.GGUFWriter], None]


def write_gguf(model: PreTrainedModel, path: Path, kind: str = "F16", change: Change = lambda writer: None) -> Path:
    """Write a model, with its matrices as `kind`; rows that don't fit the blocks of `kind` are written as F16.

    `change` may change the writer's metadata and tensors before they are written.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _describe(writer, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[writer.arch.upper()], config.num_hidden_layers)
    for key, tensor in _parameters(model):
        name = names.get_name(key, (".weight", ".bias"))
        assert name is not None, key
        array = _as_stored(key, tensor, config).float().contiguous().numpy()
        if array.ndim < 2:
            writer.add_tensor(name, array)
            continue
        fits = array.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0
        stored = gguf.GGMLQuantizationType[kind if fits else "F16"]
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    """{tensor: its entries in float32}, by the library's own reader."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in tensors}


def raw_tensors(path: Path) -> dict[str, bytes]:
    """{tensor: its bytes with its type}."""
    return {tensor.name: bytes([tensor.tensor_type]) + tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def types_of(path: Path) -> dict[str, str]:
    """{tensor: the name of its type}."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def metadata_of(path: Path) -> dict[str, Any]:
    """{key: (types, value)} in the file's order, without the counts in its header."""
    fields = gguf.GGUFReader(path).fields
    return {key: (field.types, field.contents()) for key, field in fields.items() if not key.startswith("GGUF.")}


def _describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 10000.0))
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    # What an export must keep as it is: an empty text, arrays of texts and of numbers, a truth value.
    writer.add_key_value("tiny.empty", "", gguf.GGUFValueType.STRING)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name in a checkpoint, tensor); fused gates and ups are apart, as checkpoints have them."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue
        if key.endswith("experts.gate_up_proj"):
            for name, part in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield key.replace("gate_up_proj", f"{name}.weight"), part.contiguous()
        elif key.endswith("experts.down_proj"):
            yield f"{key}.weight", tensor
        else:
            yield key, tensor


def _as_stored(key: str, tensor: Tensor, config: Any) -> Tensor:
    """llama.cpp's layout of a tensor: q and k of Llama are permuted, and 1 is added to Gemma's norms."""
    if config.model_type in ("llama", "mixtral") and key.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
        return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
    if key.endswith("shared_expert_gate.weight"):
        return tensor[0]
    if config.model_type.startswith("gemma") and key.endswith("norm.weight"):
        return tensor + 1
    return tensor
