"""Tiny models of many families, built offline, with random directions and parameters, and a dense definition of each edit."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from abliterate.artifacts.refined import RefinedStore
from abliterate.directions import Directions
from abliterate.edits import SvdMemo
from abliterate.model.architectures import Architecture, decoder_layers, find_targets, known_architecture, unknown_family
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, demo_path
from abliterate.model.weights import dense_weight
from abliterate.settings.schema import EditSettings
from abliterate.types import Kernel, ModelInfo, Params, Prompt, TrialParams

CPU = torch.device("cpu")
PROMPTS = tuple(
    Prompt(text, "You are a helpful assistant.")
    for text in ("Hi", "Tell me how to mangle the mailbox.", "Write a short guide on how to rinse a very large carpet at home.")
)
_TOKENIZER = AutoTokenizer.from_pretrained(demo_path() / "model")
_IDS = {
    "vocab_size": len(_TOKENIZER),
    "bos_token_id": _TOKENIZER.bos_token_id,
    "eos_token_id": _TOKENIZER.eos_token_id,
    "pad_token_id": _TOKENIZER.pad_token_id,
}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
_MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.1}
# family: (config class, its options, path of the final norm)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", _SIZES, "model.norm"),
    "llama_biased": ("LlamaConfig", _SIZES | {"attention_bias": True, "mlp_bias": True}, "model.norm"),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": 8, "head_dim": 8}, "model.norm"),
    "qwen2": ("Qwen2Config", _SIZES | {"tie_word_embeddings": True}, "model.norm"),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 8}, "model.norm"),
    "gemma2": ("Gemma2Config", _SIZES | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}, "model.norm"),
    "gemma3": (
        "Gemma3TextConfig",
        _SIZES | _MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8},
        "model.norm",
    ),
    "phi3": ("Phi3Config", _SIZES, "model.norm"),
    "phi": ("PhiConfig", _SIZES, "model.final_layernorm"),
    "olmo2": ("Olmo2Config", _SIZES, "model.norm"),
    "starcoder2": ("Starcoder2Config", _SIZES, "model.norm"),
    "gpt2": ("GPT2Config", _GPT, "transformer.ln_f"),
    "gpt_neox": ("GPTNeoXConfig", _SIZES, "gpt_neox.final_layer_norm"),
    "falcon": ("FalconConfig", {k: v for k, v in _SIZES.items() if "key_value" not in k} | {"bias": True}, "transformer.ln_f"),
}
# Families whose components the settings name: as above, and the components.
NAMED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "qwen3_5": (
        "Qwen3_5TextConfig",
        _SIZES
        | _HYBRID
        | {"head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        {"attn.o_proj": "self_attn.o_proj|linear_attn.out_proj", "mlp.down_proj": "mlp.down_proj"},
    ),
    "lfm2": (
        "Lfm2Config",
        _SIZES | {"layer_types": ["conv", "full_attention", "conv"]},
        {"attn.o_proj": "self_attn.out_proj|conv.out_proj", "mlp.down_proj": "feed_forward.w2"},
    ),
}
_ROUTED = _SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = _ROUTED | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
# Families with fused experts, in the form of FAMILIES.
EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _ROUTED | {"head_dim": 8, "num_experts": 4}, "model.norm"),
    "gpt_oss": (
        "GptOssConfig",
        _SIZES | _MIXED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "model.norm",
    ),
    "mixtral": ("MixtralConfig", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, "model.norm"),
    "qwen2_moe": ("Qwen2MoeConfig", _ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 24}, "model.norm"),
    "olmoe": ("OlmoeConfig", _SIZES | {"num_experts": 4, "num_experts_per_tok": 2}, "model.norm"),
    "deepseek_v2": ("DeepseekV2Config", _DEEPSEEK | _LATENT | {"num_key_value_heads": 4}, "model.norm"),
    "deepseek_v3": ("DeepseekV3Config", _DEEPSEEK | _LATENT | {"num_key_value_heads": 4}, "model.norm"),
    "glm4_moe": ("Glm4MoeConfig", _DEEPSEEK | {"head_dim": 8}, "model.norm"),
    "granitemoe": ("GraniteMoeConfig", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}, "model.norm"),
    "llama4": (
        "Llama4TextConfig",
        _SIZES
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}
        | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2},
        "model.norm",
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        _ROUTED | {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
        "model.embedding_norm",
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _ROUTED
        | _HYBRID
        | {"num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 8, "linear_num_key_heads": 2}
        | {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        "model.norm",
    ),
}


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The demo's tokenizer, a new object each time."""
    return AutoTokenizer.from_pretrained(demo_path() / "model", padding_side="left")


