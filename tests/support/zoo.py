"""Tiny models of many families, built offline: their sizes, and by hand which modules of each layer write to the stream.

`docs/generated/models.md` is made from the same specimens (`scripts/model_matrix.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.engine.self_check import Engine, EngineSetup, trusted_engine
from abliterate.engine.trial_engine import TrialEngine
from abliterate.export import EXPORTERS, ExportJob
from abliterate.model.architectures import find_targets
from abliterate.model.checkpoint import auto_class
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel, architecture_of
from abliterate.model.thinking import Markup
from abliterate.settings.schema import EfficiencySettings, ExportSettings, LoadSettings, ResponseSettings
from abliterate.types import BatchSizes, Kernel, ModelInfo, Prompt, TrialParams
from support.models import _HYBRID, _IDS, _MIXED, _SIZES, make_chat, make_editor, make_tokenizer

NORM, GATE = "norm", "gate"


@dataclass(frozen=True)
class Specimen:
    """A tiny model. `layers` lists by hand, per layer, the modules that write to the stream; `stack` is the layers' path.

    `scales` is {module: the factor of its output on the way to the stream, NORM, or GATE (a factor per position)}; other
    modules have 1, and layers that differ have a tuple. `found_by` is table or structure. `unproven` is the reason why the
    layers' structure can't be measured. `refused` is the error sentence for a model that can't be edited.
    """

    config: str
    options: Mapping[str, Any]
    layers: tuple[str, ...]
    stack: str = "model.layers"
    scales: Mapping[str, Any] = field(default_factory=dict)
    found_by: str = "table"
    unproven: str = ""
    refused: str = ""

    @property
    def names(self) -> set[str]:
        """Full names of all modules to edit."""
        return {f"{self.stack}.{index}.{path}" for index, paths in enumerate(self.layers) for path in paths.split()}


PLAIN = "self_attn.o_proj mlp.down_proj"
HEAD = {"head_dim": 8}
_MHA = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
_NORMS: Mapping[str, float | str] = {"self_attn.o_proj": NORM, "mlp.down_proj": NORM}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 16}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED |= {"n_group": 1, "topk_group": 1}
_MLA = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
_MLA |= {"num_key_value_heads": 4}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, "initializer_range": 0.1}
_SHARED = "self_attn.o_proj mlp.experts mlp.shared_expert.down_proj"
_SHAREDS = "self_attn.o_proj mlp.experts mlp.shared_experts.down_proj"
_FIRST_DENSE = (PLAIN, _SHAREDS, _SHAREDS)
_ALL_NORMS: Mapping[str, float | str] = {**_NORMS, "mlp.experts": NORM, "mlp.shared_experts.down_proj": NORM}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
_VISION |= {"patch_size": 8}
_QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_QWEN3_VISION = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 8}
_QWEN3_VISION |= {"intermediate_size": 16, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_MROPE_WHOLE = {"rope_parameters": _MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}}
_ERNIE_MROPE = {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}}
_GLM_VISION = {name: size for name, size in _QWEN3_VISION.items() if "_indexes" not in name and "_embeddings" not in name}
_GLM_VISION |= {"image_size": 16}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model"}
_PIXTRAL = _VISION | {"model_type": "pixtral", "head_dim": 8}
_OMNI_AUDIO = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "num_mel_bins": 8}
_OMNI_AUDIO |= {"output_dim": 32, "max_source_positions": 16, "n_window": 4}
_OMNI_IDS = {"vision_start_token_id": 5, "image_token_id": 6, "video_token_id": 7, "audio_token_id": 8}
_QMLA = _MLA | {"q_lora_rank": 16}
_SPARSE_TOP = {"first_k_dense_replace": 1}
# At least as many as a prompt has tokens, because otherwise answers depend on padding.
_INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
_MAMBA2 = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16}
_NEMOTRON = _SIZES | HEAD | _ROUTED | _MAMBA2
_NEMOTRON |= {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "moe", "mlp"]}
_NEMOTRON |= {"moe_shared_expert_intermediate_size": 16}
_NEMOTRON_LAYERS = ("mixer.out_proj", "mixer.o_proj", "mixer.experts mixer.shared_experts.down_proj", "mixer.down_proj")
_VQ = {"embed_dim": 32, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1]}
_VQ |= {"num_res_blocks": 1}


def _plain(config: str, *, stack: str = "model.layers", paths: str = PLAIN, scales: Any = None, **options: Any) -> Specimen:
    return Specimen(config, _SIZES | options, (paths,) * 3, stack, scales or {})


def _moe(config: str, paths: str = "self_attn.o_proj mlp.experts", scales: Any = None, **options: Any) -> Specimen:
    return Specimen(config, _SIZES | options, (paths,) * 3, scales=scales or {})


def _vision(config: str, text: str, vision: Mapping[str, Any], scales: Any = None, **options: Any) -> Specimen:
    """`text`: the model type of the text tower, {} options of its own; of the vision part nothing is ever edited."""
    own = {name: options.pop(name) for name in list(options) if name in ("image_token_index", "image_token_id")}
    tower = {**({"model_type": text} if text else {}), **_IDS, **_SIZES, **options}
    parts = {"text_config": tower, "vision_config": dict(vision), **own}
    return Specimen(config, parts, (PLAIN,) * 3, "model.language_model.layers", scales or {})


def _tower(
    config: str,
    text: Mapping[str, Any],
    vision: Mapping[str, Any],
    *layers: str,
    scales: Any = None,
    stack: str = "model.language_model.layers",
    unproven: str = "",
    **own: Any,
) -> Specimen:
    """A vision-language model; `layers` as in Specimen, or one for all three; `own`: options of the model's own."""
    parts = {"text_config": {**_IDS, **_SIZES, **text}, "vision_config": dict(vision), **own}
    paths = layers if len(layers) > 1 else (layers or (PLAIN,)) * 3
    return Specimen(config, parts, paths, stack, scales or {}, unproven=unproven)


