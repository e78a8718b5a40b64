"""Decoding in which finished rows leave the batch and drafts save passes.

This module handles tokens only; a `StoppingRule` reads the text and decides which rows are finished.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

from abliterate.engine.drafts import Drafts
from abliterate.engine.forward import Passes
from abliterate.engine.kv_cache import merge_layer, take_columns, widened, with_layers
from abliterate.engine.sampling import Drawn, TokenLogprobs
from abliterate.engine.static_cache import StaticCache

# Passes between two looks at the new tokens. A look costs text work and, on a GPU, a wait for the device; a row that
# finished in between costs up to LOOK_EVERY - 1 passes.
LOOK_EVERY = 4
# Finished rows leave once they make up this share of the batch, because leaving copies the cache of all other rows.
LEAVING_SHARE = 1 / 8
# The most tokens per row that one pass may decide, and the most bytes that their logits may take.
BLOCK = 8
BLOCK_BYTES = 256 << 20
# Holes are closed once they make up this share of the cache's columns, because closing copies the cache.
HOLES = 1 / 4


class StoppingRule(Protocol):
    """Looks at new tokens and decides when a row, or all decoding, may end."""

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """Take the next tokens of a row; return whether the row is finished. It isn't called again for a finished row."""

    @property
    def satisfied(self) -> bool:
        """Whether decoding may end although rows are unfinished."""


@dataclass
class Decoding:
    """n rows in the middle of their responses.

    `rows` are the numbers of their prompts. `generated` holds each row's tokens so far, all of which were fed. `logits`
    (n, vocabulary) are those of the next token. `mask` (n, C) covers the columns of `cache`; rejected drafts leave holes in it.
    `prompt` (n, W) are the prompts' tokens as logits processors see them. `cached` counts the columns of each row that `mask`
    doesn't hide, so that nothing waits for the device to know it. `finished` holds the indices in `rows` that are done. While
    the rows are in `static` buffers, these stand for `cache` and `mask`, which hold nothing. With `uniform` (n, T) on the CPU,
    tokens are drawn by these numbers (`Drawn`) and are not the likeliest ones, and `noted` gets their log-probabilities.
    """

    rows: list[int]
    generated: list[list[int]]
    logits: Tensor
    cache: Cache
    mask: Tensor
    prompt: Tensor
    cached: list[int]
    finished: set[int]
    static: StaticCache | None = None
    uniform: Tensor | None = None
    noted: TokenLogprobs | None = None

    @property
    def open(self) -> bool:
        """Whether a row is unfinished."""
        return len(self.finished) < len(self.rows)

    @property
    def count(self) -> int:
        """The fewest tokens that an unfinished row has."""
        return min((len(tokens) for index, tokens in enumerate(self.generated) if index not in self.finished), default=0)

    def whole(self) -> Tensor:
        """All tokens (n, W + count) of rows that are equally far."""
        generated = torch.tensor(self.generated, dtype=self.prompt.dtype, device=self.prompt.device)
        return torch.cat([self.prompt, generated.reshape(len(self.rows), -1)], dim=1)

    @property
    def holes(self) -> float:
        """The share of columns that no row needs once all rows are moved to the right."""
        return 1 - max(self.cached) / self.mask.shape[1]

    def leave(self) -> None:
        """Take finished rows out of the batch."""
        self._select([index for index in range(len(self.rows)) if index not in self.finished], closing=False)

    def close(self, *, leaving: bool) -> None:
        """Close all holes, so that pads stand at the left only; if `leaving`, also take finished rows out."""
        self._select([index for index in range(len(self.rows)) if not (leaving and index in self.finished)], closing=True)

    def _select(self, kept: Sequence[int], *, closing: bool) -> None:
        stay = torch.tensor(kept, dtype=torch.long, device=self.mask.device)
        self.rows = [self.rows[index] for index in kept]
        self.generated = [self.generated[index] for index in kept]
        self.cached = [self.cached[index] for index in kept]
        self.uniform = None if self.uniform is None else self.uniform[list(kept)]
        self.finished = {new for new, index in enumerate(kept) if index in self.finished}
        self.prompt, self.logits = self.prompt[stay], self.logits[stay]
        if self.static is not None:
            self.static.keep(stay)
            return
        self.mask = self.mask[stay]
        columns = self.mask.argsort(dim=1, stable=True)[:, -max(self.cached) :] if closing else None
        if columns is None:
            for layer in self.cache.layers:
                layer.reorder_cache(stay)  # type: ignore[arg-type]
        else:
            take_columns(self.cache.layers, stay, columns)
            self.mask = self.mask.gather(1, columns)