def make_model(family: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny random model of a family, float32; its biases are not zero."""
    name, sizes, _ = (FAMILIES | NAMED | EXPERTS)[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**_IDS, **(sizes | options)))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith((".bias", "_bias")):
                parameter.normal_(std=0.1)
    return model.float().eval().requires_grad_(False)


def find_architecture(model_type: str, layers: str = "", components: Mapping[str, str] | None = None) -> Architecture:
    """`known_architecture`, but InputError if there is none."""
    architecture = known_architecture(model_type, layers, components)
    if architecture is None:
        raise unknown_family(model_type)
    return architecture


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Overwrite W of a dense module, in its own dtype; the old values are lost."""
    target = dense_weight(module)  # a view
    target.copy_(weight.to(target.dtype))


def make_loaded(model: PreTrainedModel, source: str = "", components: Mapping[str, str] | None = None) -> LoadedModel:
    """The result of `load_model` without a disk; `components` are as in the settings."""
    config = model.config.get_text_config()
    architecture = find_architecture(config.model_type, "model.layers" if components else "", components)
    n_layers = len(decoder_layers(model, architecture))
    info = ModelInfo("tiny", source, "", "", architecture.family, n_layers, config.hidden_size, 0, "float32", "cpu", "none")
    return LoadedModel(model, make_tokenizer(), info, architecture, find_targets(model, architecture, config.hidden_size))


def make_chat(tokenizer: PreTrainedTokenizerBase | None = None) -> PromptEncoder:
    """A prompt encoder on the CPU; without a tokenizer the same one each time, because reading the demo's takes long."""
    return PromptEncoder(tokenizer, CPU) if tokenizer else _chat()


@cache
def _chat() -> PromptEncoder:
    return PromptEncoder(make_tokenizer(), CPU)


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model directory like a user's, with tokenizer and licence."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("the licence of the base\n", encoding="utf-8")
    return folder


def make_directions(n_layers: int, d_model: int, seed: int = 0, count: int = 1) -> Directions:
    """Random unit directions; several of a layer aren't orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    if count == 1:
        return Directions(torch.nn.functional.normalize(torch.randn(n_layers + 1, d_model, generator=generator), dim=1))
    vectors = torch.randn(n_layers + 1, count, d_model, generator=generator) + 0.5
    return Directions(torch.nn.functional.normalize(vectors, dim=2))


def make_editor(
    loaded: LoadedModel,
    *,
    incremental: bool = True,
    memo_size: int = 100,
    store: RefinedStore | None = None,
    count: int = 1,
    **settings: Any,
) -> Editor:
    """An editor with random directions on all targets, `count` a layer, and with the refined directions in `store`."""
    directions = make_directions(loaded.info.n_layers, loaded.info.d_model, count=count)
    adapters = EditHooks(loaded.targets, incremental=incremental)
    refined = (store or RefinedStore()).directions
    edit = EditSettings(**{"mode": "full", **settings})
    return Editor(loaded.targets, directions, edit, adapters, SvdMemo(memo_size), refined=refined)


def make_params(seed: int, n_layers: int = 3, scope: str = "") -> TrialParams:
    """Random parameters; some seeds leave the MLP off."""
    draw = random.Random(seed)
    kernels = {
        component: Kernel(
            0.0 if component.startswith("mlp") and seed % 3 == 2 else draw.uniform(0.5, 1.5),
            draw.uniform(0, n_layers - 1),
            draw.uniform(0, 0.5),
            draw.uniform(1, n_layers - 1),
        )
        for component in ("attn.o_proj", "mlp.down_proj")
    }
    return TrialParams(scope or draw.choice(["global", "per layer"]), draw.uniform(0, n_layers - 1), kernels)  # type: ignore[arg-type]


def dense_edit(weight: Tensor, v: Tensor, coeff: float | Sequence[float], mode: str) -> Tensor:
    """W' by definition, in float64; the definition is repeated here, independent of the package.

    Several directions, v (k, d_model), are removed one after another, each with its coeff.
    """
    weight, v = weight.double(), v.double()
    norms = weight.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, weight / norms, torch.zeros_like(weight))
    edited = weight if mode in ("none", "columns") else unit
    for one, strength in zip(v[None], [coeff], strict=True) if v.ndim == 1 else zip(v, coeff, strict=True):  # type: ignore[arg-type]
        edited = edited - strength * torch.outer(one, one @ edited)
    if mode == "none":
        return edited
    if mode == "columns":
        before, after = weight.norm(dim=0), edited.norm(dim=0)
        return edited * torch.where(after > 0, before / after, torch.zeros_like(after))
    if mode == "pre":
        return norms * edited
    length = edited.norm(dim=1, keepdim=True)
    return norms * torch.where(length > 0, edited / length, torch.zeros_like(edited))


def write_dense(model: nn.Module, editor: Editor, params: Params, mode: str) -> None:
    """Write the trial's W' into the weights of `model`, a copy of the editor's model."""
    for name, key in editor.plan(params).items():
        module, weight = model.get_submodule(name), dense_weight(model.get_submodule(name))
        vectors, coeffs = editor.vectors(params, key)
        edited = [dense_edit(one, vectors, coeffs, mode) for one in (weight if weight.ndim == 3 else weight[None])]
        write_weight(module, torch.stack(edited).view(weight.shape))


@cache
def _encoded() -> Mapping[str, Tensor]:
    return make_chat().encode(PROMPTS)


@torch.no_grad()
def logits_of(model: nn.Module, chat: PromptEncoder | None = None, prompts: Sequence[Prompt] = PROMPTS) -> Tensor:
    """Logits of the last position of each prompt, (n, vocabulary)."""
    batch = _encoded() if chat is None and prompts is PROMPTS else (chat or make_chat()).encode(prompts)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[:, -1]


def save_large(folder: Path) -> tuple[Path, int, int]:
    """A model of 64 MB in files of 16 MB: (its path, bytes of the largest file, bytes of the largest matrix in float32)."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.LlamaConfig(vocab_size=len(_TOKENIZER), num_key_value_heads=8, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    base = save_model(model, folder)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="16MB")
    files = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert sum(files) > 60e6
    return base, max(files), 4 * 512 * 2048
