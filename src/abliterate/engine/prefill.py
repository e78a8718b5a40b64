"""Run prompts through an edited model without repeating the work that doesn't depend on the edit.

This module owns the kept states of the base model (the input of a few layers, and the cache of the layers below them) and the
cache of the shared prefix. States that don't fit the budget aren't kept; passes then begin at a lower layer and give the same
numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from abliterate.engine.forward import Passes
from abliterate.engine.kv_cache import layer_bytes, merge_layer, select_layers, select_rows, with_layers
from abliterate.engine.layout import Layout, Sharing, lay_out
from abliterate.model.memory import clear_device_cache, memory_errors


class EditState(Protocol):
    """The edit that is on the model now."""

    @property
    def version(self) -> int:
        """A number that changes whenever the edit changes."""

    @property
    def first_layer(self) -> int | None:
        """The lowest layer with an edited module; None without an edit."""


class NoEdit:
    """The base model's `EditState`."""

    version = 0
    first_layer = None


@dataclass
class KeptStates:
    """The kept states of a pass through the base model: {layer: its input (n, S, d_model)}, and the lower layers' cache."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def at(self, layer: int, rows: Tensor | None = None) -> Tensor | None:
        """The input of `layer` for some rows."""
        hidden = self.hidden.get(layer)
        return hidden if hidden is None or rows is None else hidden.index_select(0, rows.to(hidden.device))

    def nbytes(self, resume_layers: Sequence[int]) -> int:
        """The bytes that passes from these layers on need."""
        hidden = sum(self.hidden[layer].nbytes for layer in resume_layers if layer in self.hidden)
        return hidden + sum(map(layer_bytes, self.layers[: max(resume_layers, default=0)]))

    def cut(self, resume_layers: Sequence[int]) -> None:
        """Drop all states that passes from these layers on don't need."""
        self.hidden = {layer: hidden for layer, hidden in self.hidden.items() if layer in resume_layers}
        self.layers = self.layers[: max(resume_layers, default=0)]

    @staticmethod
    def merged(parts: list[KeptStates], resume_layers: Sequence[int]) -> KeptStates:
        """The rows of all parts, one part after the other; `parts` is emptied, so that little is in memory twice."""
        merged = KeptStates()
        for layer in resume_layers:
            inputs = [part.hidden.pop(layer) for part in parts]
            merged.hidden[layer] = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        # A single part is merged, too, because a sliding window's layer may be a view of all columns.
        for _ in range(min(len(part.layers) for part in parts)):
            merged.layers.append(merge_layer([part.layers.pop(0) for part in parts]))
        parts.clear()
        return merged


@dataclass
class RowGroup:
    """Prompts that are laid out together; `rows` are their numbers in the prompt set."""

    rows: list[int]
    layout: Layout
    kept: KeptStates = field(default_factory=KeptStates)
    prefix: KeptStates = field(default_factory=KeptStates)


