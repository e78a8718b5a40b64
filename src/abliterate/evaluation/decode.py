"""Greedy decoding in which settled rows leave the batch. Knows tokens, no text: a `Watch` says which rows are settled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from abliterate.evaluation.passes import Passes, merge_layer, with_layers

# Passes between two looks at the new tokens. A look costs text work and, on a GPU, a wait for the device; a row that
# was settled meanwhile costs up to this many passes less one.
LOOK_EVERY = 4
# Rows leave once this share of the batch is settled: leaving copies the cache of all others.
LEAVING_SHARE = 1 / 8


class Watch(Protocol):
    """Looks at new tokens."""

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """Take the next tokens of a row; whether the row is settled. Not called again for a settled row."""

    @property
    def satisfied(self) -> bool:
        """Whether decoding may end although rows are left."""


@dataclass
class Decoding:
    """Rows in the middle of their responses; all have `count` tokens so far.

    `rows`: their numbers. `logits` (n, vocabulary) of the next token, `cache`, `mask` (n, W + count), and `whole`
    (n, W + count): all tokens, as logits processors see them. `settled`: places in `rows` that are done.
    """

    rows: list[int]
    logits: Tensor
    cache: Cache
    mask: Tensor
    whole: Tensor
    count: int
    settled: set[int]

    @property
    def open(self) -> bool:
        """Whether a row is left."""
        return len(self.settled) < len(self.rows)

    def append(self, tokens: Tensor) -> None:
        """One more token for each row."""
        self.whole = torch.cat([self.whole, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens[:, None])], dim=1)
        self.count += 1

    def leave(self) -> None:
        """Take settled rows out."""
        places = [place for place in range(len(self.rows)) if place not in self.settled]
        stay = torch.tensor(places, dtype=torch.long, device=self.mask.device)
        self.rows = [self.rows[place] for place in places]
        self.settled = set()
        for layer in self.cache.layers:  # one after the other: two whole caches would not fit where one just does
            layer.reorder_cache(stay)  # type: ignore[arg-type]
        self.mask, self.whole, self.logits = self.mask[stay], self.whole[stay], self.logits[stay]


def join(parts: Sequence[Decoding]) -> Decoding:
    """All rows of several decodings of one layout that are equally far. The parts may not be used any more."""
    if len(parts) == 1:
        return parts[0]
    assert len({(part.count, part.mask.shape[1]) for part in parts}) == 1
    rows: list[int] = []
    settled: set[int] = set()
    for part in parts:
        settled |= {len(rows) + place for place in part.settled}
        rows += part.rows
    layers = []
    for index in range(len(parts[0].cache.layers)):
        layers.append(merge_layer([part.cache.layers[index] for part in parts]))
        for part in parts:
            part.cache.layers[index] = None  # type: ignore[call-overload] # frees it before the next one is copied
    cache = with_layers(parts[0].cache, layers)
    logits, mask, whole = (torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "mask", "whole"))
    return Decoding(rows, logits, cache, mask, whole, parts[0].count, settled)


class Decoder:
    """Continues prefilled rows, as `generate` would with `config`."""

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        config: GenerationConfig,
        *,
        leaving: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._model: Any = model
        self._passes = passes
        self._config = config
        self._leaving = leaving
        self._check = check

    def __call__(self, rows: Decoding, limit: int, length: int, watch: Watch) -> None:
        """Decode until every row is settled or has `length` tokens, or `watch` is satisfied.

        `limit`: the number of tokens that no response exceeds; with `length` below it, decoding may go on later.
        """
        processors = self.processors(rows, limit)
        unseen: list[Tensor] = []
        while rows.count < length:
            logits = processors(rows.whole, rows.logits.float()) if processors else rows.logits  # type: ignore[arg-type]
            tokens = logits.argmax(dim=-1)
            rows.append(tokens)
            unseen.append(tokens)
            if len(unseen) == LOOK_EVERY or rows.count == length:
                self._check()
                self._look(rows, torch.stack(unseen, dim=1), watch)
                unseen.clear()
                if watch.satisfied or not rows.open or rows.count == limit:
                    return
                if self._leaving and len(rows.settled) >= LEAVING_SHARE * len(rows.rows):
                    rows.leave()
                    tokens = rows.whole[:, -1]
                    processors = self.processors(rows, limit)
            rows.logits, cache = self._passes(tokens[:, None], rows.mask, rows.cache)
            assert cache is not None
            rows.cache = cache

    def forced(self, rows: Decoding, tokens: Tensor) -> Tensor:
        """Raw logits (n, T, vocabulary) before each of `tokens` (n, T), with which the rows go on whatever they choose."""
        logits = []
        for step in range(tokens.shape[1]):
            logits.append(rows.logits)
            rows.append(tokens[:, step])
            rows.logits, _ = self._passes(tokens[:, step : step + 1], rows.mask, rows.cache)
        return torch.stack(logits, dim=1)

    def _look(self, rows: Decoding, new: Tensor, watch: Watch) -> None:
        for place, (row, tokens) in enumerate(zip(rows.rows, new.tolist(), strict=True)):
            if place not in rows.settled and watch.look(row, tokens):
                rows.settled.add(place)

    def processors(self, rows: Decoding, limit: int) -> LogitsProcessorList:
        """As `generate` makes them: repetition penalty, suppressed tokens and the like. Some know each row's prompt."""
        prompt = rows.whole[:, : rows.whole.shape[1] - rows.count]
        config = copy.deepcopy(self._config)
        config.max_new_tokens, config.max_length = limit, prompt.shape[1] + limit
        self._model._prepare_special_tokens(config, True, device=prompt.device)
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=prompt.shape[1],
            encoder_input_ids=prompt,
            device=str(prompt.device),
            model_kwargs={},
        )
        assert isinstance(processors, LogitsProcessorList)
        return processors
