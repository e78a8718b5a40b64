"""Which modules of which family write to the residual stream: a table, one row per family.

A new family is a new row. Families not in the table are refused with the remedy (name the modules in the settings):
guessing would silently leave matrices out. Paths are attribute paths; components are keyed as in the search space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from abliterate.errors import InputError
from abliterate.model.experts import is_unknown_stack
from abliterate.model.weights import out_features

ATTENTION, MLP = "attn.o_proj", "mlp.down_proj"


@dataclass(frozen=True)
class Architecture:
    """Where the decoder layers are, and per component the module paths within a layer (those present are taken)."""

    family: str
    model_types: tuple[str, ...]
    layers: str
    components: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Target:
    """One module to edit: W (d_model, d_in), or its transpose in a Conv1D; fused experts are a stack of E matrices."""

    name: str
    layer: int
    component: str
    module: nn.Module


_STANDARD = {ATTENTION: ("self_attn.o_proj",), MLP: ("mlp.down_proj",)}
# Fused experts are one module; some layers are dense, and some have experts that every token visits beside the routed ones.
_MOE = ("mlp.down_proj", "mlp.experts", "mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj")

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", ("llama", "smollm3", "ministral"), "model.layers", _STANDARD),
    Architecture("mistral", ("mistral",), "model.layers", _STANDARD),
    Architecture("qwen", ("qwen2", "qwen3"), "model.layers", _STANDARD),
    Architecture("gemma", ("gemma", "gemma2", "gemma3_text"), "model.layers", _STANDARD),
    Architecture("phi3", ("phi3",), "model.layers", _STANDARD),
    Architecture("olmo", ("olmo", "olmo2", "olmo3"), "model.layers", _STANDARD),
    Architecture("granite", ("granite",), "model.layers", _STANDARD),
    Architecture("cohere", ("cohere", "cohere2"), "model.layers", _STANDARD),
    Architecture("glm4", ("glm", "glm4"), "model.layers", _STANDARD),
    Architecture("exaone4", ("exaone4",), "model.layers", _STANDARD),
    Architecture("hunyuan", ("hunyuan_v1_dense",), "model.layers", _STANDARD),
    Architecture("ernie4_5", ("ernie4_5",), "model.layers", _STANDARD),
    Architecture("nemotron", ("nemotron",), "model.layers", _STANDARD),
    Architecture("stablelm", ("stablelm",), "model.layers", _STANDARD),
    Architecture("starcoder2", ("starcoder2",), "model.layers", {ATTENTION: ("self_attn.o_proj",), MLP: ("mlp.c_proj",)}),
    Architecture("phi", ("phi",), "model.layers", {ATTENTION: ("self_attn.dense",), MLP: ("mlp.fc2",)}),
    Architecture("gpt2", ("gpt2",), "transformer.h", {ATTENTION: ("attn.c_proj",), MLP: ("mlp.c_proj",)}),
    Architecture("gpt_neox", ("gpt_neox",), "gpt_neox.layers", {ATTENTION: ("attention.dense",), MLP: ("mlp.dense_4h_to_h",)}),
    Architecture("falcon", ("falcon",), "transformer.h", {ATTENTION: ("self_attention.dense",), MLP: ("mlp.dense_4h_to_h",)}),
    Architecture(
        "moe",
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"),
        "model.layers",
        {ATTENTION: ("self_attn.o_proj",), MLP: _MOE},
    ),
    Architecture(
        "qwen3_next",
        ("qwen3_next",),
        "model.layers",
        {ATTENTION: ("self_attn.o_proj", "linear_attn.out_proj"), MLP: _MOE},
    ),
    Architecture(
        "granitemoe",
        ("granitemoe",),
        "model.layers",
        {ATTENTION: ("self_attn.o_proj",), MLP: ("block_sparse_moe.experts",)},
    ),
    Architecture(
        "lfm2_moe",
        ("lfm2_moe",),
        "model.layers",
        {ATTENTION: ("self_attn.out_proj", "conv.out_proj"), MLP: ("feed_forward.w2", "feed_forward.experts")},
    ),
    Architecture(
        "llama4",
        ("llama4_text",),
        "model.layers",
        {
            ATTENTION: ("self_attn.o_proj",),
            MLP: ("feed_forward.down_proj", "feed_forward.experts", "feed_forward.shared_expert.down_proj"),
        },
    ),
)
_BY_TYPE = {model_type: row for row in ARCHITECTURES for model_type in row.model_types}


def find_architecture(model_type: str, layers: str = "", components: Mapping[str, str] | None = None) -> Architecture:
    """The row of a `model_type`, or one made of the settings `load.decoder_layers` and `load.components`.

    Raises:
        InputError: not in the table and not described by the settings.
    """
    if layers and components:
        named = {component: tuple(path.split("|")) for component, path in components.items()}
        return Architecture(f"{model_type} (by settings)", (model_type,), layers, named)
    if model_type in _BY_TYPE:
        return _BY_TYPE[model_type]
    raise InputError(
        f"The model family {model_type!r} is not known; say where its decoder layers and the modules that write to the "
        "residual stream are: --set load.decoder_layers=model.layers "
        '--set \'load.components={"attn.o_proj" = "self_attn.o_proj", "mlp.down_proj" = "mlp.down_proj"}\'.'
    )


def decoder_layers(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """The decoder stack; InputError where the path leads elsewhere."""
    found = _submodule(model, architecture.layers)
    if not isinstance(found, nn.ModuleList) or len(found) == 0:
        raise InputError(
            f"The model has no decoder layers at {architecture.layers!r}; name them with --set load.decoder_layers=PATH."
        )
    return found


def find_targets(model: nn.Module, architecture: Architecture, d_model: int) -> tuple[Target, ...]:
    """Every module to edit, in layer order.

    Raises:
        InputError: there is none, one doesn't write `d_model` features, or one is of a kind that we can't edit.
    """
    targets = tuple(_targets_of(decoder_layers(model, architecture), architecture))
    if not targets:
        raise InputError(
            f"The model has no matrix to edit: none of its layers has {_paths(architecture)}; name the modules that "
            "write to the residual stream with --set load.components."
        )
    for target in targets:
        if out_features(target.module) != d_model:
            raise InputError(
                f"The module {target.name} writes {out_features(target.module)} features, the residual stream has "
                f"{d_model}; name other modules with --set load.components."
            )
    return targets


def missing_components(targets: tuple[Target, ...], architecture: Architecture, n_layers: int) -> dict[str, int]:
    """Per component the number of layers that have no module of it (only those above 0)."""
    seen = {(target.component, target.layer) for target in targets}
    counts = {
        component: sum((component, layer) not in seen for layer in range(n_layers)) for component in architecture.components
    }
    return {component: count for component, count in counts.items() if count}


def _targets_of(layers: nn.ModuleList, architecture: Architecture) -> Iterator[Target]:
    for index, layer in enumerate(layers):
        for component, paths in architecture.components.items():
            for path in paths:
                module = _submodule(layer, path)
                if module is not None and is_unknown_stack(module):
                    raise InputError(
                        f"The fused experts in {architecture.layers}.{index}.{path} are of a kind ({type(module).__name__}) "
                        "that can't be edited; name the other modules that write to the residual stream with "
                        "--set load.decoder_layers and --set load.components."
                    )
                if module is not None and out_features(module) is not None:
                    yield Target(f"{architecture.layers}.{index}.{path}", index, component, module)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _paths(architecture: Architecture) -> str:
    return " or ".join(path for paths in architecture.components.values() for path in paths)
