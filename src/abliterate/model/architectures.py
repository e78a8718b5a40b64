"""The table of model families: which modules of a layer write to the residual stream.

A new family is a new row, or a plugin's `architectures`. For a family without a row, the modules are found by the structure
of its layers (`structure.py`); if the structure is unclear, the model is refused and the error says how to name the modules in
the settings: guessing would silently leave matrices out. Paths are attribute paths; components have the same keys as in the
search space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from abliterate.errors import InputError
from abliterate.model.formats import storage_remedy
from abliterate.model.weights import in_features, out_features
from abliterate.plugins import Registry

ATTENTION, MLP = "attn.o_proj", "mlp.down_proj"
QKV = "attn.qkv"


@dataclass(frozen=True)
class Architecture:
    """The path of the decoder layers, and per component the module paths within a layer, as far as a layer has them.

    A * in a module path stands for all members of a module list. Of alternatives separated by |, the first that exists is used,
    also in `layers`. `found_by`: table, structure, or settings. `kinds`: {path: its kind} of modules of which a component has
    several kinds, such as routed and shared experts; `separated` makes components of them. `readers`: the components whose
    modules read the stream instead, {component: path of the norm in between}.
    """

    family: str
    model_types: tuple[str, ...]
    layers: str
    components: Mapping[str, tuple[str, ...]]
    found_by: Literal["table", "structure", "settings"] = "table"
    kinds: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """One module to edit, with W (d_model, d_in), its transpose in a Conv1D, or the E matrices of fused experts.

    If it `reads` the residual stream, W is (d_out, d_model), and `norm` is the norm in between.
    """

    name: str
    layer: int
    component: str
    module: nn.Module
    reads: bool = False
    norm: str = ""

    @property
    def stream_layer(self) -> int:
        """The layer whose output is nearest to the stream where the module meets it, −1 for the embedding.

        Attention reads what the layer before has written. What an MLP reads in the middle of a layer has no residual index of
        its own, so it counts as the layer's output.
        """
        return self.layer - 1 if self.reads and self.component == QKV else self.layer


_STANDARD = {ATTENTION: ("self_attn.o_proj",), MLP: ("mlp.down_proj",)}
_LINEAR = ("self_attn.o_proj", "linear_attn.out_proj")
# In a vision-language model, only the text tower: `Architecture.layers` never leads into a vision part.
_TEXT = "model.layers|model.language_model.layers|language_model.model.layers|model.text_model.layers"
_MOE = ("mlp.down_proj", "mlp.experts")
_GRANITE = ("block_sparse_moe.experts", "shared_mlp.output_linear")
_CONV = ("self_attn.out_proj", "self_attn.o_proj", "conv.out_proj")
_MAMBA = ("self_attn.o_proj", "mamba.out_proj")
# The paths whose modules are of another kind than attention or a dense MLP.
_KINDS = {
    **dict.fromkeys(("linear_attn.out_proj", "linear_attn.o_proj"), "linear"),
    **dict.fromkeys(("mamba.out_proj", "mamba_decoder.mamba.out_proj"), "mamba"),
    "conv.out_proj": "conv",
    "temporal_block.linear_out": "recurrent",
    **dict.fromkeys(("experts", "mlp.experts", "feed_forward.experts", "block_sparse_moe.experts"), "experts"),
    **dict.fromkeys(("mlp.text_moe.experts", "mixer.fc2_latent_proj|mixer.experts"), "experts"),
    **dict.fromkeys(("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj", "mlp.shared_mlp.down_proj"), "shared"),
    **dict.fromkeys(("feed_forward.shared_expert.down_proj", "mixer.shared_experts.down_proj"), "shared"),
    "shared_mlp.output_linear": "shared",
}


# The modules that read the residual stream, and the norm in between, in these families; each of them has one norm before
# attention and one before the MLP, which scales its input entry by entry and shifts nothing.
_READING = ("llama", "mistral", "ministral", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
READERS = {
    QKV: (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
        "input_layernorm",
    ),
    "mlp.gate_up": (
        ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
        "pre_feedforward_layernorm|post_attention_layernorm",
    ),
}


def _row(
    family: str,
    model_types: str,
    attention: tuple[str, ...] = ("self_attn.o_proj",),
    mlp: tuple[str, ...] = ("mlp.down_proj",),
    *,
    layers: str = _TEXT,
    kinds: Mapping[str, str] = _KINDS,
) -> Architecture:
    components = {name: paths for name, paths in {ATTENTION: attention, MLP: mlp}.items() if paths}
    own = {path: kinds[path] for paths in components.values() for path in paths if path in kinds}
    return Architecture(family, tuple(model_types.split()), layers, components, kinds=own)


# An edit removes v from a module's output y. The effect on the stream, if the layer doesn't just add y:
# · post-norm (Gemma 2, 3 and 4, OLMo 2 and 3, GLM-4, EXAONE 4): w∘y/rms(y) joins the stream. Without v in y, the direction v/w
#   is missing from what joins it, and v itself is missing as far as the norm's weights w are equal.
#   MiniMax normalizes the stream itself after attention; the same holds for that sum.
# · multipliers (Granite's residual_multiplier, Falcon-H1's, MiniCPM3's): c·y joins the stream, and c changes
#   neither the direction nor the share of it that is removed.
# · gates of one number per position (shared experts of Qwen) act as multipliers.
# `tests/families/test_families.py` proves each row: it changes a module's output and looks at the change of the layer's output.
_TABLE: tuple[Architecture, ...] = (
    _row(
        "llama",
        "llama smollm3 arcee cwm helium seed_oss hyperclovax minicpm3 youtu jais2 diffllama bitnet apertus internlm3 "
        "iquestcoder chameleon molmo2_text",
    ),
    # Without an image its cross-attention layers are skipped; with an image they write to the stream.
    _row("mllama", "mllama_text_model", ("self_attn.o_proj", "cross_attn.o_proj")),
    _row("mistral", "mistral ministral ministral3"),
    _row("qwen", "qwen2 qwen3 qwen2_vl_text qwen2_5_vl_text qwen2_5_omni_text qwen3_vl_text"),
    _row("qwen3_5", "qwen3_5_text", _LINEAR),
    _row("gemma", "gemma gemma2 gemma3_text vaultgemma gemma4_unified_text"),
    # Its per-layer embeddings join the stream through another matrix; the experts stand beside the dense block.
    _row("gemma4", "gemma4_text", mlp=("mlp.down_proj", "experts", "per_layer_projection")),
    # It has several streams: attention and MLP blocks write to one and, in the layer's correction, to the others in proportion.
    _row("gemma3n", "gemma3n_text", mlp=("mlp.down_proj", "laurel.linear_right", "per_layer_projection")),
    _row("phi3", "phi3 phi4_multimodal"),
    _row("olmo", "olmo olmo2 olmo3"),
    _row("olmo_hybrid", "olmo_hybrid", ("self_attn.o_proj", "linear_attn.o_proj")),
    _row("granite", "granite granite_swa granite4_vision_text"),
    _row("cohere", "cohere cohere2"),
    _row("glm4", "glm glm4 glm4v_text"),
    _row("exaone4", "exaone4"),
    _row("hunyuan", "hunyuan_v1_dense hunyuan_vl_text"),
    _row("ernie4_5", "ernie4_5"),
    _row("nemotron", "nemotron"),
    _row("stablelm", "stablelm"),
    _row("starcoder2", "starcoder2", mlp=("mlp.c_proj",)),
    _row("nanochat", "nanochat", mlp=("mlp.fc2",)),
    _row("phi", "phi", ("self_attn.dense",), ("mlp.fc2",)),
    _row("persimmon", "persimmon", ("self_attn.dense",), ("mlp.dense_4h_to_h",)),
    _row("gpt2", "gpt2 gpt_bigcode", ("attn.c_proj",), ("mlp.c_proj",), layers="transformer.h"),
    _row("gpt_neo", "gpt_neo", ("attn.attention.out_proj",), ("mlp.c_proj",), layers="transformer.h"),
    _row("gptj", "gptj codegen", ("attn.out_proj",), ("mlp.fc_out",), layers="transformer.h"),
    _row("gpt_neox", "gpt_neox", ("attention.dense",), ("mlp.dense_4h_to_h",), layers="gpt_neox.layers"),
    _row("falcon", "falcon bloom", ("self_attention.dense",), ("mlp.dense_4h_to_h",), layers="transformer.h"),
    _row("mpt", "mpt", ("attn.out_proj",), ("ffn.down_proj",), layers="transformer.blocks"),
    _row("opt", "opt", ("self_attn.out_proj",), ("fc2",), layers="model.decoder.layers"),
    # Hybrids: the modules of a component differ per layer; Falcon-H1's layers have attention and a mixer side by side.
    _row("falcon_h1", "falcon_h1", _MAMBA, ("feed_forward.down_proj",)),
    _row("bamba", "bamba", _MAMBA, ("feed_forward.down_proj",)),
    _row("griffin", "recurrent_gemma", ("temporal_block.o_proj", "temporal_block.linear_out"), ("mlp_block.down_proj",)),
    _row("lfm2", "lfm2 lfm3", _CONV, ("feed_forward.w2",)),
    _row("mamba", "mamba mamba2 falcon_mamba", ("mixer.out_proj",), (), layers="backbone.layers"),
    # The output of their shared transformer blocks enters the mixers, never the stream.
    _row("zamba", "zamba zamba2", ("mamba.out_proj", "mamba_decoder.mamba.out_proj"), ()),
    # One block per layer. If experts work in a latent space, the projection out of it writes to the stream.
    _row(
        "nemotron_h",
        "nemotron_h",
        ("mixer.o_proj", "mixer.out_proj"),
        ("mixer.down_proj", "mixer.fc2_latent_proj|mixer.experts", "mixer.shared_experts.down_proj"),
        kinds=_KINDS | {"mixer.out_proj": "mamba"},
    ),
    # Mixtures of experts: all routed experts of a layer are one module; some layers are dense, and some also have shared
    # experts, which every token visits.
    _row(
        "mixtral",
        "mixtral phimoe minimax_m2 olmoe flex_olmo gpt_oss qwen3_moe qwen3_vl_moe_text qwen3_omni_moe_text mellum",
        mlp=_MOE,
    ),
    _row(
        "minimax",
        "minimax",
        ("self_attn.o_proj", "self_attn.out_proj"),
        _MOE,
        kinds=_KINDS | {"self_attn.out_proj": "linear"},
    ),
    _row("qwen2_moe", "qwen2_moe flint", mlp=(*_MOE, "mlp.shared_expert.down_proj")),
    _row("qwen3_next", "qwen3_next qwen3_5_moe_text", _LINEAR, (*_MOE, "mlp.shared_expert.down_proj")),
    _row(
        "deepseek",
        "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe glm4v_moe_text glm4_moe_lite glm_moe_dsa ernie4_5_moe exaone_moe dots1 "
        "afmoe aria_text axk1 axk2 bailing_hybrid cohere2_moe hy_v3 kimi_linear kolibri1 laguna mimo_v2_flash "
        "minimax_m3_vl_text mistral4 mistral_large4_text solar_open step3p5",
        mlp=(*_MOE, "mlp.shared_experts.down_proj"),
    ),
    _row("longcat", "longcat_flash", ("self_attn.*.o_proj",), ("mlps.*.down_proj", "mlp.experts")),
    # Its other experts serve images only and belong to the vision part.
    _row("ernie4_5_vl", "ernie4_5_vl_moe_text", mlp=("mlp.down_proj", "mlp.text_moe.experts", "mlp.shared_experts.down_proj")),
    _row("hunyuan_moe", "hunyuan_v1_moe", mlp=(*_MOE, "mlp.shared_mlp.down_proj")),
    _row("jamba", "jamba", _MAMBA, ("feed_forward.down_proj", "feed_forward.experts")),
    _row("lfm2_moe", "lfm2_moe", _CONV, ("feed_forward.w2", "feed_forward.experts")),
    _row("granitemoe", "granitemoe granitemoeshared granitemoe_swa", mlp=_GRANITE),
    _row("granitemoehybrid", "granitemoehybrid", _MAMBA, _GRANITE),
    _row(
        "llama4",
        "llama4_text",
        mlp=("feed_forward.down_proj", "feed_forward.experts", "feed_forward.shared_expert.down_proj"),
    ),
)
ARCHITECTURES: Registry[Architecture] = Registry(
    "architectures",
    "model family",
    {row.family: row for row in _TABLE},
    named="family",
    needs=("family", "model_types", "layers", "components"),
)


def _row_of(model_type: str) -> Architecture | None:
    """The row that has a `model_type`; InputError where a plugin's row and another one have it."""
    rows = [row for row in ARCHITECTURES.values() if model_type in row.model_types]
    if len(rows) > 1:
        plugin = ARCHITECTURES.plugin(rows[-1].family)  # plugins come last; a test sees to the built-in table
        raise InputError(
            f"The model type {model_type!r} belongs to the families {' and '.join(row.family for row in rows)}; uninstall the "
            f"plugin {plugin.title if plugin else ''}, or have its author leave that type out."
        )
    return rows[0] if rows else None


