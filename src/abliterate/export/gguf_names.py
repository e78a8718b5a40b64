"""Find the tensor of every matrix to edit in a GGUF file, and refuse a file that isn't of the run's model.

The names come from the tensor-name maps of the `gguf` library, by which llama.cpp's converter names tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from abliterate.errors import InputError
from abliterate.export.gguf_file import GgufFile, GgufTensor
from abliterate.export.gguf_library import library, readable, type_name
from abliterate.model.architectures import Target
from abliterate.model.experts import is_fused
from abliterate.model.weights import shape_of

# The name under which the library's maps know the fused experts of most families; all families have one tensor name.
_EXPERTS = "model.layers.{}.mlp.experts.down_proj"


def find_tensors(file: GgufFile, config: Any, targets: Mapping[str, Target]) -> dict[str, GgufTensor]:
    """{target: its tensor}; `config` is that of the run's model.

    Raises:
        InputError: the file is one of several parts, or isn't of that model.
    """
    if file.value("split.count") not in (None, 0, 1):
        raise InputError(f"The GGUF file {file.path.name} is one of several parts; join them with llama-gguf-split --merge.")
    architecture = _check_model(file, config.get_text_config())
    names = tensor_names(architecture, config.get_text_config().num_hidden_layers, targets)
    found: dict[str, GgufTensor] = {}
    for target in targets.values():
        name = names.get(target.name)
        if name is None:
            raise misfit(file, f"llama.cpp has no tensor for {target.name} in the architecture {_architecture(file)}")
        tensor = file.tensors.get(name)
        if tensor is None:
            raise misfit(file, f"it has no tensor {name}")
        if tensor.shape != shape_of(target.module):
            raise misfit(file, f"{tensor.name} has the shape {tensor.shape}, not {shape_of(target.module)}")
        if not readable(tensor.type):
            raise InputError(
                f"The tensor {tensor.name} in {file.path.name} is stored as {type_name(tensor.type)}, which the library gguf "
                "can't read; give --gguf a file of another type."
            )
        found[target.name] = tensor
    if len({tensor.name for tensor in found.values()}) < len(found):
        raise misfit(file, "it holds several of the model's matrices in one tensor")
    return found


def tensor_names(architecture: Any, n_layers: int, targets: Mapping[str, Target]) -> dict[str, str]:
    """{target: the name of its tensor in a GGUF file}; targets that the library has no name for are left out.

    `architecture` is a member of the library's `MODEL_ARCH`.
    """
    names = library().get_tensor_name_map(architecture, n_layers)
    found = {name: next(filter(None, map(names.get_name, _keys(target))), None) for name, target in targets.items()}
    return {name: f"{tensor}.weight" for name, tensor in found.items() if tensor is not None}


def misfit(file: GgufFile, reason: str) -> InputError:
    """The error for a file of another model."""
    return InputError(
        f"The GGUF file {file.path.name} doesn't fit the run's model: {reason}; give --gguf a file made from that model."
    )


def _check_model(file: GgufFile, config: Any) -> Any:
    """The library's member for the file's architecture; InputError if it or a size isn't that of the config."""
    name = _architecture(file)
    known = {text: member for member, text in library().MODEL_ARCH_NAMES.items()}
    if name not in known:
        raise misfit(file, f"its architecture is {name!r}, which the library gguf doesn't know")
    own, theirs = _letters(config.model_type.removesuffix("_text")), _letters(name)
    # A family that llama.cpp has no architecture of its own for goes by another's, mostly llama; then the sizes decide.
    if own in {_letters(text) for text in known} and not theirs.startswith(own):
        raise misfit(file, f"its architecture is {name}, and the model's {config.model_type}")
    layers, further = file.value(f"{name}.block_count"), file.value(f"{name}.nextn_predict_layers")
    if isinstance(layers, int) and isinstance(further, int):  # layers that only predict further tokens aren't edited
        layers -= further
    for what, found, expected in (
        ("layers", layers, config.num_hidden_layers),
        ("entries in a hidden state", file.value(f"{name}.embedding_length"), config.hidden_size),
    ):
        if found != expected:
            raise misfit(file, f"it has {found} {what}, and the model has {expected}")
    return known[name]


def _architecture(file: GgufFile) -> str:
    return str(file.value("general.architecture"))


def _keys(target: Target) -> list[str]:
    """The names by which the library may know a target: its own, and that in a model without further towers.

    The library has Nemotron-H's names of before transformers had that family.
    """
    if is_fused(target.module):
        return [_EXPERTS.format(target.layer)]
    within = target.name.partition(f".{target.layer}.")[2]
    return [target.name, *(f"{stack}.layers.{target.layer}.{within}" for stack in ("model", "backbone"))]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
