"""Greedy decoding in which settled rows leave the batch and drafts save passes.

Knows tokens, no text: a `StoppingRule` says which rows are settled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
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

# Passes between two looks at the new tokens. A look costs text work and, on a GPU, a wait for the device; a row that
# was settled meanwhile costs up to this many passes less one.
LOOK_EVERY = 4
# Rows leave once this share of the batch is settled: leaving copies the cache of all others.
LEAVING_SHARE = 1 / 8
# Tokens of a row that one pass may decide, and the bytes that logits of so many may take.
BLOCK = 8
BLOCK_BYTES = 256 << 20
# Share of the cache's columns that may be holes before they are closed, which copies the cache.
HOLES = 1 / 4


class StoppingRule(Protocol):
    """Looks at new tokens."""

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """Take the next tokens of a row; whether the row is settled. Not called again for a settled row."""

    @property
    def satisfied(self) -> bool:
        """Whether decoding may end although rows are left."""


@dataclass
class Decoding:
    """n rows in the middle of their responses.

    `rows`: their numbers. `said`: the tokens of each so far, all of which were fed. `logits` (n, vocabulary) of the next
    token. `cache`, and `mask` (n, C) over its columns: rejected drafts leave holes. `prompt` (n, W): the prompts' tokens,
    as logits processors see them. `settled`: places in `rows` that are done.
    """

    rows: list[int]
    said: list[list[int]]
    logits: Tensor
    cache: Cache
    mask: Tensor
    prompt: Tensor
    settled: set[int]

    @property
    def open(self) -> bool:
        """Whether a row is left."""
        return len(self.settled) < len(self.rows)

    @property
    def count(self) -> int:
        """The fewest tokens that an open row has."""
        return min((len(said) for place, said in enumerate(self.said) if place not in self.settled), default=0)

    def whole(self) -> Tensor:
        """All tokens (n, W + count) of rows that are equally far."""
        said = torch.tensor(self.said, dtype=self.prompt.dtype, device=self.prompt.device)
        return torch.cat([self.prompt, said.reshape(len(self.rows), -1)], dim=1)

    @property
    def holes(self) -> float:
        """Share of the columns that no row needs if all move to the right."""
        return 1 - int(self.mask.sum(dim=1).max()) / self.mask.shape[1]

    def leave(self) -> None:
        """Take settled rows out."""
        self._select([place for place in range(len(self.rows)) if place not in self.settled], closing=False)

    def close(self, *, leaving: bool) -> None:
        """Close all holes, so that pads stand at the left only; and take settled rows out."""
        self._select([place for place in range(len(self.rows)) if not (leaving and place in self.settled)], closing=True)

    def _select(self, places: Sequence[int], *, closing: bool) -> None:
        stay = torch.tensor(places, dtype=torch.long, device=self.mask.device)
        self.rows = [self.rows[place] for place in places]
        self.said = [self.said[place] for place in places]
        self.settled = {new for new, place in enumerate(places) if place in self.settled}
        self.mask, self.prompt, self.logits = self.mask[stay], self.prompt[stay], self.logits[stay]
        columns = self.mask.argsort(dim=1, stable=True)[:, -int(self.mask.sum(dim=1).max()) :] if closing else None
        for layer in self.cache.layers:  # one after the other: two whole caches would not fit where one just does
            if columns is None:
                layer.reorder_cache(stay)  # type: ignore[arg-type]
            else:
                take_columns(layer, stay, columns)
        if columns is not None:
            self.mask = self.mask.gather(1, columns)


def join(parts: Sequence[Decoding]) -> Decoding:
    """All rows of several decodings of one layout. The parts may not be used any more."""
    if len(parts) == 1:
        return parts[0]
    rows: list[int] = []
    settled: set[int] = set()
    for part in parts:
        settled |= {len(rows) + place for place in part.settled}
        rows += part.rows
    missing = [max(part.mask.shape[1] for part in parts) - part.mask.shape[1] for part in parts]
    layers = []
    for index in range(len(parts[0].cache.layers)):
        same = [part.cache.layers[index] for part in parts]
        layers.append(merge_layer([widened(layer, columns) for layer, columns in zip(same, missing, strict=True)]))
        for part in parts:
            part.cache.layers[index] = None  # type: ignore[call-overload] # frees it before the next one is copied
    cache = with_layers(parts[0].cache, layers)
    mask = torch.cat([pad(part.mask, (columns, 0)) for part, columns in zip(parts, missing, strict=True)])
    logits, prompt = (torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "prompt"))
    return Decoding(rows, [said for part in parts for said in part.said], logits, cache, mask, prompt, settled)


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
        holes: float = HOLES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._model: Any = model
        self._passes = passes
        self._config = config
        self._leaving = leaving
        self._check = check
        self._holes = holes
        self._block_bytes = block_bytes

    def __call__(self, rows: Decoding, limit: int, length: int, watch: StoppingRule, drafts: Drafts | None = None) -> None:
        """Decode until every row is settled or has `length` tokens, or `watch` is satisfied.

        `limit`: the number of tokens that no response exceeds; with `length` below it, decoding may go on later. With
        `drafts`, several tokens of a row are decided by one pass; not where processors must see every token first.
        """
        processors = self.processors(rows, limit)
        if drafts is None or processors:
            self._in_steps(rows, processors, limit, length, watch)
        else:
            self._in_blocks(rows, limit, length, watch, drafts)

    def _in_steps(self, rows: Decoding, processors: LogitsProcessorList, limit: int, length: int, watch: StoppingRule) -> None:
        """One token of every row a pass."""
        whole = rows.whole()
        count = len(rows.said[0])
        unseen: list[Tensor] = []
        while count < length:
            logits = processors(whole, rows.logits.float()) if processors else rows.logits  # type: ignore[arg-type]
            tokens = logits.argmax(dim=-1)[:, None]
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

    def _in_blocks(self, rows: Decoding, limit: int, length: int, watch: StoppingRule, drafts: Drafts) -> None:
        """A pass feeds each row's next token and a draft of what follows; the part the model agrees with is kept."""
        new: list[list[int]] = [[] for _ in rows.rows]
        while rows.open:
            for tokens, token in zip(new, rows.logits.argmax(dim=-1).tolist(), strict=True):
                tokens.append(token)
            self._check()
            self._look(rows, new, watch)
            if watch.satisfied or not rows.open:
                return
            if self._leaves(rows) or rows.holes > self._holes:
                rows.close(leaving=self._leaving)
            pauses = rows.count >= length  # then nothing may be left unseen
            proposed = [() if pauses else self._draft(rows, place, limit, drafts) for place in range(len(rows.rows))]
            width = drafts.width(proposed)
            proposed = [draft[: width - 1] for draft in proposed]
            new = self._checked(rows, [[said[-1], *draft] for said, draft in zip(rows.said, proposed, strict=True)])
            drafts.score(proposed, list(map(len, new)))
            if pauses:
                return

    def _draft(self, rows: Decoding, place: int, limit: int, drafts: Drafts) -> Sequence[int]:
        said = rows.said[place]
        most = min(_block(rows.logits, self._block_bytes), limit - len(said)) - 1
        return drafts.propose(rows.rows[place], said, most) if most > 0 and place not in rows.settled else ()

    def _checked(self, rows: Decoding, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
        """Feed a token and a draft of each row. What is right of each draft."""
        logits = self._feed_blocks(rows, blocks)
        right = []
        for block, chosen in zip(blocks, logits.argmax(dim=-1).tolist(), strict=True):
            wrong = (place for place, token in enumerate(block[1:]) if token != chosen[place])
            right.append(list(block[1 : 1 + next(wrong, len(block))]))
        self._hold(rows, logits, [1 + len(draft) for draft in right])
        return right

    def forced(self, rows: Decoding, tokens: Tensor, *, in_blocks: bool = False) -> Tensor:
        """Raw logits (n, T, vocabulary) before each of `tokens` (n, T), with which the rows go on whatever they choose.

        `in_blocks`: one or two tokens a pass, with a wrong draft after them.
        """
        forced, n_tokens = tokens.tolist(), tokens.shape[1]
        found = [[logits] for logits in rows.logits]
        at = [0] * len(forced)
        while min(at) < n_tokens:
            held, blocks = [], []
            for place, (row, start) in enumerate(zip(forced, at, strict=True)):
                right = row[start : start + 1 + (in_blocks and place % 2)]
                held.append(len(right))
                blocks.append([*right, *([row[0]] if in_blocks or not right else [])])
            logits = self._feed_blocks(rows, blocks)
            self._hold(rows, logits, held)
            for place, length in enumerate(held):
                found[place] += logits[place, :length]
                at[place] += length
        for said, row in zip(rows.said, forced, strict=True):
            said.extend(row)
        return torch.stack([torch.stack(row[:n_tokens]) for row in found])

    def widen(self, rows: Decoding) -> None:
        """Feed every row a token that doesn't count: a hole."""
        logits = self._feed_blocks(rows, [said[-1:] or [0] for said in rows.said])
        self._hold(rows, logits, [0] * len(rows.rows))

    def _feed_blocks(self, rows: Decoding, blocks: Sequence[Sequence[int]]) -> Tensor:
        """Feed blocks of unequal lengths; logits (n, B, vocabulary) of all their places."""
        width = max(map(len, blocks))
        ids = [[*block, *([block[0]] * (width - len(block)))] for block in blocks]
        fed = [[1] * len(block) + [0] * (width - len(block)) for block in blocks]
        device = rows.mask.device
        return self._feed(rows, torch.tensor(ids, device=device), torch.tensor(fed, device=device))

    def _feed(self, rows: Decoding, ids: Tensor, fed: Tensor) -> Tensor:
        rows.mask = torch.cat([rows.mask, fed], dim=1)
        logits, cache = self._passes(ids, rows.mask, rows.cache, last=ids.shape[1])
        assert cache is not None
        rows.cache = cache
        return logits

    def _hold(self, rows: Decoding, logits: Tensor, held: Sequence[int]) -> None:
        """Of what was fed last, only the first tokens of each row count; maybe none."""
        width = logits.shape[1]
        counts = torch.tensor(held, device=logits.device)
        rows.mask[:, -width:] = (torch.arange(width, device=logits.device) < counts[:, None]).to(rows.mask.dtype)
        latest = logits[torch.arange(len(held), device=logits.device), (counts - 1).clamp_min(0)]
        rows.logits = torch.where(counts[:, None] > 0, latest, rows.logits)

    def _leaves(self, rows: Decoding) -> bool:
        return self._leaving and len(rows.settled) >= LEAVING_SHARE * len(rows.rows)

    def _look(self, rows: Decoding, new: Sequence[Sequence[int]], watch: StoppingRule) -> None:
        for place, (row, tokens) in enumerate(zip(rows.rows, new, strict=True)):
            rows.said[place].extend(tokens)
            if place not in rows.settled and watch.look(row, tokens):
                rows.settled.add(place)

    def processors(self, rows: Decoding, limit: int) -> LogitsProcessorList:
        """As `generate` makes them: repetition penalty, suppressed tokens and the like. Some know each row's prompt."""
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
        return processors


def _block(logits: Tensor, block_bytes: int) -> int:
    """Tokens of a row that a pass may decide, given logits (n, vocabulary)."""
    return max(1, min(BLOCK, block_bytes // (logits.numel() * logits.element_size())))