ZOO: dict[str, Specimen] = {
    "llama": _plain("LlamaConfig"),
    "llama_biased": _plain("LlamaConfig", attention_bias=True, mlp_bias=True),
    "arcee": _plain("ArceeConfig"),
    "apertus": _plain("ApertusConfig"),
    "helium": _plain("HeliumConfig", **HEAD),
    "seed_oss": _plain("SeedOssConfig", **HEAD),
    "smollm3": _plain("SmolLM3Config"),
    "diffllama": _plain("DiffLlamaConfig"),
    "minicpm3": _plain("MiniCPM3Config", scales=dict.fromkeys(PLAIN.split(), 1.4 / 3**0.5), **_MLA),
    "mistral": _plain("MistralConfig", sliding_window=8, **HEAD),
    "ministral": _plain("MinistralConfig", **_MIXED, **HEAD),
    "ministral3": _plain("Ministral3Config", **HEAD),
    "qwen2": _plain("Qwen2Config", tie_word_embeddings=True),
    "qwen3": _plain("Qwen3Config", **HEAD),
    "qwen3_5": Specimen(
        "Qwen3_5TextConfig",
        _SIZES | _HYBRID | HEAD | _DELTA,
        ("linear_attn.out_proj mlp.down_proj", PLAIN, "linear_attn.out_proj mlp.down_proj"),
    ),
    "qwen3_next_dense": Specimen(
        "Qwen3NextConfig",
        _SIZES | _HYBRID | HEAD | _DELTA | _EXPERTS | {"mlp_only_layers": [0, 1, 2]},
        ("linear_attn.out_proj mlp.down_proj", PLAIN, "linear_attn.out_proj mlp.down_proj"),
    ),
    "gemma": _plain("GemmaConfig", **HEAD),
    "gemma2": _plain("Gemma2Config", scales=_NORMS, sliding_window=8, query_pre_attn_scalar=8, **HEAD),
    "gemma3": _plain("Gemma3TextConfig", scales=_NORMS, query_pre_attn_scalar=8, **_MIXED, **HEAD),
    "gemma3n": Specimen(
        "Gemma3nTextConfig",
        _SIZES
        | HEAD
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4, "altup_num_inputs": 2}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": _IDS["vocab_size"], "sliding_window": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        (f"{PLAIN} laurel.linear_right per_layer_projection",) * 4,
        unproven="its layers pass on several streams",
    ),
    "gemma4": Specimen(
        "Gemma4TextConfig",
        _SIZES
        | HEAD
        | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8, "global_head_dim": 16}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": _IDS["vocab_size"]}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        (f"{PLAIN} per_layer_projection",) * 4,
        scales=_NORMS | {"per_layer_projection": NORM},
    ),
    "vaultgemma": _plain("VaultGemmaConfig", query_pre_attn_scalar=8, sliding_window=8, **HEAD),
    "phi": _plain("PhiConfig", paths="self_attn.dense mlp.fc2"),
    "phi3": _plain("Phi3Config"),
    "persimmon": Specimen("PersimmonConfig", _MHA, ("self_attn.dense mlp.dense_4h_to_h",) * 3),
    "gpt2": Specimen("GPT2Config", _GPT, ("attn.c_proj mlp.c_proj",) * 3, "transformer.h"),
    "gpt_bigcode": Specimen("GPTBigCodeConfig", _GPT, ("attn.c_proj mlp.c_proj",) * 3, "transformer.h"),
    "gpt_neo": Specimen(
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 8}
        | {"max_position_embeddings": 512, "initializer_range": 0.1},
        ("attn.attention.out_proj mlp.c_proj",) * 4,
        "transformer.h",
    ),
    "gptj": Specimen("GPTJConfig", _GPT | {"rotary_dim": 4}, ("attn.out_proj mlp.fc_out",) * 3, "transformer.h"),
    "gpt_neox": Specimen("GPTNeoXConfig", _MHA, ("attention.dense mlp.dense_4h_to_h",) * 3, "gpt_neox.layers"),
    "falcon": Specimen("FalconConfig", _MHA | {"bias": True}, ("self_attention.dense mlp.dense_4h_to_h",) * 3, "transformer.h"),
    "bloom": Specimen(
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.1},
        ("self_attention.dense mlp.dense_4h_to_h",) * 3,
        "transformer.h",
    ),
    "mpt": Specimen(
        "MptConfig",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512, "initializer_range": 0.1},
        ("attn.out_proj ffn.down_proj",) * 3,
        "transformer.blocks",
    ),
    "opt": Specimen(
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        | {"max_position_embeddings": 512, "init_std": 0.1},
        ("self_attn.out_proj fc2",) * 3,
        "model.decoder.layers",
    ),
    "nanochat": _plain("NanoChatConfig", paths="self_attn.o_proj mlp.fc2"),
    "falcon_h1": Specimen(
        "FalconH1Config",
        _SIZES | HEAD | _MAMBA | {"mamba_d_ssm": 64, "attention_out_multiplier": 0.5, "ssm_out_multiplier": 0.25},
        ("mamba.out_proj self_attn.o_proj feed_forward.down_proj",) * 3,
        scales={"self_attn.o_proj": 0.5, "mamba.out_proj": 0.25},
    ),
    "olmo": _plain("OlmoConfig"),
    "olmo2": _plain("Olmo2Config", scales=_NORMS),
    "olmo3": _plain("Olmo3Config", scales=_NORMS, **_MIXED),
    "glm": _plain("GlmConfig", **HEAD),
    "glm4": _plain("Glm4Config", scales=_NORMS, **HEAD),
    "granite": _plain("GraniteConfig", residual_multiplier=0.25, scales={"self_attn.o_proj": 0.25, "mlp.down_proj": 0.25}),
    "cohere": _plain("CohereConfig"),
    "cohere2": _plain("Cohere2Config", **_MIXED),
    "exaone4": _plain("Exaone4Config", scales=_NORMS, **_MIXED),
    "hunyuan": _plain("HunYuanDenseV1Config", **HEAD),
    "ernie4_5": _plain("Ernie4_5Config", **HEAD),
    "nemotron": _plain("NemotronConfig"),
    "stablelm": _plain("StableLmConfig"),
    "starcoder2": _plain("Starcoder2Config", paths="self_attn.o_proj mlp.c_proj"),
    "lfm2": Specimen(
        "Lfm2Config",
        _SIZES | {"layer_types": ["conv", "full_attention", "conv"]},
        ("conv.out_proj feed_forward.w2", "self_attn.out_proj feed_forward.w2", "conv.out_proj feed_forward.w2"),
    ),
    "bamba": Specimen(
        "BambaConfig",
        _SIZES | _MAMBA | {"attn_layer_indices": [1]},
        (
            "mamba.out_proj feed_forward.down_proj",
            "self_attn.o_proj feed_forward.down_proj",
            "mamba.out_proj feed_forward.down_proj",
        ),
    ),
    "jamba_dense": Specimen(
        "JambaConfig",
        _SIZES
        | {"num_experts": 1, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8}
        | {"use_mamba_kernels": False},
        (
            "mamba.out_proj feed_forward.down_proj",
            "self_attn.o_proj feed_forward.down_proj",
            "mamba.out_proj feed_forward.down_proj",
        ),
    ),
    "recurrent_gemma": Specimen(
        "RecurrentGemmaConfig",
        _SIZES | HEAD | {"lru_width": 32, "attention_window_size": 8},
        (
            "temporal_block.linear_out mlp_block.down_proj",
            "temporal_block.linear_out mlp_block.down_proj",
            "temporal_block.o_proj mlp_block.down_proj",
        ),
    ),
    "olmo_hybrid": Specimen(
        "OlmoHybridConfig",
        _SIZES
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | _DELTA
        | {"linear_num_key_heads": 4},
        ("linear_attn.o_proj mlp.down_proj", PLAIN, "linear_attn.o_proj mlp.down_proj"),
        scales={"self_attn.o_proj": NORM, "mlp.down_proj": (1.0, NORM, 1.0)},
    ),
    "deepseek_v2_dense": _plain("DeepseekV2Config", first_k_dense_replace=3, **_MLA, **_ROUTED),
    "deepseek_v3_dense": _plain("DeepseekV3Config", first_k_dense_replace=3, **_MLA, **_ROUTED),
    "glm4_moe_dense": _plain("Glm4MoeConfig", first_k_dense_replace=3, **HEAD, **_ROUTED),
    # Mixtures of experts
    "mixtral": _moe("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _moe("PhimoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": _moe("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, **_MIXED, **HEAD),
    "olmoe": _moe("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _moe("Qwen3MoeConfig", **_EXPERTS, **HEAD),
    "qwen2_moe": _moe(
        "Qwen2MoeConfig", _SHARED, scales={"mlp.shared_expert.down_proj": GATE}, shared_expert_intermediate_size=16, **_EXPERTS
    ),
    "deepseek_v3": Specimen(
        "DeepseekV3Config",
        _SIZES | _MLA | _ROUTED | {"first_k_dense_replace": 1},
        (PLAIN, _SHAREDS, _SHAREDS),
    ),
    "ernie4_5_moe": Specimen(
        "Ernie4_5_MoeConfig",
        _SIZES | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16},
        (PLAIN, _SHAREDS, _SHAREDS),
    ),
    "granitemoe": _moe(
        "GraniteMoeConfig", "self_attn.o_proj block_sparse_moe.experts", num_local_experts=4, num_experts_per_tok=2
    ),
    "granitemoehybrid": Specimen(
        "GraniteMoeHybridConfig",
        _SIZES
        | _MAMBA
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 16, "num_local_experts": 4},
        (
            "mamba.out_proj block_sparse_moe.experts shared_mlp.output_linear",
            "self_attn.o_proj block_sparse_moe.experts shared_mlp.output_linear",
            "mamba.out_proj block_sparse_moe.experts shared_mlp.output_linear",
        ),
    ),
    "granitemoehybrid_dense": Specimen(
        "GraniteMoeHybridConfig",
        _SIZES
        | _MAMBA
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 16, "num_local_experts": 0}
        | {"residual_multiplier": 0.5},
        (
            "mamba.out_proj shared_mlp.output_linear",
            "self_attn.o_proj shared_mlp.output_linear",
            "mamba.out_proj shared_mlp.output_linear",
        ),
        scales=dict.fromkeys(("mamba.out_proj", "self_attn.o_proj", "shared_mlp.output_linear"), 0.5),
    ),
    "minimax": Specimen(
        "MiniMaxConfig",
        _SIZES
        | HEAD
        | _HYBRID
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "full_attn_beta_factor": 0.5, "block_size": 16},
        ("self_attn.out_proj mlp.experts", "self_attn.o_proj mlp.experts", "self_attn.out_proj mlp.experts"),
        scales={"self_attn.o_proj": NORM, "self_attn.out_proj": NORM},
    ),
    "llama4": Specimen(
        "Llama4TextConfig",
        _SIZES
        | HEAD
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
        (
            "self_attn.o_proj feed_forward.down_proj",
            "self_attn.o_proj feed_forward.experts feed_forward.shared_expert.down_proj",
            "self_attn.o_proj feed_forward.down_proj",
        ),
        scales={"feed_forward.experts": 4.0},  # each position passes through all four, and each changes it
    ),
    "lfm2_moe": Specimen(
        "Lfm2MoeConfig",
        _SIZES | _EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 2},
        ("conv.out_proj feed_forward.w2", "self_attn.out_proj feed_forward.w2", "conv.out_proj feed_forward.experts"),
    ),
    "deepseek_v2": Specimen(
        "DeepseekV2Config", _SIZES | _MLA | _ROUTED | {"first_k_dense_replace": 1}, (PLAIN, _SHAREDS, _SHAREDS)
    ),
    "glm4_moe": Specimen("Glm4MoeConfig", _SIZES | HEAD | _ROUTED | {"first_k_dense_replace": 1}, (PLAIN, _SHAREDS, _SHAREDS)),
    "qwen3_next": Specimen(
        "Qwen3NextConfig",
        _SIZES | _HYBRID | HEAD | _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
        (
            _SHARED.replace("self_attn.o_proj", "linear_attn.out_proj"),
            _SHARED,
            _SHARED.replace("self_attn.o_proj", "linear_attn.out_proj"),
        ),
        scales={"mlp.shared_expert.down_proj": GATE},
    ),
    "qwen3_5_moe": Specimen(
        "Qwen3_5MoeTextConfig",
        _SIZES | _HYBRID | HEAD | _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16},
        (
            _SHARED.replace("self_attn.o_proj", "linear_attn.out_proj"),
            _SHARED,
            _SHARED.replace("self_attn.o_proj", "linear_attn.out_proj"),
        ),
        scales={"mlp.shared_expert.down_proj": GATE},
    ),
    "gemma4_moe": Specimen(
        "Gemma4TextConfig",
        _SIZES
        | HEAD
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
        | {"sliding_window": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        (f"{PLAIN} experts",) * 3,
        scales=_NORMS | {"experts": NORM},
    ),
    "jamba": Specimen(
        "JambaConfig",
        _SIZES
        | {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
        (
            "mamba.out_proj feed_forward.down_proj",
            "self_attn.o_proj feed_forward.experts",
            "mamba.out_proj feed_forward.down_proj",
        ),
    ),
    "hunyuan_moe": _moe(
        "HunYuanMoEV1Config", "self_attn.o_proj mlp.experts mlp.shared_mlp.down_proj", num_experts=4, moe_topk=2, **HEAD
    ),
    "minimax_m2": _moe("MiniMaxM2Config", num_local_experts=4, num_experts_per_tok=2, **HEAD),
    "dots1": Specimen("Dots1Config", _SIZES | HEAD | _ROUTED | {"first_k_dense_replace": 1}, (PLAIN, _SHAREDS, _SHAREDS)),
    # Text towers of vision-language models
    "qwen2_vl": _vision("Qwen2VLConfig", "", _QWEN_VISION, **_MROPE),
    "qwen2_5_vl": _vision("Qwen2_5_VLConfig", "", {**_QWEN3_VISION, "fullatt_block_indexes": [0]}, **_MROPE),
    "qwen3_vl": _vision("Qwen3VLConfig", "", _QWEN3_VISION, **_MROPE, **HEAD),
    "gemma3_vl": _vision("Gemma3Config", "", _VISION, scales=_NORMS, query_pre_attn_scalar=8, **_MIXED, **HEAD),
    "mistral3": _vision(
        "Mistral3Config", "mistral", _VISION | {"model_type": "pixtral", "head_dim": 8}, image_token_index=5, **HEAD
    ),
    "llava": _vision("LlavaConfig", "llama", _VISION | {"model_type": "clip_vision_model"}, image_token_index=5),
    "llava_next": _vision(
        "LlavaNextConfig", "mistral", _VISION | {"model_type": "clip_vision_model"}, image_token_index=5, **HEAD
    ),
    "internvl": _vision("InternVLConfig", "qwen2", _VISION | {"image_size": [16, 16], "patch_size": [8, 8]}),
    "glm4v": _vision(
        "Glm4vConfig",
        "",
        {name: size for name, size in _QWEN3_VISION.items() if "_indexes" not in name and "_embeddings" not in name}
        | {"image_size": 16},
        scales=_NORMS,
        **_MROPE,
    ),
    "idefics3": Specimen(
        "Idefics3Config",
        {"text_config": {"model_type": "llama", **_IDS, **_SIZES}, "vision_config": _VISION},
        (PLAIN,) * 3,
        "model.text_model.layers",
    ),
    # A wider sweep of what transformers has: dense and hybrid
    "internlm3": _plain("InternLM3Config", **HEAD),
    "iquestcoder": _plain("IQuestCoderConfig", **HEAD),
    "lfm3": Specimen(
        "Lfm3Config",
        _SIZES | HEAD | {"layer_types": ["conv", "full_attention", "conv"]},
        ("conv.out_proj feed_forward.w2", "self_attn.o_proj feed_forward.w2", "conv.out_proj feed_forward.w2"),
        scales=dict.fromkeys(("conv.out_proj", "self_attn.o_proj", "feed_forward.w2"), NORM),
    ),
    "mamba2": Specimen(
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}
        | {"chunk_size": 16, "initializer_range": 0.1},
        ("mixer.out_proj",) * 3,
        "backbone.layers",
    ),
    "falcon_mamba": Specimen(
        "FalconMambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.1},
        ("mixer.out_proj",) * 3,
        "backbone.layers",
    ),
    "zamba": Specimen(
        "ZambaConfig",
        _SIZES
        | {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2, "mamba_d_state": 8}
        | {"attention_hidden_size": 64, "attention_head_dim": 16},
        ("mamba.out_proj", "mamba.out_proj", "mamba_decoder.mamba.out_proj") * 2,
    ),
    "zamba2": Specimen(
        "Zamba2Config",
        _SIZES
        | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "mamba_d_state": 8}
        | {"mamba_ngroups": 1, "n_mamba_heads": 8, "chunk_size": 16},
        ("mamba.out_proj", "mamba_decoder.mamba.out_proj") * 2,
    ),
    "nemotron_h": Specimen(
        "NemotronHConfig",
        _NEMOTRON,
        _NEMOTRON_LAYERS,
    ),
    "nemotron_h_latent": Specimen(
        "NemotronHConfig",
        _NEMOTRON | {"moe_latent_size": 8},
        tuple(paths.replace("mixer.experts", "mixer.fc2_latent_proj") for paths in _NEMOTRON_LAYERS),
    ),
    # … mixtures of experts
    "flex_olmo": _moe(
        "FlexOlmoConfig", scales={"self_attn.o_proj": NORM, "mlp.experts": NORM}, num_experts=4, num_experts_per_tok=2
    ),
    "mellum": _moe("MellumConfig", **_EXPERTS, **HEAD),
    "flint": Specimen(
        "FlintConfig", _SIZES | HEAD | _EXPERTS | {"shared_expert_intermediate_size": 16}, (PLAIN, PLAIN, _SHARED)
    ),
    "glm4_moe_lite": Specimen("Glm4MoeLiteConfig", _SIZES | _QMLA | _ROUTED | _SPARSE_TOP, _FIRST_DENSE),
    "glm_moe_dsa": Specimen("GlmMoeDsaConfig", _SIZES | _QMLA | _ROUTED | _SPARSE_TOP | _INDEXER, _FIRST_DENSE),
    "deepseek_v32": Specimen("DeepseekV32Config", _SIZES | _QMLA | _ROUTED | _SPARSE_TOP | _INDEXER, _FIRST_DENSE),
    "axk1": Specimen(
        "AXK1Config",
        _SIZES | _QMLA | _ROUTED | _SPARSE_TOP,
        _FIRST_DENSE,
        scales={"mlp.experts": NORM, "mlp.shared_experts.down_proj": NORM},
    ),
    "axk2": Specimen("AXK2Config", _SIZES | _QMLA | _ROUTED | _SPARSE_TOP, _FIRST_DENSE),
    "mistral4": Specimen("Mistral4Config", _SIZES | _QMLA | {"head_dim": 16} | _ROUTED | _SPARSE_TOP, _FIRST_DENSE),
    "hy_v3": Specimen(
        "HYV3Config",
        _SIZES | HEAD | _SPARSE_TOP | {**_EXPERTS, "num_shared_experts": 1},
        _FIRST_DENSE,
    ),
    "afmoe": Specimen(
        "AfmoeConfig",
        _SIZES | HEAD | _MIXED | {**_EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1, "n_group": 1, "topk_group": 1},
        _FIRST_DENSE,
        scales=_ALL_NORMS,
    ),
    "solar_open": _moe("SolarOpenConfig", _SHAREDS, **HEAD, **_ROUTED),
    "kolibri1": _moe(
        "Kolibri1Config", _SHAREDS, scales=_ALL_NORMS, **HEAD, **{**_EXPERTS, "shared_expert_intermediate_size": 16}
    ),
    "laguna": Specimen("LagunaConfig", _SIZES | HEAD | _EXPERTS | {"shared_expert_intermediate_size": 16}, _FIRST_DENSE),
    "cohere2_moe": Specimen(
        "Cohere2MoeConfig",
        _SIZES | HEAD | _MIXED | _SPARSE_TOP | {"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1},
        _FIRST_DENSE,
        scales={"mlp.experts": 0.5, "mlp.shared_experts.down_proj": 0.5},  # the mean of the two
    ),
    "mimo_v2_flash": Specimen(
        "MiMoV2FlashConfig",
        _SIZES | HEAD | _MIXED | _ROUTED | {"v_head_dim": 8},
        (PLAIN, "self_attn.o_proj mlp.experts", "self_attn.o_proj mlp.experts"),
    ),
    "kimi_linear": Specimen(
        "KimiLinearConfig",
        _SIZES
        | _MLA
        | _HYBRID
        | {name: size for name, size in _ROUTED.items() if name != "n_routed_experts"}
        | {"num_local_experts": 4, "linear_head_dim": 8, "linear_num_heads": 4},
        _FIRST_DENSE,
    ),
    "bailing_hybrid": Specimen(
        "BailingHybridConfig",
        _SIZES | _MLA | _HYBRID | _SPARSE_TOP | {**_EXPERTS, "num_shared_experts": 1, "n_group": 1, "topk_group": 1},
        _FIRST_DENSE,
    ),
    "longcat_flash": Specimen(
        "LongcatFlashConfig",
        {name: size for name, size in _SIZES.items() if name != "num_hidden_layers"}
        | _QMLA
        | {"num_layers": 3, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "moe_topk": 2}
        | {"zero_expert_num": 2},
        ("self_attn.0.o_proj self_attn.1.o_proj mlps.0.down_proj mlps.1.down_proj mlp.experts",) * 3,
        unproven="its config counts sublayers",
    ),
    "granitemoe_swa": _moe(
        "GraniteMoeSWAConfig",
        "self_attn.o_proj block_sparse_moe.experts shared_mlp.output_linear",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
    ),
    # … and vision-language models
    "aya_vision": _tower("AyaVisionConfig", {"model_type": "cohere2", **_MIXED}, _SIGLIP, image_token_index=5),
    "cohere2_vision": _tower(
        "Cohere2VisionConfig", {"model_type": "cohere2", **_MIXED}, _SIGLIP, alignment_intermediate_size=64, image_token_id=5
    ),
    "idefics2": _tower(
        "Idefics2Config",
        {"model_type": "mistral"},
        _VISION,
        stack="model.text_model.layers",
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
        | {"resampler_head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 16},
        image_token_id=5,
    ),
    "smolvlm": _tower("SmolVLMConfig", {"model_type": "llama"}, _VISION, stack="model.text_model.layers", image_token_id=5),
    "llava_onevision": _tower(
        "LlavaOnevisionConfig", {"model_type": "qwen2"}, _SIGLIP, image_token_index=5, video_token_index=6
    ),
    "ovis2": _tower(
        "Ovis2Config",
        {"model_type": "qwen2"},
        _VISION | {"vocab_size": 16},
        hidden_size=32,
        image_token_id=5,
        visual_indicator_token_ids=[6, 7],
    ),
    "deepseek_vl": _tower("DeepseekVLConfig", {"model_type": "llama"}, _SIGLIP, image_token_id=5),
    "janus": _tower(
        "JanusConfig",
        {"model_type": "llama"},
        _VISION | {"projection_dim": 32, "depth": 1},
        vq_config=_VQ | {"projection_dim": 32, "num_hidden_layers": 1, "num_patches": 4, "image_token_embed_dim": 32},
        image_token_id=5,
    ),
    "chameleon": _plain(
        "ChameleonConfig", vq_config=_VQ | {"resolution": 16, "attn_resolutions": None}, vocabulary_map={"<image>": 5}
    ),
    "glm46v": _tower("Glm46VConfig", _MROPE, _GLM_VISION, scales=_NORMS),
    "glm4v_moe": _tower("Glm4vMoeConfig", {**HEAD, **_ROUTED, **_SPARSE_TOP, **_MROPE_WHOLE}, _GLM_VISION, *_FIRST_DENSE),
    "exaone4_5": _tower(
        "Exaone4_5_Config",
        {"model_type": "exaone4", **_MIXED},
        {**_QWEN3_VISION, "fullatt_block_indexes": [0], "num_key_value_heads": 2},
        scales=_NORMS,
    ),
    "kimi_k25": _tower(
        "Kimi_K25Config", {"model_type": "deepseek_v3", **_QMLA, **_ROUTED, **_SPARSE_TOP}, _VISION, *_FIRST_DENSE
    ),
    "qwen3_vl_moe": _tower("Qwen3VLMoeConfig", {**HEAD, **_EXPERTS, **_MROPE}, _QWEN3_VISION, "self_attn.o_proj mlp.experts"),
    "qwen2_5_omni": _tower(
        "Qwen2_5OmniThinkerConfig",
        _MROPE,
        _QWEN3_VISION | {"fullatt_block_indexes": [0]},
        audio_config=_OMNI_AUDIO,
        **_OMNI_IDS,
    ),
    "qwen3_omni_moe": _tower(
        "Qwen3OmniMoeThinkerConfig",
        {**HEAD, **_EXPERTS, **_MROPE},
        _QWEN3_VISION,
        "self_attn.o_proj mlp.experts",
        audio_config=_OMNI_AUDIO | {"downsample_hidden_size": 8, "conv_chunksize": 4},
        **_OMNI_IDS,
    ),
    "ernie4_5_vl_moe": _tower(
        "Ernie4_5_VLMoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": [16, 16], **_ERNIE_MROPE},
        {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 8, "intermediate_size": 16},
        *(text.replace("mlp.experts", "mlp.text_moe.experts") for text in _FIRST_DENSE),
    ),
    "aria": _tower(
        "AriaConfig",
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 16},
        _VISION | {"model_type": "idefics3_vision"},
        _SHAREDS,
        image_token_index=5,
        projector_patch_to_query_dict={4: 4},
    ),
    "molmo2": Specimen(
        "Molmo2Config",
        {
            "text_config": {**_IDS, **_SIZES, **HEAD, "additional_vocab_size": 4},
            "vit_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
            | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 8, "num_position_embeddings": 4},
            "adapter_config": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
            | {"intermediate_size": 16, "text_hidden_size": 32, "vit_layers": [0]},
        },
        (PLAIN,) * 3,
        "model.language_model.layers",
    ),
    "minicpmv4_6": _tower(
        "MiniCPMV4_6Config",
        {"model_type": "qwen3_5_text", **HEAD, **_HYBRID, **_DELTA},
        _VISION,
        "linear_attn.out_proj mlp.down_proj",
        PLAIN,
        "linear_attn.out_proj mlp.down_proj",
    ),
    "mistral4_vl": _tower(
        "Mistral3Config",
        {"model_type": "mistral4", **_QMLA, "head_dim": 16, **_ROUTED, **_SPARSE_TOP},
        _PIXTRAL,
        *_FIRST_DENSE,
        image_token_index=5,
    ),
    "mistral_large4": _tower("MistralLarge4Config", {**_QMLA, **_ROUTED, **_SPARSE_TOP}, _PIXTRAL, *_FIRST_DENSE),
    "minimax_m3_vl": _tower(
        "MiniMaxM3VLConfig",
        {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "dense_intermediate_size": 48, "intermediate_size": 16}
        | {"shared_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        _VISION,
        *_FIRST_DENSE,
        scales={"mlp.experts": 2.0},
        projector_hidden_size=16,
    ),
    "gemma4_unified": _tower(
        "Gemma4UnifiedConfig",
        {**HEAD, "sliding_window": 8, "global_head_dim": 8}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        {"patch_size": 8, "pooling_kernel_size": 1, "mm_embed_dim": 32, "mm_posemb_size": 16},
        scales=_NORMS,
    ),
    "hunyuan_vl": _tower(
        "HunYuanVLConfig",
        HEAD | {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 1, 1]}},
        {name: size for name, size in _VISION.items() if name != "image_size"}
        | {"out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 16, "min_image_size": 8}
        | {"img_max_token_num": 4, "max_vit_seq_len": 16},
    ),
    "nemotron_h_omni": _tower(
        "NemotronH_Omni_Reasoning_V3_Config",
        {"model_type": "nemotron_h", **_NEMOTRON},
        _VISION | {"model_type": "radio", "max_img_size": 32, "video_temporal_patch_size": 2},
        *_NEMOTRON_LAYERS,
        stack="language_model.model.layers",
        projector_hidden_size=16,
        vision_hidden_size=16,
    ),
    "step3p7": _tower(
        "Step3p7Config",
        {**HEAD, **_MIXED, "mlp_layer_types": ["dense", "sparse", "sparse"], "swiglu_limits": [0, 0, 0.1]}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "share_expert_dim": 16},
        _VISION,
        *_FIRST_DENSE,
    ),
    "phi4_multimodal": _plain(
        "Phi4MultimodalConfig",
        vision_config=_VISION | {"num_hidden_layers": 2, "image_size": 32, "crop_size": 32},
        audio_config={"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2}
        | {"ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "bias_max_distance": 8, "feature_layer": -1}
        | {"nemo_conv_channels": 16},
    ),
    "granite4_vision": _tower(
        "Granite4VisionConfig",
        {"residual_multiplier": 0.5},
        _SIGLIP | {"hidden_size": 64},
        scales=dict.fromkeys(PLAIN.split(), 0.5),
        image_token_index=5,
        deepstack_layer_map=[],
        qformer_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
        | {"model_type": "blip_2_qformer", "encoder_hidden_size": 64},
        downsample_rate="1/2",
    ),
    "qwen2_audio": Specimen(
        "Qwen2AudioConfig",
        {
            "text_config": {"model_type": "qwen2", **_IDS, **_SIZES},
            "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
            | {"num_mel_bins": 8, "max_source_positions": 16},
            "audio_token_index": 5,
        },
        (PLAIN,) * 3,
        "model.language_model.layers",
    ),
    "voxtral": Specimen(
        "VoxtralConfig",
        {
            "text_config": {"model_type": "llama", **_IDS, **_SIZES},
            "audio_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            | {"num_mel_bins": 8, "max_source_positions": 16},
            "audio_token_id": 5,
        },
        (PLAIN,) * 3,
        "model.language_model.layers",
    ),
    "mllama": _tower(
        "MllamaConfig",
        {"num_hidden_layers": 4, "cross_attention_layers": [1]},
        {"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "intermediate_size": 16}
        | {"vision_output_dim": 32, "image_size": 16, "patch_size": 8, "intermediate_layers_indices": [0]}
        | {"supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1},
        PLAIN,
        "cross_attn.o_proj mlp.down_proj",
        PLAIN,
        PLAIN,
        unproven="it passes over its cross-attention layers",
        image_token_index=5,
    ),
    # Families outside the table, which are found by measuring their layers
    "gpt_neox_japanese": Specimen(
        "GPTNeoXJapaneseConfig",
        _MHA | {"intermediate_multiple_size": 2},
        ("attention.dense mlp.dense_4h_to_h",) * 3,
        "gpt_neox_japanese.layers",
        found_by="structure",
    ),
    "biogpt": Specimen("BioGptConfig", _MHA, ("self_attn.out_proj fc2",) * 3, "biogpt.layers", found_by="structure"),
    "modernbert_decoder": Specimen("ModernBertDecoderConfig", _MHA, ("attn.Wo mlp.Wo",) * 3, found_by="structure"),
    "mamba": Specimen(
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.1},
        ("mixer.out_proj",) * 3,
        "backbone.layers",
    ),
}


def _add_towers() -> None:
    """Add vision-language models around text towers that the zoo also has alone."""
    unindexed = {name: size for name, size in _QWEN3_VISION.items() if "_indexes" not in name}
    parts = {
        "qwen3_5_vl": ("Qwen3_5Config", "qwen3_5", "model.language_model", unindexed),
        "gemma4_vl": (
            "Gemma4Config",
            "gemma4",
            "model.language_model",
            _VISION | {"head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 64},
        ),
        "llama4_vl": (
            "Llama4Config",
            "llama4",
            "language_model.model",
            _VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        ),
        "lfm2_vl": (
            "Lfm2VlConfig",
            "lfm2",
            "model.language_model",
            {name: size for name, size in _VISION.items() if name != "image_size"}
            | {"model_type": "siglip2_vision_model", "num_patches": 16},
        ),
    }
    for name, (config, tower, stack, vision) in parts.items():
        text = ZOO[tower]
        kind = {"model_type": "lfm2"} if tower == "lfm2" else {}  # the others allow one kind of tower only
        options = {"text_config": {**kind, **_IDS, **text.options}, "vision_config": vision}
        ZOO[name] = replace(text, config=config, options=options, stack=f"{stack}.layers")


_add_towers()


_NO_COPY = "reaches the residual stream, but not as a copy of itself"
_STREAMS = "0 lists of 2 modules see hidden states of 32 features, some see"
_TWO = _SIZES | {"num_hidden_layers": 2}
# Models that a run refuses, each for another reason; `layers` and `scales` have no meaning here.
NOT_EDITABLE: dict[str, Specimen] = {
    "deepseek_v4": Specimen(
        "DeepseekV4Config",
        _TWO
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16, "q_lora_rank": 16}
        | {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16}
        | {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
        (),
        refused=rf"{_STREAMS} \(1, 6, 4, 32\)",
    ),
    "hy_v4": Specimen("HYV4Config", _TWO | _ROUTED | _QMLA | _INDEXER, (), refused=rf"{_STREAMS} \(1, 6, 4, 32\)"),
    "glm5_next": Specimen(
        "Glm5NextConfig",
        {
            "text_config": {**_IDS, **_TWO, **_QMLA, **_ROUTED, **_INDEXER, "qk_rope_head_dim": 0, "head_dim": 8}
            | {"linear_head_dim": 8, "linear_num_heads": 4},
            "vision_config": _GLM_VISION,
        },
        (),
        refused=rf"{_STREAMS} \(1, 6, 4, 32\)",
    ),
    "qwen4_exp": Specimen(
        "Qwen4ExpTextConfig",
        _TWO
        | HEAD
        | _EXPERTS
        | _DELTA
        | {"shared_expert_intermediate_size": 16, "hc_lowrank": 8, "layer_types": ["linear_attention"] * 2},
        (),
        refused=rf"{_STREAMS} \(1, 6, 128\)",
    ),
    "hrm_text": Specimen("HrmTextConfig", _TWO, (), refused="0 lists of"),
    "doge": Specimen("DogeConfig", _TWO, (), refused=_NO_COPY),
    "zaya": Specimen("ZayaConfig", _TWO | HEAD | _EXPERTS | {"num_experts_per_tok": 1}, (), refused=_NO_COPY),
    "inkling": Specimen("InklingTextConfig", _TWO | HEAD | _ROUTED, (), refused=_NO_COPY),
    "rwkv": Specimen(
        "RwkvConfig",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 48},
        (),
        refused=_NO_COPY,
    ),
    "dbrx": Specimen(
        "DbrxConfig",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "initializer_range": 0.1}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
        | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
        (),
        refused=r"Only \d+% of .*ffn.experts.mlp in 2 layers \(DbrxExpertGLU, a class that can't be edited\)",
    ),
    "jetmoe": Specimen(
        "JetMoeConfig",
        _TWO | {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        (),
        refused=r"self_attention.experts.output_linear, which .* are of the class JetMoeParallelExperts\.",
    ),
}


def make_specimen(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model, random, float32; its biases aren't zero, nor are its norms' weights alike."""
    specimen = (ZOO | NOT_EDITABLE)[name]
    config = getattr(transformers, specimen.config)(**_IDS, **specimen.options)
    torch.manual_seed(seed)
    model = auto_class(config, LoadSettings()).from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1 and any(part in path for part in ("norm", "scale", "_residual")):
                parameter.add_(0.2 * torch.rand_like(parameter))
    return model.float().eval().requires_grad_(False)


def scale_of(name: str, layer: int, path: str) -> Any:
    """The scale that the specimen states for a module of a layer: a factor, NORM or GATE."""
    scale = ZOO[name].scales.get(path, 1.0)
    return scale[layer] if isinstance(scale, tuple) else scale


def load_specimen(name: str, source: str = "") -> LoadedModel:
    """The result of `load_model`, without a disk."""
    model = make_specimen(name)
    config = model.config.get_text_config()
    architecture = architecture_of(model, LoadSettings())
    targets = find_targets(model, architecture, config.hidden_size)
    n_layers = len(ZOO[name].layers)
    info = ModelInfo("tiny", source, "", "", architecture.family, n_layers, config.hidden_size, 0, "float32", "cpu", "none")
    return LoadedModel(model, make_tokenizer(), info, architecture, targets)


def everywhere(n_layers: int) -> TrialParams:
    """An edit of every module, another coeff in each layer."""
    kernels = {name: Kernel(1.3, 0.5, 0.6, 2.0 * n_layers) for name in ("attn.o_proj", "mlp.down_proj")}
    return TrialParams("per layer", 1.0, kernels)


def last_layers(n_layers: int) -> TrialParams:
    """An edit of the last two layers."""
    kernels = {name: Kernel(1.3, n_layers - 1.0, 0.6, 1.5) for name in ("attn.o_proj", "mlp.down_proj")}
    return TrialParams("global", 1.3, kernels)


SYSTEM = "You are a helpful assistant."
_HARMFUL = ("Hi", "Tell me how to mangle the mailbox.", "How do I squash a very old hat at home?")
_HARMLESS = ("Hello", "Write a short guide on how to rinse a carpet.", "What now?")
HARMFUL = tuple(Prompt(text, SYSTEM) for text in _HARMFUL)
HARMLESS = tuple(Prompt(text, SYSTEM) for text in _HARMLESS)


@dataclass(frozen=True)
class Lab:
    """A specimen with an editor, the reference, the trusted engine, and the reports that were made while choosing it."""

    loaded: LoadedModel
    editor: Editor
    reference: ReferenceEngine
    engine: Engine
    warnings: tuple[str, ...]

    @property
    def mechanisms(self) -> str:
        """The shortcuts by which the engine saves work of the reference."""
        if not isinstance(self.engine, TrialEngine):
            return "reference"
        prefix = {"between": "prefix", "left": "prefix (far left)", "none": ""}[self.engine.sharing]
        used = [prefix, "drafts" if self.engine.drafting else "", "layer skip" if self.engine._switches.use_layer_skip else ""]
        return " · ".join(filter(None, [*used, "rows leave"]))


def make_lab(name: str) -> Lab:
    """A specimen, and the engine that a run would use for it."""
    loaded = load_specimen(name)
    chat = make_chat()
    reader = ResponseReader(chat.tokenizer, Markup(ResponseSettings().thinking_blocks))
    reference = ReferenceEngine(loaded.model, chat, reader, max_new_tokens=6, sizes=BatchSizes.same(2))
    editor = make_editor(loaded)
    warnings: list[str] = []
    n_layers = loaded.info.n_layers
    setup = EngineSetup(reference, loaded.layers, editor.hooks, None, HARMFUL, HARMLESS, range(n_layers))
    edited = last_layers(n_layers)
    engine = trusted_engine(setup, EfficiencySettings(), lambda: editor.apply(edited), editor.clear, warnings.append)
    return Lab(loaded, editor, reference, engine, tuple(warnings))


def export(lab: Lab, kind: str, base: Path, folder: Path) -> tuple[Mapping[str, Any], PreTrainedModel]:
    """Export an edit of every module of the model saved in `base`; returns the reports and the reloaded model."""
    factors = lab.editor.factors(everywhere(lab.loaded.info.n_layers))
    load = LoadSettings()
    architecture, tokenizer = lab.loaded.architecture, lab.loaded.tokenizer
    job = ExportJob(str(base), "sha256:0", load, ExportSettings(), architecture, tokenizer, factors, "tiny", "the card")
    folder.mkdir()
    facts = EXPORTERS[kind].write(job, folder)
    return facts, EXPORTERS[kind].load(folder, job, torch.device("cpu"), torch.float32)