def is_built_in(model_type: str) -> bool:
    """Whether a row of the built-in table, and not one of a plugin, has a `model_type`."""
    row = _row_of(model_type)
    return row is not None and ARCHITECTURES.plugin(row.family) is None


def known_architecture(model_type: str, layers: str = "", components: Mapping[str, str] | None = None) -> Architecture | None:
    """The row of `model_type`, or one made from `load.components` and the layers of `load.decoder_layers` or of that row.

    None if the family has no row and the settings don't name both.
    """
    row = _row_of(model_type)
    layers = layers or (row.layers if row else "")
    if layers and components:
        named = {component: tuple(path.split("|")) for component, path in components.items()}
        return Architecture(f"{model_type} (by settings)", (model_type,), layers, named, found_by="settings")
    return row if row is None or layers == row.layers else replace(row, layers=layers)


def separated(model: nn.Module, architecture: Architecture) -> Architecture:
    """The row with a component for each kind of module, such as `mlp.down_proj.experts`, where the model has several of one.

    Components of which the model has one kind only stay as they are.
    """
    layers = decoder_layers(model, architecture)
    components: dict[str, tuple[str, ...]] = {}
    for component, paths in architecture.components.items():
        kinds = {path: architecture.kinds.get(path, "") for path in paths if any(_any_at(layer, path) for layer in layers)}
        several = len(set(kinds.values())) > 1
        for path in kinds if several else paths:
            name = kind_name(component, kinds[path]) if several else component
            components[name] = (*components.get(name, ()), path)
    return replace(architecture, components=components)


