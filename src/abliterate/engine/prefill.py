"""Prompts through an edited model, without doing again what doesn't depend on the edit.

Owns what is kept of the base model (hidden states entering a few layers, the cache of the layers below) and the cache of
the shared prefix. What doesn't fit isn't kept: passes then begin lower, and give the same numbers. Knows no responses and
no scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
        """Another number whenever the edit is another."""

    @property
    def first_layer(self) -> int | None:
        """The lowest layer with an edited module; None where there is none."""


@dataclass
class KeptStates:
    """Of a pass through the base model: {layer: what enters it (n, S, d_model)}, and the cache of the lower layers."""

    hidden: dict[int, Tensor] = field(default_factory=dict)
    layers: list[Any] = field(default_factory=list)

    def at(self, start: int, rows: Tensor | None = None) -> Tensor | None:
        """What enters layer `start`, for some rows."""
        hidden = self.hidden.get(start)
        return hidden if hidden is None or rows is None else hidden.index_select(0, rows.to(hidden.device))

    def nbytes(self, starts: Sequence[int]) -> int:
        """Bytes of what passes from these layers on need."""
        hidden = sum(self.hidden[start].nbytes for start in starts if start in self.hidden)
        return hidden + sum(map(layer_bytes, self.layers[: max(starts, default=0)]))

    def cut(self, starts: Sequence[int]) -> None:
        """Drop what passes from these layers on don't need."""
        self.hidden = {start: hidden for start, hidden in self.hidden.items() if start in starts}
        self.layers = self.layers[: max(starts, default=0)]

    @staticmethod
    def merged(parts: list[KeptStates], starts: Sequence[int]) -> KeptStates:
        """The rows of all parts, one after the other; `parts` is left empty, so that little is in memory twice."""
        found = KeptStates()
        for start in starts:
            same = [part.hidden.pop(start) for part in parts]
            found.hidden[start] = torch.cat(same) if len(same) > 1 else same[0]
        # Merged even where there is one part: a sliding window's layer may be a view of all columns.
        for _ in range(min(len(part.layers) for part in parts)):
            found.layers.append(merge_layer([part.layers.pop(0) for part in parts]))
        parts.clear()
        return found


@dataclass
class RowGroup:
    """Prompts that are laid out together. `rows`: their numbers in the prompt set."""

    rows: list[int]
    layout: Layout
    kept: KeptStates = field(default_factory=KeptStates)
    prefix: KeptStates = field(default_factory=KeptStates)