def join(decodings: Sequence[Decoding]) -> Decoding:
    """All rows of several greedy decodings of one layout. The given decodings must not be used afterwards."""
    if len(decodings) == 1:
        return decodings[0]
    rows: list[int] = []
    finished: set[int] = set()
    for decoding in decodings:
        finished |= {len(rows) + index for index in decoding.finished}
        rows += decoding.rows
    missing = [max(decoding.mask.shape[1] for decoding in decodings) - decoding.mask.shape[1] for decoding in decodings]
    layers = []
    for index in range(len(decodings[0].cache.layers)):
        layers_at_index = [decoding.cache.layers[index] for decoding in decodings]
        layers.append(merge_layer([widened(layer, columns) for layer, columns in zip(layers_at_index, missing, strict=True)]))
        for decoding in decodings:
            decoding.cache.layers[index] = None  # type: ignore[call-overload] # frees it before the next one is copied
    cache = with_layers(decodings[0].cache, layers)
    mask = torch.cat([pad(decoding.mask, (columns, 0)) for decoding, columns in zip(decodings, missing, strict=True)])
    logits, prompt = (torch.cat([getattr(decoding, name) for decoding in decodings]) for name in ("logits", "prompt"))
    generated = [tokens for decoding in decodings for tokens in decoding.generated]
    cached = [count for decoding in decodings for count in decoding.cached]
    return Decoding(rows, generated, logits, cache, mask, prompt, cached, finished)


