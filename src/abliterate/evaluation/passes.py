"""One forward pass of any decoder, from any layer on, with any cache: only `transformers`' forward and cache interfaces.

Skipping layers and selecting rows of a cache need no per-architecture code (DESIGN §5.1, §5.2, §5.4).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from abliterate.evaluation.layout import Sharing, positions
from abliterate.model.memory import memory_errors


class Passes:
    """Forward passes of `model`, whose decoder stack is `layers`."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._model: Any = model
        self.layers = layers
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self.takes_positions = "position_ids" in self._accepted
        self._arity: dict[nn.Module, int] = {}
        self.last_start = last_start(model.config.get_text_config(), len(layers))

    def __call__(
        self, ids: Tensor, mask: Tensor, cache: Cache | None, *, last: int = 1, keep_cache: bool = True
    ) -> tuple[Tensor, Cache | None]:
        """Feed `ids` (n, S) after `cache`; `mask` (n, P+S). Logits (n, last, vocabulary) of the last positions, and the cache.

        Without a cache given, the model makes one of its own class.
        """
        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": keep_cache}
        if cache is not None:
            kwargs["past_key_values"] = cache
        if self.takes_positions:
            kwargs["position_ids"] = positions(mask)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._accepted:
            kwargs["logits_to_keep"] = last
        with memory_errors():
            output = self._model(**kwargs)
        return output.logits[:, -last:], getattr(output, "past_key_values", None)

    @contextlib.contextmanager
    def keeping(self, starts: Sequence[int], hidden: dict[int, Tensor]) -> Iterator[None]:
        """While active, a pass leaves in `hidden` what enters each layer of `starts`, (n, S, d_model)."""

        def hook(start: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering: Tensor = args[0] if args else kwargs["hidden_states"]
                hidden[start] = entering.detach().movedim(-3, 0).clone()  # rows first: Gemma 3n's are (streams, n, S, d_model)

            return keep

        handles = [self.layers[start].register_forward_pre_hook(hook(start), with_kwargs=True) for start in starts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def starting_at(self, start: int, hidden: Tensor | None) -> Iterator[None]:
        """While active, layers below `start` do nothing and `hidden` (n, S, d_model) enters layer `start`."""
        if hidden is None or start == 0:
            yield
            return
        hidden = hidden.movedim(0, -3)

        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        skipped = list(self.layers[:start])
        # accelerate's dispatch leaves a `forward` of its own on the instance; it must come back.
        own = [layer.__dict__.get("forward") for layer in skipped]
        handle = self.layers[start].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            for layer in skipped:
                layer.forward = self._identity(layer)
            yield
        finally:
            handle.remove()
            for layer, forward in zip(skipped, own, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """While active, a pass notes whether layers return a tensor or a tuple: the identity must return the same."""

        def note(module: nn.Module, args: Any, output: Any) -> None:
            self._arity[module] = len(output) if isinstance(output, tuple) else 0

        handles = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _identity(self, layer: nn.Module) -> Callable[..., Any]:
        arity = self._arity[layer]

        def same(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *([None] * (arity - 1))) if arity else hidden

        return same


def last_start(config: object, n_layers: int) -> int:
    """The highest layer that a pass may begin at: later layers may use the keys and values that a lower one computes.

    Gemma 3n and 4: the last layers use those of the last layer of their kind that isn't one of them.
    """
    own = n_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    if own >= n_layers:
        return n_layers - 1
    kinds: list[str] = list(getattr(config, "layer_types", None) or ["full_attention"] * n_layers)
    return min(max((index for index in range(own) if kinds[index] == kind), default=0) for kind in set(kinds[own:]))


def sharing_of(cache: object, config: object = None) -> Sharing:
    """How a prefix in this cache may be shared, by a model of this config."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    # GPT-Neo's local layers and MPT's position biases count columns, and the cache doesn't know that.
    counts_columns = hasattr(config, "attention_types") or hasattr(config, "attn_config")
    if kinds == {DynamicLayer} and not counts_columns:
        return "between"
    own = kinds - {DummyLayer}  # layers that use the keys and values of a lower one
    return "left" if own and own <= {DynamicLayer, DynamicSlidingWindowLayer} else "none"


def is_supported(cache: object) -> bool:
    """Whether rows of this cache can be selected and its layers exchanged; not where it keeps states beside its layers."""
    if (
        not isinstance(cache, Cache)
        or not cache.layers
        or _bytes([value for name, value in vars(cache).items() if name != "layers"])
    ):
        return False
    return all(hasattr(layer, "reorder_cache") for layer in cache.layers)


def select_rows(cache: Cache, rows: Tensor, first: int = 0) -> Cache:
    """A new cache with the given rows of layers from `first` on; the lower ones are shared with `cache`, unread."""
    layers = [layer if index < first else _selected(layer, rows) for index, layer in enumerate(cache.layers)]
    return with_layers(cache, layers)


def with_layers(cache: Cache, layers: Sequence[Any]) -> Cache:
    """The same cache around other layers."""
    new = copy.copy(cache)
    new.layers = list(layers)
    return new


def select_layers(layers: Sequence[Any], rows: Tensor) -> list[Any]:
    """New cache layers with the given rows."""
    return [_selected(layer, rows) for layer in layers]


def merge_layer(parts: Sequence[Any]) -> Any:
    """A cache layer whose rows are those of all parts, one after the other."""
    new = _copied(parts[0])
    for name, value in vars(parts[0]).items():
        setattr(new, name, _concatenated([vars(layer)[name] for layer in parts], value))
    return new


def layer_bytes(layer: Any) -> int:
    """Bytes of the tensors of a cache layer."""
    return _bytes(list(vars(layer).values()))


def widened(layer: Any, columns: int) -> Any:
    """A plain cache layer with so many more columns at the left, to be masked; right where `sharing_of` is "between"."""
    if columns == 0:
        return layer
    new = _copied(layer)
    new.keys, new.values = (pad(states, (0, 0, columns, 0)) for states in (layer.keys, layer.values))
    return new


def take_columns(layer: Any, rows: Tensor, columns: Tensor) -> None:
    """Leave in a plain cache layer only some rows (n), and of each some columns (n, C)."""
    rows, columns = rows.to(layer.keys.device), columns.to(layer.keys.device)  # layers may lie on several devices
    for name in ("keys", "values"):
        states = getattr(layer, name)  # (m, heads, width, d)
        _, heads, width, d = states.shape
        head = rows[:, None, None] * heads + torch.arange(heads, device=rows.device)[:, None]
        places = (head * width + columns[:, None, :]).flatten()  # one flat index: ten times faster than a gather
        setattr(layer, name, states.reshape(-1, d).index_select(0, places).view(len(rows), heads, -1, d))


def _selected(layer: Any, rows: Tensor) -> Any:
    new = _copied(layer)
    new.reorder_cache(rows)
    return new


def _copied(layer: Any) -> Any:
    """A copy that shares tensors only: sequence states keep theirs in lists, which `reorder_cache` writes into."""
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, (list, dict)):
            setattr(new, name, copy.copy(value))
    return new


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _concatenated(values: Sequence[Any], first: Any) -> Any:
    if isinstance(first, Tensor) and first.dim() > 1:  # tensors of a cache layer have the batch as first dimension
        return torch.cat(list(values))
    if isinstance(first, list):
        return [_concatenated([value[index] for value in values], item) for index, item in enumerate(first)]
    if isinstance(first, Mapping):
        return {key: _concatenated([value[key] for value in values], item) for key, item in first.items()}
    return first
