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

from abliterate.evaluation.passes import Passes, select_rows

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
class Started:
    """Rows after their prefill: `rows` their numbers, `logits` (n, vocabulary) of the first token, `cache`, `mask` (n, W).

    `whole` (n, W): all prompt tokens, as logits processors see them.
    """

    rows: list[int]
    logits: Tensor
    cache: Cache
    mask: Tensor
    whole: Tensor


class Decoder:
    """Continues prefilled rows up to `max_new_tokens`, as `generate` would with `config`."""

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

    def __call__(self, started: Started, max_new_tokens: int, watch: Watch, *, look_every: int = LOOK_EVERY) -> None:
        """Decode until every row is settled or has `max_new_tokens`, or `watch` is satisfied."""
        processors = self._processors(started.whole, max_new_tokens)
        batch = _Batch(started, max_new_tokens, keep_ids=bool(processors))
        logits, seen = started.logits, 0
        started.logits = started.cache = None  # type: ignore[assignment] # the batch owns them now
        for step in range(1, max_new_tokens + 1):
            tokens = self._choose(logits, batch, processors)
            batch.append(tokens)
            if step - seen == look_every or step == max_new_tokens:
                self._check()
                batch.look(watch, seen)
                seen = step
                if watch.satisfied or not batch.open or step == max_new_tokens:
                    return
                if self._leaving and len(batch.settled) >= max(1, LEAVING_SHARE * len(batch.rows)):
                    tokens = tokens[batch.leave()]
            logits, batch.cache = self._passes(tokens[:, None], batch.mask, batch.cache)

    def forced(self, started: Started, tokens: Tensor) -> Tensor:
        """Raw logits (n, T, vocabulary) when the rows continue with `tokens` (n, T), whatever they would choose."""
        batch = _Batch(started, tokens.shape[1], keep_ids=False)
        logits = [started.logits]
        for step in range(tokens.shape[1] - 1):
            batch.append(tokens[:, step])
            found, batch.cache = self._passes(tokens[:, step : step + 1], batch.mask, batch.cache)
            logits.append(found)
        return torch.stack(logits, dim=1)

    def _choose(self, logits: Tensor, batch: _Batch, processors: LogitsProcessorList) -> Tensor:
        if processors:
            logits = processors(batch.ids, logits.float())  # type: ignore[arg-type]
        return logits.argmax(dim=-1)

    def _processors(self, whole: Tensor, max_new_tokens: int) -> LogitsProcessorList:
        """As `generate` makes them: repetition penalty, suppressed tokens and the like."""
        config = copy.deepcopy(self._config)
        config.max_new_tokens, config.max_length = max_new_tokens, whole.shape[1] + max_new_tokens
        self._model._prepare_special_tokens(config, True, device=whole.device)
        processors = self._model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=whole.shape[1],
            encoder_input_ids=whole,
            device=str(whole.device),
            model_kwargs={},
        )
        assert isinstance(processors, LogitsProcessorList)
        return processors


class _Batch:
    """The rows still in the cache, their mask and new tokens."""

    def __init__(self, started: Started, room: int, *, keep_ids: bool) -> None:
        self.rows = list(started.rows)
        self.settled: set[int] = set()  # places in `rows`
        self.cache: Any = started.cache
        n, self._width = started.mask.shape
        ones = started.mask.new_ones(n, room)
        self._mask = torch.cat([started.mask, ones], dim=1)
        self._new: list[Tensor] = []
        self._ids = torch.cat([started.whole, torch.zeros_like(ones)], dim=1) if keep_ids else None
        self._count = 0

    @property
    def open(self) -> bool:
        return len(self.settled) < len(self.rows)

    @property
    def mask(self) -> Tensor:
        """(n, W + new tokens)."""
        return self._mask[:, : self._width + self._count]

    @property
    def ids(self) -> Tensor:
        """(n, W + new tokens), for logits processors."""
        assert self._ids is not None
        return self._ids[:, : self._width + self._count]

    def append(self, tokens: Tensor) -> None:
        if self._ids is not None:
            self._ids[:, self._width + self._count] = tokens
        self._new.append(tokens)
        self._count += 1

    def look(self, watch: Watch, seen: int) -> None:
        """Show the watch what is new since `seen` tokens."""
        new = torch.stack(self._new, dim=1).tolist()
        self._new.clear()
        for place, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            if place not in self.settled and watch.look(row, tokens):
                self.settled.add(place)

    def leave(self) -> Tensor:
        """Take settled rows out; the places that stay."""
        places = [place for place in range(len(self.rows)) if place not in self.settled]
        stay = torch.tensor(places, dtype=torch.long, device=self._mask.device)
        self.rows = [self.rows[place] for place in places]
        self.settled.clear()
        self.cache = select_rows(self.cache, stay)
        self._mask = self._mask[stay]
        self._ids = None if self._ids is None else self._ids[stay]
        return stay