class Decoder:
    """Continues prefilled rows as `generate` would with `config`.

    With `static` buffers the rows are decoded in them, and nothing is drafted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        passes: Passes,
        config: GenerationConfig,
        *,
        leaving: bool = True,
        check: Callable[[], None] = lambda: None,
        holes: float = HOLES,
        block_bytes: int = BLOCK_BYTES,
        static: StaticCache | None = None,
    ) -> None:
        self._model: Any = model
        self._passes = passes
        self._config = config
        self._leaving = leaving
        self._check = check
        self._holes = holes
        self._block_bytes = block_bytes
        self._static = static

    def __call__(self, rows: Decoding, limit: int, length: int, watch: StoppingRule, drafts: Drafts | None = None) -> None:
        """Decode until every row is finished or has `length` tokens, or `watch` is satisfied.

        No response exceeds `limit` tokens; with `length` below it, decoding may continue later. With `drafts`, one pass
        decides several tokens of a row, unless logits processors must see every token first.
        """
        processors = self.processors(rows, limit)
        if self._static is not None:
            with self._buffered(rows, limit - len(rows.generated[0])):
                self._in_steps(rows, processors, limit, length, watch)
                if rows.open and rows.count < limit and not watch.satisfied:
                    self._give_back(rows)
        elif drafts is None or processors:
            self._in_steps(rows, processors, limit, length, watch)
        else:
            self._in_blocks(rows, limit, length, watch, drafts)

    def _in_steps(self, rows: Decoding, processors: LogitsProcessorList, limit: int, length: int, watch: StoppingRule) -> None:
        """Each pass decides one token of every row."""
        whole = rows.whole()
        count = len(rows.generated[0])
        unseen: list[Tensor] = []
        while count < length:
            logits = processors(whole, rows.logits.float()) if processors else rows.logits  # type: ignore[arg-type]
            tokens = logits.argmax(dim=-1)[:, None]
            if rows.noted is not None:
                rows.noted.note(rows.rows, rows.logits, tokens)
            whole = torch.cat([whole, tokens], dim=1)
            unseen.append(tokens)
            count += 1
            if len(unseen) == LOOK_EVERY or count == length:
                self._check()
                self._look(rows, torch.cat(unseen, dim=1).tolist(), watch)
                unseen.clear()
                if watch.satisfied or not rows.open or count == limit:
                    return
                if self._leaves(rows):
                    rows.leave()
                    whole = rows.whole()
                    tokens = whole[:, -1:]
                    processors = self.processors(rows, limit)
            rows.logits = self._feed(rows, tokens, torch.ones_like(tokens))[:, -1]
            rows.cached = [columns + 1 for columns in rows.cached]

    def _in_blocks(self, rows: Decoding, limit: int, length: int, watch: StoppingRule, drafts: Drafts) -> None:
        """Each pass feeds every row's next token and a draft after it, and keeps the part that the model agrees with."""
        new = [[token] for token in rows.logits.argmax(dim=-1).tolist()]
        while rows.open:
            self._check()
            self._look(rows, new, watch)
            if watch.satisfied or not rows.open:
                return
            if self._leaves(rows) or rows.holes > self._holes:
                rows.close(leaving=self._leaving)
            pauses = rows.count >= length  # a pause must leave no token unseen, so nothing is drafted before it
            proposed = [() if pauses else self._draft(rows, index, limit, drafts) for index in range(len(rows.rows))]
            width = drafts.width(proposed)
            proposed = [draft[: width - 1] for draft in proposed]
            blocks = [[tokens[-1], *draft] for tokens, draft in zip(rows.generated, proposed, strict=True)]
            started = time.perf_counter()
            # A finished row may wait for others to leave. It isn't fed beyond the limit, where a table of positions may end.
            spent = {index for index in rows.finished if len(rows.generated[index]) >= limit}
            new = self._checked(rows, blocks, spent)
            drafts.times.note(len(blocks) * max(map(len, blocks)), time.perf_counter() - started)
            drafts.score(proposed, [len(tokens) - 1 for tokens in new])
            if pauses:
                return

    def _draft(self, rows: Decoding, index: int, limit: int, drafts: Drafts) -> Sequence[int]:
        generated = rows.generated[index]
        most = min(_block(rows.logits, self._block_bytes), limit - len(generated)) - 1
        return drafts.propose(rows.rows[index], generated, most) if most > 0 and index not in rows.finished else ()

    def _checked(self, rows: Decoding, blocks: Sequence[Sequence[int]], spent: Set[int]) -> list[list[int]]:
        """Feed a token and a draft of each row; return the right part of each draft, and the model's own token after it.

        Tokens of rows that are `spent` are masked. The device is waited for once.
        """
        logits = self._feed_blocks(rows, blocks, spent)
        new = []
        for block, chosen in zip(blocks, logits.argmax(dim=-1).tolist(), strict=True):
            right = next((index for index, token in enumerate(block[1:]) if token != chosen[index]), len(block) - 1)
            new.append([*block[1 : 1 + right], chosen[right]])
        self._hold(rows, logits, [0 if index in spent else len(tokens) for index, tokens in enumerate(new)])
        return new

    def forced(self, rows: Decoding, tokens: Tensor, *, in_blocks: bool = False) -> Tensor:
        """Raw logits (n, T, vocabulary) before each of `tokens` (n, T), which continue the rows whatever the model prefers.

        With `in_blocks`, each pass feeds one or two tokens of a row, and a wrong draft after them.
        """
        if in_blocks:
            return self._forced_blocks(rows, tokens)
        logits = [rows.logits]
        with self._buffered(rows, tokens.shape[1]):
            for column in tokens.unbind(dim=1):
                logits.append(self._feed(rows, column[:, None], torch.ones_like(column[:, None]))[:, -1])
            self._give_back(rows)
        rows.logits = logits.pop()
        rows.cached = [columns + tokens.shape[1] for columns in rows.cached]
        for generated, row in zip(rows.generated, tokens.tolist(), strict=True):
            generated.extend(row)
        return torch.stack(logits, dim=1)

    def _forced_blocks(self, rows: Decoding, tokens: Tensor) -> Tensor:
        forced, n_tokens = tokens.tolist(), tokens.shape[1]
        logits_by_row = [[logits] for logits in rows.logits]
        fed = [0] * len(forced)
        while min(fed) < n_tokens:
            held, blocks = [], []
            for index, (row, start) in enumerate(zip(forced, fed, strict=True)):
                right = row[start : start + 1 + index % 2]
                held.append(len(right))
                blocks.append([*right, row[0]])
            logits = self._feed_blocks(rows, blocks)
            self._hold(rows, logits, held)
            for index, length in enumerate(held):
                logits_by_row[index] += logits[index, :length]
                fed[index] += length
        for generated, row in zip(rows.generated, forced, strict=True):
            generated.extend(row)
        return torch.stack([torch.stack(row[:n_tokens]) for row in logits_by_row])

    def widen(self, rows: Decoding) -> None:
        """Feed every row a token that doesn't count, which leaves a hole."""
        logits = self._feed_blocks(rows, [tokens[-1:] or [0] for tokens in rows.generated])
        self._hold(rows, logits, [0] * len(rows.rows))

    def _feed_blocks(self, rows: Decoding, blocks: Sequence[Sequence[int]], masked: Set[int] = frozenset()) -> Tensor:
        """Feed blocks of unequal lengths; logits (n, B, vocabulary) at all their positions, meaningless for rows `masked`."""
        width = max(map(len, blocks))
        ids = [[*block, *([block[0]] * (width - len(block)))] for block in blocks]
        lengths = [0 if index in masked else len(block) for index, block in enumerate(blocks)]
        fed = [[1] * length + [0] * (width - length) for length in lengths]
        device = rows.mask.device
        return self._feed(rows, torch.tensor(ids, device=device), torch.tensor(fed, device=device))

    def _feed(self, rows: Decoding, ids: Tensor, fed: Tensor) -> Tensor:
        if rows.static is not None:
            return rows.static.feed(ids)[:, None]
        rows.mask = torch.cat([rows.mask, fed], dim=1)
        logits, cache = self._passes(ids, rows.mask, rows.cache, last=ids.shape[1])
        assert cache is not None
        rows.cache = cache
        return logits

    def _hold(self, rows: Decoding, logits: Tensor, held: Sequence[int]) -> None:
        """Mask all but the first `held` tokens (maybe none) of each row's last block."""
        width = logits.shape[1]
        counts = torch.tensor(held, device=logits.device)
        rows.mask[:, -width:] = (torch.arange(width, device=logits.device) < counts[:, None]).to(rows.mask.dtype)
        rows.cached = [cached + count for cached, count in zip(rows.cached, held, strict=True)]
        latest = logits[torch.arange(len(held), device=logits.device), (counts - 1).clamp_min(0)]
        rows.logits = torch.where(counts[:, None] > 0, latest, rows.logits)

    def _leaves(self, rows: Decoding) -> bool:
        if rows.static is not None:
            return self._leaving and rows.static.shrinks(len(rows.rows) - len(rows.finished))
        return self._leaving and len(rows.finished) >= LEAVING_SHARE * len(rows.rows)

    @contextlib.contextmanager
    def _buffered(self, rows: Decoding, more: int) -> Iterator[None]:
        """While active, the rows are in the static buffers, if there are some; at most `more` tokens will follow them."""
        if self._static is None:
            yield
            return
        try:
            self._static.take(rows.cache, rows.mask, more)
            rows.static = self._static
            yield
        finally:
            rows.static = None

    def release(self) -> bool:
        """Give up the static buffers; the next rows make their own. Whether there were any."""
        return self._static is not None and self._static.release()

    def _give_back(self, rows: Decoding) -> None:
        """Take the rows out of the static buffers, if they are in them; rows that need no more passes can be left there."""
        if rows.static is not None:
            rows.mask = rows.static.give_back(rows.cache)

    def _look(self, rows: Decoding, new: Sequence[Sequence[int]], watch: StoppingRule) -> None:
        for index, (row, tokens) in enumerate(zip(rows.rows, new, strict=True)):
            rows.generated[index].extend(tokens)
            if index not in rows.finished and watch.look(row, tokens):
                rows.finished.add(index)

    def processors(self, rows: Decoding, limit: int) -> LogitsProcessorList:
        """The processors that `generate` would use: repetition penalty, suppressed tokens and so on. Some see the prompts."""
        prompt = rows.prompt
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
        if rows.uniform is not None:
            processors.append(Drawn(rows.uniform, len(rows.generated[0])))
        return processors


def _block(logits: Tensor, block_bytes: int) -> int:
    """The most tokens per row that a pass may decide, given logits (n, vocabulary)."""
    return max(1, min(BLOCK, block_bytes // (logits.numel() * logits.element_size())))