def check_asked(model_type: str, found_by: str, *, separate_kinds: bool, readers: bool) -> None:
    """Raise InputError if the settings ask for components that aren't known of this family, or of modules found otherwise.

    The table alone knows them, so this needs no model.
    """
    asked = {"load.separate_kinds": separate_kinds, "load.readers": readers}
    name = next((name for name, is_asked in asked.items() if is_asked), "")
    if name and found_by == "settings":
        raise InputError(f"The setting {name} adds nothing to modules that load.components names; leave one of the two out.")
    if separate_kinds and found_by != "table":
        raise InputError(
            f"The kinds of modules aren't known for {model_type!r}, which isn't in the table of families; leave "
            "load.separate_kinds out, or name components with load.decoder_layers and load.components."
        )
    if readers and (found_by != "table" or model_type not in _READING):
        raise InputError(
            f"The modules that read the residual stream aren't known for {model_type!r}, only for {', '.join(_READING)}; leave "
            "load.readers out."
        )


def with_readers(architecture: Architecture) -> Architecture:
    """The row with the modules that read the residual stream as further components."""
    components = {component: paths for component, (paths, _) in READERS.items()}
    readers = {component: norm for component, (_, norm) in READERS.items()}
    return replace(architecture, components={**architecture.components, **components}, readers=readers)


