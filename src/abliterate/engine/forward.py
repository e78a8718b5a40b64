"""One forward pass of any decoder, from any layer on, with any cache.

It uses only the forward and cache interfaces of `transformers`, so skipping layers needs no per-architecture code
(docs/design.md §5.1, §5.2).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from abliterate.engine.layout import positions
from abliterate.model.memory import memory_errors


class Passes:
    """Forward passes of `model`, whose decoder layers are `layers`."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self._model: Any = model
        self.layers = layers
        self._accepted = accepted(model)
        self.takes_positions = "position_ids" in self._accepted
        self._arity: dict[nn.Module, int] = {}
        self.last_start = last_start(model.config.get_text_config(), len(layers))

    def __call__(
        self, ids: Tensor, mask: Tensor, cache: Cache | None, *, last: int = 1, keep_cache: bool = True
    ) -> tuple[Tensor, Cache | None]:
        """Feed this model by `feed`, which says what the arguments are."""
        return feed(self._model, self._accepted, ids, mask, cache, last=last, keep_cache=keep_cache)

    @contextlib.contextmanager
    def keeping(self, resume_layers: Sequence[int], hidden: dict[int, Tensor]) -> Iterator[None]:
        """While active, a pass stores in `hidden` the input (n, S, d_model) of each layer in `resume_layers`."""

        def hook(layer: int) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering: Tensor = args[0] if args else kwargs["hidden_states"]
                hidden[layer] = entering.detach().movedim(-3, 0).clone()  # rows first: Gemma 3n has (streams, n, S, d_model)

            return keep

        handles = [self.layers[layer].register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in resume_layers]
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
        # accelerate's dispatch puts a `forward` of its own on the instance; it must be restored.
        own_forwards = [layer.__dict__.get("forward") for layer in skipped]
        handle = self.layers[start].register_forward_pre_hook(replace, with_kwargs=True)
        try:
            for layer in skipped:
                layer.forward = self._identity(layer)
            yield
        finally:
            handle.remove()
            for layer, forward in zip(skipped, own_forwards, strict=True):
                if forward is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = forward

    @contextlib.contextmanager
    def observing(self) -> Iterator[None]:
        """While active, a pass notes whether layers return a tensor or a tuple, because the identity must return the same."""

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


def accepted(model: Any) -> frozenset[str]:
    """The names of the arguments that the model's forward pass takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def feed(
    model: Any, takes: Set[str], ids: Tensor, mask: Tensor, cache: Cache | None, *, last: int = 1, keep_cache: bool = True
) -> tuple[Tensor, Cache | None]:
    """Feed `ids` (n, S) after `cache` with `mask` (n, P+S) to a model that `takes` these (`accepted`).

    Returns the logits (n, last, vocabulary) of the last positions, and the cache. Without a given cache, the model makes one of
    its own class.
    """
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": keep_cache}
    name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24, which warns of the old name
    if cache is not None:
        kwargs[name] = cache
    if "position_ids" in takes:
        kwargs["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    if "logits_to_keep" in takes:
        kwargs["logits_to_keep"] = last
    with memory_errors():
        output = model(**kwargs)
    # A model over several devices computes logits on its last one; accelerate brings them back, a model's own code may not.
    return output.logits[:, -last:].to(ids.device), getattr(output, name, None)


def last_start(config: object, n_layers: int) -> int:
    """The highest layer at which a pass may begin, because later layers may use keys and values that a lower layer computes.

    In Gemma 3n and 4 the last layers use the keys and values of the last layer of their kind that has its own.
    """
    n_own = n_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    if n_own >= n_layers:
        return n_layers - 1
    kinds: list[str] = list(getattr(config, "layer_types", None) or ["full_attention"] * n_layers)
    return min(max((index for index in range(n_own) if kinds[index] == kind), default=0) for kind in set(kinds[n_own:]))
