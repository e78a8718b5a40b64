"""Select, join and widen rows of a key-value cache, whatever its class (docs/design.md §5.1, §5.4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from abliterate.engine.layout import Sharing


def sharing_of(cache: object, config: object = None) -> Sharing:
    """How a prefix in this cache may be shared by a model of this config."""
    kinds = {type(layer) for layer in getattr(cache, "layers", [])}
    # GPT-Neo's local layers and MPT's position biases count columns, which the cache doesn't show.
    counts_columns = hasattr(config, "attention_types") or hasattr(config, "attn_config")
    if kinds == {DynamicLayer} and not counts_columns:
        return "between"
    own_kinds = kinds - {DummyLayer}  # a dummy layer uses the keys and values of a lower layer
    return "left" if own_kinds and own_kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else "none"


def is_supported(cache: object) -> bool:
    """Whether rows of this cache can be selected and its layers exchanged; states beside its layers prevent both."""
    if (
        not isinstance(cache, Cache)
        or not cache.layers
        or _tensor_bytes([value for name, value in vars(cache).items() if name != "layers"])
    ):
        return False
    return all(hasattr(layer, "reorder_cache") for layer in cache.layers)


def select_rows(cache: Cache, rows: Tensor, first: int = 0) -> Cache:
    """A new cache with the given rows of layers from `first` on; lower layers are shared with `cache` and not read."""
    layers = [layer if index < first else _selected(layer, rows) for index, layer in enumerate(cache.layers)]
    return with_layers(cache, layers)


def with_layers(cache: Cache, layers: Sequence[Any]) -> Cache:
    """A copy of the cache with other layers."""
    new = copy.copy(cache)
    new.layers = list(layers)
    return new


def select_layers(layers: Sequence[Any], rows: Tensor) -> list[Any]:
    """New cache layers that hold the given rows."""
    return [_selected(layer, rows) for layer in layers]


def merge_layer(parts: Sequence[Any]) -> Any:
    """A cache layer with the rows of all parts, one part after the other."""
    new = _copied(parts[0])
    for name, value in vars(parts[0]).items():
        setattr(new, name, _concatenated([vars(layer)[name] for layer in parts], value))
    return new


def layer_bytes(layer: Any) -> int:
    """The bytes of a cache layer's tensors."""
    return _tensor_bytes(list(vars(layer).values()))


def widened(layer: Any, columns: int) -> Any:
    """A plain cache layer with `columns` more columns at the left, to be masked; right if `sharing_of` is "between"."""
    if columns == 0:
        return layer
    new = _copied(layer)
    new.keys, new.values = (pad(states, (0, 0, columns, 0)) for states in (layer.keys, layer.values))
    return new


def take_columns(layers: Sequence[Any], rows: Tensor, columns: Tensor) -> None:
    """Keep in plain cache layers only the given `rows` (n), and in each row the given `columns` (n, C).

    One layer after the other, since two whole caches would not fit where one just does.
    """
    places: dict[tuple[torch.device, int, int], Tensor] = {}  # layers of one shape share their flat indices
    for layer in layers:
        for name in ("keys", "values"):
            states = getattr(layer, name)  # (m, heads, width, d)
            _, heads, width, d = states.shape
            shape = (states.device, heads, width)  # layers may lie on several devices
            if shape not in places:
                at, within = rows.to(states.device), columns.to(states.device)
                head = at[:, None, None] * heads + torch.arange(heads, device=states.device)[:, None]
                places[shape] = (head * width + within[:, None, :]).flatten()
            taken = states.reshape(-1, d).index_select(0, places[shape])  # ten times faster than a gather
            setattr(layer, name, taken.view(len(rows), heads, -1, d))


def _selected(layer: Any, rows: Tensor) -> Any:
    new = _copied(layer)
    new.reorder_cache(rows)
    return new


def _copied(layer: Any) -> Any:
    """A copy that shares only tensors: sequence states keep tensors in lists, which `reorder_cache` writes into."""
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, (list, dict)):
            setattr(new, name, copy.copy(value))
    return new


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _concatenated(values: Sequence[Any], first: Any) -> Any:
    if isinstance(first, Tensor) and first.dim() > 1:  # the batch is the first dimension of a cache layer's tensors
        return torch.cat(list(values))
    if isinstance(first, list):
        return [_concatenated([value[index] for value in values], item) for index, item in enumerate(first)]
    if isinstance(first, Mapping):
        return {key: _concatenated([value[key] for value in values], item) for key, item in first.items()}
    return first