class Prefill:
    """Prefills groups under the edit of the moment. `starts`: layers at which a pass may begin.

    `room`: bytes that may be kept of the base model; the highest starts are dropped until that is enough. `left_out` says
    what couldn't be kept.
    """

    def __init__(self, passes: Passes, edits: EditState, sharing: Sharing) -> None:
        self.room: float = inf
        self.left_out: dict[str, str] = {}
        self._unfit = 0
        self._kept: list[RowGroup] = []
        self._dropped: set[int] = set()
        self.passes = passes
        self.sharing = sharing
        self._edits = edits
        self._prefixes: dict[bytes, Cache] = {}
        self._version = -1

    def group(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], prefix: Sequence[int], device: torch.device
    ) -> RowGroup:
        """Lay out the prompts with numbers `rows`, whose ids are `tokens`."""
        return RowGroup(list(rows), lay_out(tokens, prefix, self.sharing, device))

    def keep(self, group: RowGroup, starts: Sequence[int], batch_size: int, *, with_cache: bool) -> None:
        """Keep what the base model computes for a group; the model must carry no edit. `with_cache`: to decode from."""
        assert self._edits.first_layer is None
        starts = sorted({start for start in starts if 0 < start <= self.passes.last_start} - self._dropped)
        if not starts:
            return
        self._kept.append(group)
        whole = False
        with contextlib.suppress(torch.OutOfMemoryError), memory_errors():
            whole = self._keep(group, starts, batch_size, with_cache)
        if not whole:
            group.kept, group.prefix = KeptStates(), KeptStates()
            self.forget()
            clear_device_cache(group.layout.ids.device)
            self._unfit += len(group.rows)
            self.left_out["memory"] = (
                f"the device is out of memory for keeping what the base model computes for {self._unfit} prompts, so their "
                "passes begin at the first layer"
            )

    @property
    def nbytes(self) -> int:
        """Bytes kept of the base model."""
        return sum(part.nbytes(list(part.hidden)) for group in self._kept for part in (group.kept, group.prefix))

    def _keep(self, group: RowGroup, starts: list[int], size: int, with_cache: bool) -> bool:
        """`keep`, in chunks that are halved where they don't fit; False where one row doesn't."""
        cache = self._prefix(group, 0, keeping=starts)
        group.prefix.layers = [merge_layer([layer]) for layer in cache.layers[: max(starts)]] if cache is not None else []
        rows = torch.arange(len(group.rows), device=group.layout.ids.device)
        parts: list[KeptStates] = []
        done = 0
        while done < len(rows):
            chunk = rows[done : done + size]
            part: KeptStates | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                part = self._keep_rows(group, chunk, starts, with_cache)
            if part is None:
                clear_device_cache(rows.device)
                if len(chunk) == 1:
                    return False
                size = len(chunk) // 2
                continue
            if not parts:
                starts = self._fitting(group, starts, part, len(rows) / len(chunk))
                if not starts:
                    return True
            part.cut(starts)
            parts.append(part)
            done += len(chunk)
        group.kept = KeptStates.merged(parts, starts)
        return True

    def _keep_rows(self, group: RowGroup, rows: Tensor, starts: Sequence[int], with_cache: bool) -> KeptStates:
        part = KeptStates()
        with self.passes.keeping(starts, part.hidden):
            _, cache = self._suffix(group, rows, 0, keep_cache=with_cache)
        part.layers = cache.layers[: max(starts)] if cache is not None and with_cache else []
        return part

    def _fitting(self, group: RowGroup, starts: list[int], part: KeptStates, times: float) -> list[int]:
        """The starts for which there is room, `part` being what the group's rows take divided by `times`."""
        starts = list(starts)
        others = [kept for other in self._kept if other is not group for kept in (other.kept, other.prefix)]

        def needed() -> float:
            return part.nbytes(starts) * times + sum(kept.nbytes(starts) for kept in (group.prefix, *others))

        while starts and needed() > self.room:
            self._dropped.add(starts.pop())
            self.left_out["room"] = (
                f"the base model's states at layers {sorted(self._dropped)} take more than is left of "
                "efficiency.max_kept_mb, so no pass begins there"
            )
        for kept in (group.prefix, *others):
            kept.cut(starts)
        return starts

    def __call__(self, group: RowGroup, rows: Tensor, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
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

    def _start(self, group: RowGroup) -> int:
        first = self._edits.first_layer
        below = [start for start in group.kept.hidden if first is None or start <= first]
        return max(below, default=0)

    def _prefix(self, group: RowGroup, start: int, *, keeping: Sequence[int] = ()) -> Cache | None:
        """The cache of the group's prefix rows under this edit; shared between groups that begin alike.

        `keeping`: layers whose input is kept on the way, in `group.prefix`.
        """
        layout = group.layout
        if not layout.prefix_length:
            return None
        if self._version != self._edits.version:
            self.forget()
            self._version = self._edits.version
        key = layout.prefix_ids.cpu().numpy().tobytes() + layout.prefix_mask.cpu().numpy().tobytes()
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
        """A cache of some prefix rows, and what entered the layers `keeping`; rows that don't fit together are fed apart."""
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
        # Layers below `start` did nothing, and what is kept of them takes their place.
        merged = [merge_layer(same) for same in zip(*(cache.layers[start:] for cache in caches), strict=True)]
        return (
            with_layers(caches[0], [*caches[0].layers[:start], *merged]),
            {at: torch.cat([hidden[at] for hidden in hiddens]) for at in keeping},
        )

    def _suffix(self, group: RowGroup, rows: Tensor, start: int, *, keep_cache: bool) -> tuple[Tensor, Cache | None]:
        layout = group.layout
        cache = self._prefix(group, start)
        if cache is not None:
            # Layers below `start` only tell the length of what is cached; they are not read.
            cache = select_rows(cache, layout.prefix_of[rows], first=start)
        with self.passes.starting_at(start, group.kept.at(start, rows)):
            logits, cache = self.passes(layout.ids[rows], layout.mask[rows], cache, keep_cache=keep_cache)
        return logits[:, -1], cache


def resume_layers(firsts: Sequence[int], count: int = 4) -> tuple[int, ...]:
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
