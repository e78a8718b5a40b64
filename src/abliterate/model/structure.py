"""The structural fallback: the decoder layers of an unknown model class, and proof of what writes to its residual stream.

A module writes to the stream if a change of its output by δ·v, everything else held still, changes the layer's output by
c·δ·v with c > 0; or if its output goes into a norm whose output does (post-norm blocks). The proof runs passes of one layer
alone. Names are not looked at: a module that mixes positions is called attention-like, the rest MLP-like.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError, first_line
from abliterate.model.architectures import ATTENTION, MLP, Architecture, unknown_family
from abliterate.model.experts import is_fused
from abliterate.model.residuals import first_tensor
from abliterate.model.weights import out_features

# As shares of the size of the change: an effect below NOTHING is none, and a scaled copy may be off by TOLERANCE.
NOTHING, TOLERANCE = 1e-4, 1e-2


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states that entered, (1, T, d_model)."""
        entered: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return entered

    def on(self, layer: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """The layer's output (1, T, d_model), with `hidden` as its input if given."""
        args, kwargs = self.args, dict(self.kwargs)
        if hidden is not None:
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        return first_tensor(layer(*args, **kwargs))


class LayerProbe:
    """One call of one layer; it replays the recorded outputs of the modules that multiply, except those that are changed."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        self.layer, self.call = layer, call
        self.modules = {path: module for path, module in layer.named_modules() if path}
        self.multipliers = {
            path: module
            for path, module in self.modules.items()
            if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        }
        self.norms = [
            path
            for path, module in self.modules.items()
            if path not in self.multipliers and list(module.parameters()) and not list(module.children())
        ]
        self.outputs: dict[str, list[Any]] = {path: [] for path in self.modules}
        self._inputs: dict[str, list[Tensor]] = {path: [] for path in self.norms}
        with self._hooked(self.modules, self._record):
            self.base = call.on(layer)
        generator = torch.Generator().manual_seed(1)
        v = torch.randn(self.base.shape[-1], generator=generator).to(self.base)
        self.delta = v / v.norm() * self.base.norm(dim=-1).mean()  # δ·v, as large as the stream, so that rounding can't hide it

    def writes(self, path: str, d_model: int) -> bool:
        """Whether a module was called and returned states of the stream's width."""
        return bool(self.outputs[path]) and first_tensor(self.outputs[path][0]).shape[-1] == d_model

    def change(self, path: str) -> float | None:
        """c if Δ, the change of the layer's output, is c·δ·v; 0 if it isn't a positive multiple of δ·v; None if it is zero."""
        return self._share(self._play(self._all_but(path), {path: self.delta}) - self.base)

    def change_by_norm(self, path: str) -> tuple[float | None, str]:
        """`change` of a norm that the module's output enters, and the norm's path; 0 if there is none."""
        entered: dict[str, Tensor] = {}

        def recorder(norm: str) -> Callable[..., Any]:
            return lambda module, args, output: entered.update({norm: args[0].detach().clone()})

        with self._hooked({norm: self.modules[norm] for norm in self.norms if self._inputs[norm]}, recorder):
            self._play(self._all_but(path), {path: self.delta})
        for norm, after in entered.items():
            before = self._inputs[norm][-1]
            if before.shape == after.shape and before.shape[-1] == len(self.delta) and self._share(after - before):
                scale = (
                    self.change(norm) or self.change_by_norm(norm)[0]
                )  # Gemma 4's experts pass through one norm after another
                if scale:
                    return scale, norm
        return 0.0, ""

    def _all_but(self, path: str) -> set[str]:
        """The modules that multiply, except the module at `path` and the modules that contain it."""
        return {other for other in self.multipliers if other != path and not path.startswith(f"{other}.")}

    def _share(self, difference: Tensor) -> float | None:
        """c if `difference` (…, d_model) is c·δ·v with c > 0, 0 if it is another change, None if it is none."""
        difference = difference.flatten(0, -2)
        size = difference.norm(dim=-1)
        reached = size > NOTHING * self.delta.norm()
        if not reached.any():
            return None
        difference, size = difference[reached], size[reached]
        scale = difference @ self.delta / self.delta.square().sum()
        off = (difference - scale[:, None] * self.delta).norm(dim=-1)
        return float(scale.mean()) if (off <= TOLERANCE * size).all() and (scale > 0).all() else 0.0

    def mixes(self, path: str, writers: Mapping[str, object]) -> bool:
        """Whether a change of the layer's input at the first position changes the module's output at later positions."""
        hidden = self.call.hidden.clone()
        hidden[:, 0] = hidden[:, 0].roll(1, dims=-1) + hidden[:, 0].std()
        seen: list[Tensor] = []

        def recorder(path: str) -> Callable[..., Any]:
            return lambda module, args, output: seen.append(first_tensor(output).clone())

        others = {other for other in writers if other != path}
        with self._hooked({path: self.modules[path]}, recorder):
            self._play(others, {}, hidden)
        before, after = first_tensor(self.outputs[path][0]), seen[0]
        if before.shape != after.shape:
            return False  # experts receive only the positions that are routed to them
        before, after = before.flatten(0, -2)[1:], after.flatten(0, -2)[1:]
        return bool((after - before).norm() > NOTHING * before.norm())

    def _play(self, fixed: set[str], changed: Mapping[str, Tensor], hidden: Tensor | None = None) -> Tensor:
        """The layer's output, with the recorded outputs of `fixed` and with those of `changed` plus their change."""

        def hook(path: str) -> Callable[..., Any]:
            recorded = iter(self.outputs[path])

            def replace(module: nn.Module, args: Any, output: Any) -> Any:
                played = next(recorded, output)
                if first_tensor(played).shape == first_tensor(output).shape:  # otherwise experts that received other positions
                    output = copied(played)
                if path not in changed:
                    return output
                first = first_tensor(output) + changed[path]
                return (first, *output[1:]) if isinstance(output, tuple) else first

            return replace

        with self._hooked({path: self.modules[path] for path in (*fixed, *changed)}, hook):
            return self.call.on(self.layer, hidden)

    def _record(self, path: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.outputs[path].append(copied(output))  # a clone: blocks may add the stream in place
            if path in self._inputs and args:
                self._inputs[path].append(args[0].clone())

        return note

    @contextlib.contextmanager
    def _hooked(self, modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
        handles = [module.register_forward_hook(make(path)) for path, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def in_float32(layer: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """The layer and the call in float32; InputError if the weights are quantized."""
    parameters = list(layer.parameters())
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return layer, call
    if any(not parameter.is_floating_point() or parameter.element_size() < 2 for parameter in parameters):
        raise InputError(
            "The structure of a quantized model of an unknown family can't be measured; load it without load.quantization "
            "once, or a quantized checkpoint with --set load.dequantize=true."
        )
    return copy.deepcopy(layer).float(), Call(_cast(call.args), _cast(dict(call.kwargs)))


def _cast(value: Any) -> Any:
    return _mapped(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def copied(value: Any) -> Any:
    """A copy in which every tensor is cloned."""
    return _mapped(value, Tensor.clone)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value`, with every tensor in its nested tuples, lists and dicts changed; other values are kept."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return {key: _mapped(item, change) for key, item in value.items()} if type(value) is dict else value


TOKENS = 6


@dataclass(frozen=True)
class Writer:
    """A module that writes to the residual stream of its layer.

    `scale`: c, the mean over the positions that it reaches. `norm`: the path of the norm in between, or "". `mixes`: whether
    its output at a position depends on other positions.
    """

    path: str
    scale: float
    norm: str
    mixes: bool


def discover(model: Any, model_type: str) -> Architecture:
    """The row that the table lacks, proven on the loaded model.

    Raises:
        InputError: there isn't exactly one list of decoder layers, or no module of a layer is proven to write.
    """
    d_model = model.config.get_text_config().hidden_size
    try:
        path, calls = find_stack(model, d_model)
        layers = model.get_submodule(path)
        writers = writers_of(layers, calls, d_model)
    except (Unclear, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # An unknown model's code may fail in any way; the user then names the modules.
        raise unknown_family(model_type, first_line(error)) from error
    pairs = [
        (starred(layer, writer.path), writer)
        for layer, layer_writers in zip(layers, writers, strict=True)
        for writer in layer_writers
    ]
    matrices = dict.fromkeys(name for name, _ in pairs)
    # Mixing in any layer counts: a layer that borrows another layer's keys and values doesn't mix positions by itself.
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
    """The structure leaves a question open; the message says which."""


@torch.no_grad()
def find_stack(model: Any, d_model: int) -> tuple[str, list[Call]]:
    """Path of the decoder layers, and each layer's call in a pass over a short text.

    Raises:
        Unclear: no module list, or several, whose members all receive hidden states exactly once.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    seen: dict[nn.Module, list[Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(module, []).append(Call(copied(args), copied(kwargs)))  # copies: layers may overwrite their input

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layers in lists.values() for layer in layers]
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, min(len(embedding), 1000), (1, TOKENS), generator=generator).to(embedding.device)
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    fitting = [name for name, layers in lists.items() if all(_sees_stream(seen.get(layer), d_model) for layer in layers)]
    if len(fitting) != 1:
        other = {tuple(calls[0].hidden.shape) for calls in seen.values() if _has_hidden(calls)} if not fitting else ()
        instead = f", some see {max(other, key=len)}" if other else ""
        raise Unclear(f"{len(fitting)} lists of {n_layers} modules see hidden states of {d_model} features{instead}")
    return fitting[0], [seen[layer][0] for layer in lists[fitting[0]]]


def _sees_stream(calls: Sequence[Call] | None, d_model: int) -> bool:
    return calls is not None and len(calls) == 1 and _has_hidden(calls) and calls[0].hidden.shape == (1, TOKENS, d_model)


def _has_hidden(calls: Sequence[Call]) -> bool:
    return bool(calls[0].args or "hidden_states" in calls[0].kwargs) and isinstance(calls[0].hidden, Tensor)


def writers_of(layers: Any, calls: Sequence[Call], d_model: int) -> list[tuple[Writer, ...]]:
    """Per layer, the modules that write to the stream; layers of the same make are proven once.

    Raises:
        Unclear: no module of a layer writes to the stream.
    """
    known: dict[object, tuple[Writer, ...]] = {}
    writers = []
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        make = (type(layer), tuple((path, type(module), out_features(module)) for path, module in layer.named_modules()))
        if make not in known:
            known[make] = prove(layer, call, d_model)
        if not known[make]:
            raise Unclear(f"no module in layer {index} is seen to write to the residual stream")
        writers.append(known[make])
    return writers


@torch.no_grad()
def prove(layer: nn.Module, call: Call, d_model: int) -> tuple[Writer, ...]:
    """The writers of one layer, in its modules' order, by passes of that layer alone in float32.

    Raises:
        Unclear: a module's output reaches the stream, but not as a scaled copy.
    """
    layer, call = in_float32(layer, call)
    probe = LayerProbe(layer, call)
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
    for path in probe.multipliers:  # experts without any position behave as the others do
        if not probe.outputs[path] and starred(layer, path) in named:
            effects[path] = named[starred(layer, path)]
    for path in list(effects):  # drop blocks with own parameters around the matrix that writes
        if out_features(probe.multipliers[path]) is None and any(other.startswith(f"{path}.") for other in effects):
            del effects[path]
    matrices = {path for path in effects if not is_fused(probe.modules[path])}  # experts process each position by itself
    mixing = {path for path in matrices if probe.outputs[path] and probe.mixes(path, effects)}
    return tuple(Writer(path, scale, norm, path in mixing) for path, (scale, norm) in effects.items())


def starred(layer: nn.Module, path: str) -> str:
    """A path with a * for the index in a module list, the same for all members of the list."""
    parts = path.split(".")
    for index in range(1, len(parts)):
        if isinstance(layer.get_submodule(".".join(parts[:index])), nn.ModuleList):
            parts[index] = "*"
            break
    return ".".join(parts)