class Prefill:
    """Prefills groups under the current edit. Resume layers are the layers at which a pass may begin.

    `budget_bytes` limits the kept states of the base model; the highest resume layers are dropped until they fit. `left_out`
    holds a sentence about everything that couldn't be kept.
    """

    def __init__(self, passes: Passes, edits: EditState, sharing: Sharing) -> None:
        self.budget_bytes: float = inf
        self.left_out: dict[str, str] = {}
        self._prompts_not_kept = 0
        self._kept_groups: list[RowGroup] = []
        self._kept_prefixes: dict[tuple[tuple[int, ...], ...], KeptStates] = {}  # groups that begin alike share them
        self._counted: tuple[tuple[int, ...], int, float] = ((), 0, 0.0)  # (resume layers, groups, the bytes of their rows)
        self._dropped_layers: set[int] = set()
        self.passes = passes
        self.sharing = sharing
        self._edits = edits
        self._prefixes: dict[tuple[tuple[int, ...], ...], Cache] = {}
        self._version = -1

    def group(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], prefix: Sequence[int], device: torch.device
    ) -> RowGroup:
        """Lay out the prompts numbered `rows`, whose ids are `tokens`."""
        return RowGroup(list(rows), lay_out(tokens, prefix, self.sharing, device))

    def keep(
        self,
        group: RowGroup,
        resume_layers: Sequence[int],
        batch_size: int,
        *,
        with_cache: bool,
        kept: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Keep the base model's states for a group; the model must carry no edit. Decoding needs them `with_cache`.

        `kept` is called with the number of rows of each chunk that is done.
        """
        assert self._edits.first_layer is None
        resume_layers = sorted({layer for layer in resume_layers if 0 < layer <= self.passes.last_start} - self._dropped_layers)
        if not resume_layers:
            return
        self._kept_groups.append(group)
        fits = False
        with contextlib.suppress(torch.OutOfMemoryError), memory_errors():
            fits = self._keep(group, resume_layers, batch_size, with_cache, kept)
        if not fits:
            group.kept, group.prefix = KeptStates(), KeptStates()
            used = {id(other.prefix) for other in self._kept_groups}
            self._kept_prefixes = {key: prefix for key, prefix in self._kept_prefixes.items() if id(prefix) in used}
            self.forget()
            clear_device_cache(group.layout.ids.device)
            self._prompts_not_kept += len(group.rows)
            self.left_out["memory"] = (
                "the device is out of memory for keeping the base model's states for "
                f"{self._prompts_not_kept} prompts, so their passes begin at the first layer"
            )

    @property
    def nbytes(self) -> int:
        """The bytes of the base model's states that are kept."""
        kept_states = [*(group.kept for group in self._kept_groups), *self._kept_prefixes.values()]
        return sum(kept.nbytes(list(kept.hidden)) for kept in kept_states)

    def _keep(
        self, group: RowGroup, resume_layers: list[int], size: int, with_cache: bool, kept: Callable[[int], None]
    ) -> bool:
        """`keep` in chunks that are halved if they don't fit; False if a single row doesn't fit."""
        key = group.layout.prefix_key
        if key in self._kept_prefixes:
            group.prefix = self._kept_prefixes[key]
        elif (cache := self._prefix(group, 0, keeping=resume_layers)) is not None:
            group.prefix.layers = [merge_layer([layer]) for layer in cache.layers[: max(resume_layers)]]
            self._kept_prefixes[key] = group.prefix
        rows = torch.arange(len(group.rows), device=group.layout.ids.device)
        states_by_chunk: list[KeptStates] = []
        done = 0
        while done < len(rows):
            chunk = rows[done : done + size]
            states: KeptStates | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                states = self._keep_rows(group, chunk, resume_layers, with_cache)
            if states is None:
                clear_device_cache(rows.device)
                if len(chunk) == 1:
                    return False
                size = len(chunk) // 2
                continue
            if not states_by_chunk:
                resume_layers = self._fitting(group, resume_layers, states, len(rows) / len(chunk))
                if not resume_layers:
                    return True
            states.cut(resume_layers)
            states_by_chunk.append(states)
            done += len(chunk)
            kept(len(chunk))
        group.kept = KeptStates.merged(states_by_chunk, resume_layers)
        return True

    def _keep_rows(self, group: RowGroup, rows: Tensor, resume_layers: Sequence[int], with_cache: bool) -> KeptStates:
        kept = KeptStates()
        with self.passes.keeping(resume_layers, kept.hidden):
            _, cache = self._suffix(group, rows, 0, keep_cache=with_cache)
        kept.layers = cache.layers[: max(resume_layers)] if cache is not None and with_cache else []
        return kept

    def _fitting(self, group: RowGroup, resume_layers: list[int], states: KeptStates, times: float) -> list[int]:
        """The resume layers that fit the budget if the group's rows take `times` the bytes of `states`."""
        resume_layers, before = list(resume_layers), len(self._dropped_layers)

        def needed() -> float:
            prefixes = sum(kept.nbytes(resume_layers) for kept in self._kept_prefixes.values())
            return states.nbytes(resume_layers) * times + prefixes + self._of_earlier_groups(tuple(resume_layers))

        while resume_layers and needed() > self.budget_bytes:
            self._dropped_layers.add(resume_layers.pop())
            self.left_out["budget"] = (
                f"the base model's states at layers {sorted(self._dropped_layers)} take more than the rest of "
                "efficiency.max_kept_mb, so no pass begins there"
            )
        if len(self._dropped_layers) > before:
            for kept in (*(other.kept for other in self._kept_groups), *self._kept_prefixes.values()):
                kept.cut(resume_layers)
        return resume_layers

    def _of_earlier_groups(self, resume_layers: tuple[int, ...]) -> float:
        """The bytes that all groups but the last need; those that were counted before aren't again."""
        layers, counted, total = self._counted
        if layers != resume_layers:
            counted, total = 0, 0.0
        earlier = self._kept_groups[counted:-1]
        total += sum(group.kept.nbytes(resume_layers) for group in earlier)
        self._counted = (resume_layers, counted + len(earlier), total)
        return total

    def __call__(self, group: RowGroup, rows: Tensor, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
        """The first response token's logits (n, vocabulary) for some of a group's rows, and the cache after the prompts."""
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

    def _start(self, group: RowGroup) -> int:
        first = self._edits.first_layer
        below = [start for start in group.kept.hidden if first is None or start <= first]
        return max(below, default=0)

    def _prefix(self, group: RowGroup, start: int, *, keeping: Sequence[int] = ()) -> Cache | None:
        """The cache of the group's prefix rows under this edit; groups that begin alike share it.

        The inputs of the layers in `keeping` are kept on the way, in `group.prefix`.
        """
        layout = group.layout
        if not layout.prefix_length:
            return None
        if self._version != self._edits.version:
            self.forget()
            self._version = self._edits.version
        key = layout.prefix_key
        if keeping or key not in self._prefixes:
            rows = torch.arange(len(layout.prefix_ids), device=layout.ids.device)
            cache, hidden = self._prefix_rows(group, rows, start, keeping)
            if keeping:
                group.prefix.hidden = hidden
            self._prefixes[key] = with_layers(cache, [*group.prefix.layers[:start], *cache.layers[start:]])
        return self._prefixes[key]

    def _prefix_rows(
        self, group: RowGroup, rows: Tensor, start: int, keeping: Sequence[int]
    ) -> tuple[Cache, dict[int, Tensor]]:
        """The cache of some prefix rows, and the inputs of the layers `keeping`; rows that don't fit together are fed apart."""
        layout = group.layout
        hidden: dict[int, Tensor] = {}
        cache: Cache | None = None
        try:
            with self.passes.keeping(keeping, hidden), self.passes.starting_at(start, group.prefix.at(start, rows)):
                _, cache = self.passes(layout.prefix_ids[rows], layout.prefix_mask[rows], None)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        if cache is not None:
            return cache, hidden
        hidden.clear()
        clear_device_cache(rows.device)
        parts = [self._prefix_rows(group, half, start, keeping) for half in rows.split((len(rows) + 1) // 2)]
        caches, hiddens = zip(*parts, strict=True)
        # Layers below `start` did nothing; their kept states take their place.
        merged = [merge_layer(same) for same in zip(*(cache.layers[start:] for cache in caches), strict=True)]
        return (
            with_layers(caches[0], [*caches[0].layers[:start], *merged]),
            {layer: torch.cat([hidden[layer] for hidden in hiddens]) for layer in keeping},
        )

    def _suffix(self, group: RowGroup, rows: Tensor, start: int, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
        layout = group.layout
        cache = self._prefix(group, start)
        if cache is not None:
            # Layers below `start` only tell how many tokens are cached; they are not read.
            cache = select_rows(cache, layout.prefix_of[rows], first=start)
        with self.passes.starting_at(start, group.kept.at(start, rows)):
            logits, cache = self.passes(layout.ids[rows], layout.mask[rows], cache, keep_cache=keep_cache)
        return logits[:, -1], cache


def resume_layers(firsts: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """At most `count` resume layers, given the first edited layers that trials are likely to have.

    Each layer is chosen greedily to save the most remaining work. By default there are at most four, because the states at all
    layers would take gigabytes at 8B (docs/design.md §5.2).
    """
    chosen: list[int] = []

    def skipped(layers: Sequence[int]) -> int:
        return sum(max((layer for layer in layers if layer <= first), default=0) for first in firsts)

    while len(chosen) < count:
        best = max(set(firsts) | {0}, key=lambda layer: (skipped([*chosen, layer]), -layer))
        if skipped([*chosen, best]) <= skipped(chosen):
            break
        chosen.append(best)
    return tuple(sorted(chosen))
