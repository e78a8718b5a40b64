"""Prompts through an edited model, without doing again what doesn't depend on the edit.

Owns what is kept of the base model (hidden states entering a few layers, the cache of the layers below) and the cache of
the shared prefix. Knows no responses and no scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from abliterate.evaluation.layout import Layout, Sharing, lay_out
from abliterate.evaluation.passes import Passes, merge_layer, select_layers, select_rows, with_layers


class EditState(Protocol):
    """The edit that is on the model now."""

    @property
    def version(self) -> int:
        """Another number whenever the edit is another."""

    @property
    def first_layer(self) -> int | None:
        """The lowest layer with an edited module; None where there is none."""


@dataclass
class Kept:
    """Of a pass through the base model: {layer: what enters it (n, S, d_model)}, and the cache of the lower layers."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def at(self, start: int, rows: Tensor | None = None) -> Tensor | None:
        """What enters layer `start`, for some rows."""
        hidden = self.hidden.get(start)
        return hidden if hidden is None or rows is None else hidden.index_select(0, rows.to(hidden.device))


@dataclass
class Group:
    """Prompts that are laid out together. `rows`: their numbers in the prompt set."""

    rows: list[int]
    layout: Layout
    kept: Kept = field(default_factory=Kept)
    prefix: Kept = field(default_factory=Kept)


class Prefill:
    """Prefills groups under the edit of the moment. `starts`: layers at which a pass may begin."""

    def __init__(self, passes: Passes, edits: EditState, sharing: Sharing) -> None:
        self.passes = passes
        self.sharing = sharing
        self._edits = edits
        self._prefixes: dict[bytes, Cache] = {}
        self._version = -1

    def group(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], prefix: Sequence[int], device: torch.device) -> Group:
        """Lay out the prompts with numbers `rows`, whose ids are `tokens`."""
        return Group(list(rows), lay_out(tokens, prefix, self.sharing, device))

    def keep(self, group: Group, starts: Sequence[int], batch_size: int, *, with_cache: bool) -> None:
        """Keep what the base model computes for a group; the model must carry no edit. `with_cache`: to decode from."""
        assert self._edits.first_layer is None
        starts = [start for start in starts if start > 0]
        if not starts:
            return
        top = max(starts)
        layout, parts = group.layout, []
        with self.passes.keeping(starts, group.prefix.hidden):
            cache = self._prefix(group, 0, again=True)
        group.prefix.layers = cache.layers[:top] if cache is not None else []
        hiddens: list[dict[int, Tensor]] = []
        for chunk in torch.arange(len(group.rows), device=layout.ids.device).split(batch_size):
            hiddens.append({})
            with self.passes.keeping(starts, hiddens[-1]):
                _, cache = self._suffix(group, chunk, 0, keep_cache=with_cache)
            parts.append(cache.layers[:top] if cache is not None and with_cache else [])
        group.kept.hidden = {start: torch.cat([hidden[start] for hidden in hiddens]) for start in starts}
        group.kept.layers = [merge_layer(same) for same in zip(*parts, strict=True)]

    def __call__(self, group: Group, rows: Tensor, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
        """Logits of the first response token (n, vocabulary) of some of a group's rows, and the cache after the prompts."""
        start = self._start(group)
        logits, cache = self._suffix(group, rows, start, keep_cache=keep_cache)
        if cache is None or not keep_cache:
            return logits, None
        if start:
            lower = select_layers(group.kept.layers[:start], rows)
            cache = with_layers(cache, [*lower, *cache.layers[start:]])
        return logits, cache

    def forget(self) -> None:
        """Drop the prefix caches of the current edit."""
        self._prefixes.clear()

    def _start(self, group: Group) -> int:
        first = self._edits.first_layer
        below = [start for start in group.kept.hidden if first is None or start <= first]
        return max(below, default=0)

    def _prefix(self, group: Group, start: int, *, again: bool = False) -> Cache | None:
        """The cache of the group's prefix rows under this edit; shared between groups that begin alike."""
        layout = group.layout
        if not layout.prefix_length:
            return None
        if self._version != self._edits.version:
            self.forget()
            self._version = self._edits.version
        key = layout.prefix_ids.cpu().numpy().tobytes() + layout.prefix_mask.cpu().numpy().tobytes()
        if again or key not in self._prefixes:
            with self.passes.starting_at(start, group.prefix.at(start)):
                _, cache = self.passes(layout.prefix_ids, layout.prefix_mask, None)
            assert cache is not None
            self._prefixes[key] = with_layers(cache, [*group.prefix.layers[:start], *cache.layers[start:]])
        return self._prefixes[key]

    def _suffix(self, group: Group, rows: Tensor, start: int, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
        layout = group.layout
        cache = self._prefix(group, start)
        if cache is not None:
            # Layers below `start` only tell the length of what is cached; they are not read.
            cache = select_rows(cache, layout.prefix_of[rows], first=start)
        with self.passes.starting_at(start, group.kept.at(start, rows)):
            logits, cache = self.passes(layout.ids[rows], layout.mask[rows], cache, keep_cache=keep_cache)
        return logits[:, -1], cache


def start_layers(firsts: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most `count` layers to keep hidden states at, given the first edited layers that trials are likely to have.

    Greedy: each one saves the most of what is left. Four at most: keeping all would be gigabytes at 8B (DESIGN §5.2).
    """
    chosen: list[int] = []

    def skipped(starts: Sequence[int]) -> int:
        return sum(max((start for start in starts if start <= first), default=0) for first in firsts)

    while len(chosen) < count:
        best = max(set(firsts) | {0}, key=lambda start: (skipped([*chosen, start]), -start))
        if skipped([*chosen, best]) <= skipped(chosen):
            break
        chosen.append(best)
    return tuple(sorted(chosen))