def kind_name(component: str, kind: str) -> str:
    """The component for one kind of a component's modules; the plain kind has no name."""
    return f"{component}.{kind}" if kind else component


def kind_names(architecture: Architecture) -> set[str]:
    """The components that `separated` can make of a row."""
    pairs = ((component, path) for component, paths in architecture.components.items() for path in paths)
    return {kind_name(component, architecture.kinds.get(path, "")) for component, path in pairs}


def _any_at(layer: nn.Module, path: str) -> bool:
    return any(True for _ in _all_expanded(layer, (path,)))


def unknown_family(model_type: str, reason: str = "") -> InputError:
    """The error for a family that isn't in the table; `reason`: why its structure is unclear."""
    return InputError(
        f"The model family {model_type!r} is not known{f', and its structure is unclear ({reason})' if reason else ''}; name "
        "its decoder layers and the modules that write to the residual stream: "
        "--set load.decoder_layers=model.layers "
        '--set \'load.components={"attn.o_proj" = "self_attn.o_proj", "mlp.down_proj" = "mlp.down_proj"}\'.'
    )


def decoder_path(model: nn.Module, architecture: Architecture) -> str:
    """The path of the decoder layers; InputError if none of the row's paths leads to a module list."""
    for path in architecture.layers.split("|"):
        layers = _submodule(model, path)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return path
    raise InputError(
        f"The model has no decoder layers at {architecture.layers!r}; name them with --set load.decoder_layers=PATH."
    )


