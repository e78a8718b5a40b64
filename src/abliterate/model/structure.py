"""The structural fallback: the decoder stack of an unknown model class, and proof of what writes to its residual stream.

A module writes to the stream if a change of its output by δ·v, everything else held still, changes the layer's output by
c·δ·v with c > 0; or if its output goes into a norm whose output does (post-norm blocks). Names are not looked at, nor are
they for components: what mixes positions is attention-like, the rest MLP-like. Knows no table and no settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.model.architectures import ATTENTION, MLP, Architecture, unknown_family
from abliterate.model.experts import is_stack
from abliterate.model.probe import Call, Probe, copied, in_float32
from abliterate.model.weights import out_features

TOKENS = 6


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream of its layer.

    `scale`: c, the mean over positions that it reaches. `norm`: the path of the norm in between, or "". `mixes`: whether
    what it writes at a position depends on other positions.
    """

    path: str
    scale: float
    norm: str
    mixes: bool


def discover(model: Any, model_type: str) -> Architecture:
    """The row that the table lacks, proven on the loaded model.

    Raises:
        InputError: there is no one decoder stack, or a layer in which nothing is proven to write; names the remedy.
    """
    d_model = model.config.get_text_config().hidden_size
    try:
        path, calls = find_stack(model, d_model)
        stack = model.get_submodule(path)
        found = writers_of(stack, calls, d_model)
    except (Unclear, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # An unknown model's code may fail in any way; what it needs is then said by the person.
        raise unknown_family(model_type, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    pairs = [(starred(layer, writer.path), writer) for layer, some in zip(stack, found, strict=True) for writer in some]
    matrices = dict.fromkeys(name for name, _ in pairs)
    # In any layer: one that borrows another layer's keys and values looks at no position by itself.
    mixing = {name for name, writer in pairs if writer.mixes}
    named = {
        component: paths
        for component, paths in (
            (ATTENTION, tuple(path for path in matrices if path in mixing)),
            (MLP, tuple(path for path in matrices if path not in mixing)),
        )
        if paths
    }
    return Architecture(f"{model_type} (by structure)", (model_type,), path, named, found_by="structure")


class Unclear(Exception):
    """What the structure doesn't tell."""


@torch.no_grad()
def find_stack(model: Any, d_model: int) -> tuple[str, list[Call]]:
    """Path of the decoder stack, and how a short text calls each of its layers.

    Raises:
        Unclear: none or several module lists whose members all see hidden states once.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    seen: dict[nn.Module, list[Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(module, []).append(Call(copied(args), copied(kwargs)))  # layers may write over what they are given

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layers in lists.values() for layer in layers]
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(len(embedding), 1000), (1, TOKENS), generator=generator).to(embedding.device)
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, layers in lists.items() if all(_sees_stream(seen.get(layer), d_model) for layer in layers)]
    if len(found) != 1:
        other = {tuple(calls[0].hidden.shape) for calls in seen.values() if _has_hidden(calls)} if not found else ()
        instead = f", some see {max(other, key=len)}" if other else ""
        raise Unclear(f"{len(found)} lists of {n_layers} modules see hidden states of {d_model} features{instead}")
    return found[0], [seen[layer][0] for layer in lists[found[0]]]


def _sees_stream(calls: Sequence[Call] | None, d_model: int) -> bool:
    return calls is not None and len(calls) == 1 and _has_hidden(calls) and calls[0].hidden.shape == (1, TOKENS, d_model)


def _has_hidden(calls: Sequence[Call]) -> bool:
    return bool(calls[0].args or "hidden_states" in calls[0].kwargs) and isinstance(calls[0].hidden, Tensor)


def writers_of(layers: Any, calls: Sequence[Call], d_model: int) -> list[tuple[Writer, ...]]:
    """Per layer what writes to the stream; layers of one make are proven once.

    Raises:
        Unclear: a layer in which nothing writes.
    """
    known: dict[object, tuple[Writer, ...]] = {}
    found = []
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        make = (type(layer), tuple((path, type(part), out_features(part)) for path, part in layer.named_modules()))
        if make not in known:
            known[make] = prove(layer, call, d_model)
        if not known[make]:
            raise Unclear(f"nothing in layer {index} is seen to write to the residual stream")
        found.append(known[make])
    return found


@torch.no_grad()
def prove(layer: nn.Module, call: Call, d_model: int) -> tuple[Writer, ...]:
    """The writers of one layer, in its modules' order, by passes of that layer alone in float32.

    Raises:
        Unclear: a module's output reaches the stream otherwise than as a scaled copy.
    """
    layer, call = in_float32(layer, call)
    probe = Probe(layer, call)
    effects: dict[str, tuple[float, str]] = {}
    for path, module in probe.multipliers.items():
        is_matrix = out_features(module) is not None
        if not probe.writes(path, d_model):
            continue
        scale, norm = probe.change(path), ""
        if scale == 0:
            scale, norm = probe.change_by_norm(path)
        if scale == 0 and is_matrix:
            raise Unclear(f"the output of {path} reaches the residual stream, but not as a copy of itself")
        if scale:
            effects[path] = (scale, norm)
    named = {starred(layer, path): effect for path, effect in effects.items()}
    for path in probe.multipliers:  # experts that no position was routed to are like the others
        if not probe.outputs[path] and starred(layer, path) in named:
            effects[path] = named[starred(layer, path)]
    for path in list(effects):  # a block with parameters of its own around the matrix that writes
        if out_features(probe.multipliers[path]) is None and any(other.startswith(f"{path}.") for other in effects):
            del effects[path]
    matrices = {path for path in effects if not is_stack(probe.modules[path])}  # experts see each position by itself
    mixing = {path for path in matrices if probe.outputs[path] and probe.mixes(path, effects)}
    return tuple(Writer(path, scale, norm, path in mixing) for path, (scale, norm) in effects.items())


def starred(layer: nn.Module, path: str) -> str:
    """A path with a * for the place in a module list: what its members have in common."""
    parts = path.split(".")
    for index in range(1, len(parts)):
        if isinstance(layer.get_submodule(".".join(parts[:index])), nn.ModuleList):
            parts[index] = "*"
            break
    return ".".join(parts)
