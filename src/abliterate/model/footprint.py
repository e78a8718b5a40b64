"""Estimates how many bytes one row takes in each operation, from a model's config alone.

The estimate adds the largest layer's activations, the cache and the logits. For plain transformers it is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLOAT32 = 4
# The factor by which families exceed the plain transformer counted here, measured in tests/unit/model/test_footprint.py.
_MARGIN = 1.3
# The names that families give to the number of experts that a token visits.
_VISITED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
# Values that a decoder layer keeps for its backward pass, per token and d_model: attention's and the MLP's inputs and outputs.
_ACTIVATIONS = 40
# Without their kernel packages, linear attention and convolutions run in plain PyTorch, which keeps many float32 copies.
_RECURRENT_MARGIN = 5
# Words in the names of layers without keys and values, which keep states of a fixed size, about that of so many tokens.
_FIXED, _STATE = ("linear", "mamba", "conv", "recurrent", "rwkv", "moe", "mlp"), 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that determine its memory use.

    `widest`: the most hidden entries of a token in any MLP, over all experts it visits. `recurrent`: whether some layers
    keep states instead of a cache. `cached`: per layer, the most tokens that its cache keeps (0: all). `entries`: per layer,
    the numbers that it keeps of a token. `kv_heads` and `head_dim` are those of the layer that has most. `scores`: bytes of an
    attention score over all heads; 0 if attention never stores scores.
    """

    n_layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    widest: int
    vocabulary: int
    itemsize: int
    recurrent: bool
    cached: tuple[int, ...]
    entries: tuple[int, ...]
    scores: int

    @staticmethod
    def of(config: Any, dtype: torch.dtype) -> Shape:
        """The shape in a (text) config, for passes in `dtype`; fields that a family lacks get their usual values."""
        d_model = config.hidden_size
        heads = _largest(_field(config, "num_attention_heads")) or max(1, d_model // 64)
        hidden = max(_largest(_field(config, name)) for name in ("intermediate_size", "ffn_hidden_size")) or 4 * d_model
        experts = visited_experts(config) * (_largest(_field(config, "moe_intermediate_size")) or hidden)
        kv_heads = [each or heads for each in _by_layer(config, "num_key_value_heads")]
        head_dims = [each or d_model // heads for each in _by_layer(config, "head_dim")]
        eager = getattr(config, "_attn_implementation", None) == "eager"
        return Shape(
            n_layers=config.num_hidden_layers,
            d_model=d_model,
            heads=heads,
            kv_heads=max(kv_heads),
            head_dim=max(head_dims),
            widest=max(hidden, experts),
            vocabulary=config.vocab_size,
            itemsize=dtype.itemsize,
            recurrent=any("attention" not in kind or "linear" in kind for kind in getattr(config, "layer_types", None) or ()),
            cached=tuple(_cached_tokens(config)),
            entries=tuple(2 * each * dim for each, dim in zip(kv_heads, head_dims, strict=True)),
            scores=heads * (2 * FLOAT32 + dtype.itemsize) if eager else 0,
        )

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in the layer that keeps most of them."""
        return max(self.entries) * self.itemsize

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of a row of `tokens` tokens in all layers."""
        each = zip(self.cached, self.entries, strict=True)
        return self.itemsize * sum((min(tokens, most) if most else tokens) * entries for most, entries in each)

    def pass_bytes(self, tokens: int) -> int:
        """The most bytes that a pass over `tokens` tokens takes beside weights, cache and logits."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        # The residual stream, its normed copy and the layer's addition to it; in the MLP: gate, up and their product.
        entries = 3 * self.d_model + max(3 * self.widest, attention + self.d_model)
        mask = self.itemsize * tokens  # in floats, one row for each token
        norm = 2 * FLOAT32 * self.d_model  # norms are computed in float32
        margin = _RECURRENT_MARGIN if self.recurrent else _MARGIN
        return int(margin * tokens * (entries * self.itemsize + norm + mask + self.scores * tokens))

    def logits_bytes(self) -> int:
        """Bytes of one position's logits: in the model's dtype, in float32, and their log-softmax."""
        return self.vocabulary * (self.itemsize + 2 * FLOAT32)


def row_bytes(shape: Shape, operation: str, prompt: int, response: int) -> int:
    """Bytes one row takes in `operation` (see `BatchSizes`); `prompt` and `response` in tokens."""
    passed = shape.pass_bytes(prompt) + shape.logits_bytes()
    if operation == "residuals":
        return passed + (shape.n_layers + 1) * shape.d_model * (shape.itemsize + FLOAT32)
    if operation == "prefill":
        return passed + shape.cache_bytes(prompt)
    # A layer's cache is copied when it grows.
    growing = (prompt + response) * shape.cache_bytes_per_token
    return passed + shape.cache_bytes(prompt + response) + growing


def learning_bytes(shape: Shape, tokens: int, learned: int, *, checkpointing: bool) -> int:
    """Bytes of one row of `tokens` tokens in a forward and backward pass, with the logits of its `learned` last tokens.

    With `checkpointing`, every layer keeps only its input, and one layer at a time its activations.
    """
    layers = shape.n_layers + _ACTIVATIONS if checkpointing else shape.n_layers * _ACTIVATIONS
    return shape.itemsize * tokens * shape.d_model * layers + 4 * FLOAT32 * learned * shape.vocabulary


def kept_bytes(shape: Shape, resume_layers: int, harmful: int, harmless: int, prompt: int) -> int:
    """The most bytes that the trial engine keeps: hidden states at `resume_layers` layers, and the harmful prompts' cache."""
    hidden = resume_layers * (harmful + harmless) * prompt * shape.d_model * shape.itemsize
    return hidden + harmful * shape.cache_bytes(prompt)


def visited_experts(config: Any) -> int:
    """Number of routed experts that a token visits; 0 if there are none."""
    return next((found for name in _VISITED if (found := _largest(_field(config, name)))), 0)


def _cached_tokens(config: Any) -> list[int]:
    """Per layer, the most tokens whose keys and values are kept; 0: all."""
    window, chunk = (_largest(_field(config, name)) for name in ("sliding_window", "attention_chunk_size"))
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [_most_tokens(kind, window, chunk) for kind in kinds]


def _most_tokens(kind: str, window: int, chunk: int) -> int:
    """The most tokens that a layer of this kind keeps; 0 means all, as for every kind whose name says nothing else."""
    if "sliding" in kind:
        return window
    if "chunked" in kind:
        return chunk
    return _STATE if any(word in kind for word in _FIXED) else 0


def _field(config: Any, name: str) -> Any:
    """A field of a config, None if it has no such field; of one that differs from layer to layer, the list of its values.

    Where layers differ, `transformers` 5.23 raises an error of its own for the field of the whole model.
    """
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _by_layer(config: Any, name: str) -> list[int]:
    """A number of every layer; 0 where the config doesn't name it. Of a list that isn't by layer the largest one counts."""
    value, n_layers = _field(config, name), config.num_hidden_layers
    if isinstance(value, Sequence) and len(value) == n_layers:
        return [each or 0 for each in value]
    return [_largest(value)] * n_layers


def _largest(value: Any) -> int:
    return max((each or 0 for each in value), default=0) if isinstance(value, Sequence) else value or 0