def decoder_layers(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """The decoder layers; InputError as in `decoder_path`."""
    layers = model.get_submodule(decoder_path(model, architecture))
    assert isinstance(layers, nn.ModuleList)
    return layers


def find_targets(model: nn.Module, architecture: Architecture, d_model: int) -> tuple[Target, ...]:
    """Every module to edit, in layer order.

    Raises:
        InputError: there is no such module, or a module doesn't write `d_model` features or belongs to several layers. Modules
            that can't be edited are left out; `coverage.py` counts them.
    """
    named = [target for target, _ in members(model, architecture)]
    targets = tuple(target for target in named if not obstacle(target.module))
    quantized = next((target for target in named if storage_remedy(target.module)), None)
    if not targets and quantized is not None:
        raise InputError(f"The weights in {quantized.name} can't be edited: {storage_remedy(quantized.module)}.")
    if named and not targets:
        kinds = " and ".join(sorted({type(target.module).__name__ for target in named}))
        raise InputError(
            f"The model can't be edited: {_paths(architecture)}, which write to its residual stream, are of the class {kinds}."
        )
    if not targets:
        raise InputError(
            f"The model has no matrix to edit: none of its layers has {_paths(architecture)}; name the modules that "
            "write to the residual stream with --set load.components."
        )
    for target in targets:
        if target.reads and in_features(target.module) == d_model:
            continue
        if out_features(target.module) != d_model:
            raise InputError(
                f"The module {target.name} writes {out_features(target.module)} features, but the residual stream has "
                f"{d_model}; name other modules with --set load.components."
            )
    if len({id(target.module) for target in targets}) < len(targets):
        raise InputError(
            f"The layers share modules ({targets[-1].name}), which can't be edited for one layer alone; name modules that "
            "aren't shared with --set load.components."
        )
    return targets


def missing_components(targets: tuple[Target, ...], architecture: Architecture, n_layers: int) -> dict[str, int]:
    """Per component, the number of layers without a module of it; components that every layer has are left out."""
    seen = {(target.component, target.layer) for target in targets}
    counts = {
        component: sum((component, layer) not in seen for layer in range(n_layers))
        for component, paths in architecture.components.items()
        if paths
    }
    return {component: count for component, count in counts.items() if count}


def obstacle(module: nn.Module) -> str:
    """Why a module that writes to the residual stream can't be edited; "" if it can."""
    return storage_remedy(module) or (
        f"{type(module).__name__}, a class that can't be edited" if out_features(module) is None else ""
    )


def members(model: nn.Module, architecture: Architecture) -> Iterator[tuple[Target, str]]:
    """Every module that the row names in any layer, editable or not, with its path in the row, in layer order."""
    layers_path = decoder_path(model, architecture)
    for index, layer in enumerate(decoder_layers(model, architecture)):
        prefix = f"{layers_path}.{index}"
        for component, paths in architecture.components.items():
            reads, norms = component in architecture.readers, architecture.readers.get(component, "")
            norm = next((f"{prefix}.{path}" for path, _ in _all_expanded(layer, (norms,))), "") if reads else ""
            for path, pattern in _all_expanded(layer, paths):
                yield Target(f"{prefix}.{path}", index, component, layer.get_submodule(path), reads, norm), pattern


def _all_expanded(layer: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    for alternatives in paths:
        for pattern in alternatives.split("|"):
            if present := [(path, pattern) for path in _expanded(layer, pattern) if _submodule(layer, path) is not None]:
                yield from present
                break


def _expanded(layer: nn.Module, path: str) -> Iterator[str]:
    """One path per member of the module list that the * in `path` stands for."""
    head, star, tail = path.partition(".*.")
    members = _submodule(layer, head) if star else None
    if isinstance(members, nn.ModuleList):
        yield from (f"{head}.{index}.{tail}" for index in range(len(members)))
    elif not star:
        yield path


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path; None if there is none, or only the stand-in for a module that the config leaves out."""
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    return None if isinstance(module, nn.Identity) else module


def _paths(architecture: Architecture) -> str:
    return " or ".join(path for paths in architecture.components.values() for path in paths)
