"""The trial engine: the reference's numbers with most of its work left out (DESIGN §5). Knows no Optuna.

Every mechanism has a switch. What a model's cache can't do is left off and said; how the numbers are made is then the
plain way, never another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from abliterate.engine.batching import batches_of_trials
from abliterate.engine.decode import BLOCK_BYTES, HOLES, Decoder, Decoding, join
from abliterate.engine.drafts import PASS_COST, Drafts
from abliterate.engine.forward import Passes
from abliterate.engine.kv_cache import is_supported, sharing_of
from abliterate.engine.layout import Sharing, shared_prefix
from abliterate.engine.prefill import EditState, Prefill, RowGroup
from abliterate.engine.reference import Progress, ReferenceEngine, end_ids, greedy_config
from abliterate.engine.stopping import StopWhenDecided, StopWhenDiverged
from abliterate.errors import TrialError
from abliterate.model.memory import memory_errors
from abliterate.scorers.base import EarlyScorer, Response
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import Prompt


class Unsupported(Exception):
    """What the engine needs of a model and can't have."""


# Rows of the first chunk beyond the r* that it takes to stop a trial: some of the hardest prompts may comply.
MARGIN = 4
# Tokens after which a chunk waits for the others: refusals are mostly confirmed by then.
PAUSE = 24


@dataclass(frozen=True)
class Pacing:
    """How the engine cuts its work into passes; no number that it returns depends on these values.

    `margin` and `pause` are explained at `MARGIN` and `PAUSE`, the others where `Decoder` and `Drafts` define their defaults.
    """

    margin: int = MARGIN
    pause: int = PAUSE
    holes: float = HOLES
    block_bytes: int = BLOCK_BYTES
    pass_cost: int = PASS_COST


PACING = Pacing()


@dataclass
class _PromptSet:
    """A prompt set as token rows: its groups, and which prompts end inside a thinking block.

    How often each prompt's response was decided, and counted: [counted, decided]. What was said before, if that helps.
    """

    groups: list[RowGroup]
    opens: list[bool]
    history: list[list[int]]
    drafts: Drafts | None

    def hardness(self, row: int) -> float:
        """Estimated share of trials in which the response counts."""
        counted, decided = self.history[row]
        return (counted + 1) / (decided + 2)


class TrialEngine:
    """Observes the model of `reference` under the edit of the moment (`edits`).

    `early`: the scorer that lets responses end early, if all scorers allow that.

    Raises:
        Unsupported: rows of the model's cache can't be selected; only the reference can be used.
    """

    def __init__(
        self,
        reference: ReferenceEngine,
        layers: torch.nn.ModuleList,
        edits: EditState,
        switches: EfficiencySettings,
        early: EarlyScorer | None,
        pacing: Pacing = PACING,
    ) -> None:
        self.reference = reference
        self.chat = reference.chat
        self.passes = Passes(reference.model, layers)
        self._switches = switches
        self._early = early
        self._pacing = pacing
        self._prefills, self._decodes = batches_of_trials(
            reference.sizes, self.chat.device, recover=switches.use_memory_recovery
        )
        able = self._examine()
        self.sharing: Sharing = able if switches.use_shared_prefix else "none"
        self.drafting = switches.use_drafts and able == "between" and self.passes.takes_positions
        self._prefill = Prefill(self.passes, edits, self.sharing)
        self.left_out = self._prefill.left_out
        self._ends = end_ids(reference.model)
        self._decode = Decoder(
            reference.model,
            self.passes,
            greedy_config(reference.model, reference.max_new_tokens),
            leaving=switches.use_settled_rows,
            check=reference.check,
            holes=pacing.holes,
            block_bytes=pacing.block_bytes,
        )
        self._sets: dict[tuple[bool, tuple[Prompt, ...]], _PromptSet] = {}
        self._prefix: list[int] = []

    @torch.inference_mode()
    def prepare(self, harmful: Sequence[Prompt], harmless: Sequence[Prompt], starts: Sequence[int], room: float = inf) -> None:
        """Lay out both sets and keep what the base model computes; the model must carry no edit.

        `starts`: layers at which a trial's passes may begin; `room`: bytes that may be kept.
        """
        self._prefill.room = room
        rows = [self.chat.token_ids(prompt) for prompt in (*harmful, *harmless)]
        self._prefix = shared_prefix(rows) if self._switches.use_shared_prefix else []
        for prompts, with_cache, batches in ((harmful, True, self._decodes), (harmless, False, self._prefills)):
            found = self._lay_out(prompts, together=with_cache)
            if self._switches.use_layer_skip:
                for group in found.groups:
                    self._prefill.keep(group, starts, batches.affordable(), with_cache=with_cache)
            self._sets[(with_cache, tuple(prompts))] = found

    @torch.inference_mode()
    def first_logprobs(self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None) -> Tensor:
        """See `ReferenceEngine.first_logprobs`: one prefill, and no cache unless the switch says so."""
        return self.some_first_logprobs(prompts, range(len(prompts)), progress)

    @torch.inference_mode()
    def some_first_logprobs(
        self, prompts: Sequence[Prompt], rows: Sequence[int], progress: Progress = lambda done, total: None
    ) -> Tensor:
        """`first_logprobs` of some rows of a prompt set, in their order."""
        keep_cache = not self._switches.use_cacheless_prefill
        found: dict[int, Tensor] = {}
        for group in self._set(prompts, together=False).groups:

            def work(places: Sequence[int], group: RowGroup = group) -> list[Tensor]:
                logits, _ = self._prefill(group, self._tensor(places), keep_cache=keep_cache)
                self.reference.check()
                return list(logits.float().log_softmax(dim=-1).unbind())

            places = [place for place, row in enumerate(group.rows) if row in set(rows)]
            done = self._prefills.run(places, work)
            found |= zip((group.rows[place] for place in places), done, strict=True)
            progress(len(found), len(prompts))
        return torch.stack([found[row] for row in rows])

    @torch.inference_mode()
    def respond(
        self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None, *, limit: int | None = None
    ) -> list[Response] | None:
        """See `ReferenceEngine.respond`. None as soon as `limit` responses count for certain, if that may stop a trial.

        Responses that are decided before they end are cut there.
        """
        limit = limit if self._early is not None and self._switches.use_certified_stop else None
        if limit is not None and limit <= 0:
            return None
        found = self._set(prompts, together=True)
        watch = StopWhenDecided(
            self.reference.reader, self._ends, self.reference.max_new_tokens, found.opens, self._early, limit
        )
        self._respond(found, self._chunks(found, limit), watch)
        progress(len(prompts), len(prompts))
        for row, counts in watch.counts.items():
            found.history[row][0] += counts
            found.history[row][1] += 1
            if found.drafts is not None:
                found.drafts.learn(row, watch.ids[row])
        return None if watch.satisfied else [watch.responses[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def raw_responses(self, prompts: Sequence[Prompt]) -> list[str]:
        """See `ReferenceEngine.raw_responses`; cut where they have diverged, which is all a shared prefix needs."""
        watch = StopWhenDiverged(self.chat, self._ends, self.reference.reader.markup)
        found = self._lay_out(prompts, together=True)
        found.drafts = None  # no response comes twice
        self._decodes.run(range(len(prompts)), lambda part: self._whole(found, part, watch))
        return [watch.text(row) for row in range(len(prompts))]

    @torch.inference_mode()
    def forced_logits(self, prompts: Sequence[Prompt], rows: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits of some rows of a prompt set, continued with `tokens` (n, T), the way responses are decoded.

        Two chunks go apart for the first T/2 tokens (n, T/2, vocabulary), are joined, and the first row leaves: then
        (n−1, T−T/2, vocabulary).
        """
        group = self._set(prompts, together=True).groups[0]
        half, cut = max(1, len(rows) // 2), tokens.shape[1] // 2
        parts = [part for part in (rows[:half], rows[half:]) if part]
        started = [self._started(group, part) for part in parts]
        self._decode.processors(started[0], tokens.shape[1])  # made as for responses: here a failure does no harm
        before = [
            self._decode.forced(part, some[:, :cut], in_blocks=self.drafting)
            for part, some in zip(started, tokens.split([len(part) for part in parts]), strict=True)
        ]
        if self.drafting and len(started) > 1:  # as after drafts: unequal widths, and holes to close
            self._decode.widen(started[0])
        together = join(started)
        if len(rows) > 1:
            together.settled = {0}
            together.leave()
        if self.drafting:
            together.close(leaving=True)
        rest = tokens[-len(together.rows) :, cut:]
        return torch.cat(before), self._decode.forced(together, rest, in_blocks=self.drafting)

    def _respond(self, found: _PromptSet, chunks: Sequence[Sequence[int]], watch: StopWhenDecided) -> None:
        """Every chunk up to where refusals have shown themselves; then what is left, together.

        So a hopeless trial ends after few rows, and long responses share their passes. Never more rows than a batch are in
        memory, waiting ones among them.
        """
        length = self.reference.max_new_tokens
        paused: list[Decoding] = []

        def begin(part: Sequence[int]) -> Sequence[int]:
            if watch.satisfied:
                return part
            if sum(len(rows.rows) for rows in paused) + len(part) > self._decodes.affordable():
                self._drain(paused, watch, found.drafts)
            watch.begin(part)  # a part that ran out of memory is done again from its start
            try:
                with memory_errors():
                    rows = self._started(found.groups[0], part)
                    self._decode(rows, length, min(self._pacing.pause, length), watch, found.drafts)
            except torch.OutOfMemoryError:
                paused.clear()  # they hold memory, and are done again below
                raise
            if rows.open and rows.count < length:
                paused.append(rows)
            return part

        for chunk in chunks:
            self._decodes.run(chunk, begin)
        self._drain(paused, watch, found.drafts)
        left = [row for chunk in chunks for row in chunk if row not in watch.responses]
        self._decodes.run(left, lambda part: part if watch.satisfied else self._whole(found, part, watch))

    def _drain(self, paused: list[Decoding], watch: StopWhenDecided, drafts: Drafts | None) -> None:
        """Waiting rows to their end. Where they run out of memory together, they are left undone."""
        length = self.reference.max_new_tokens
        try:
            if paused and not watch.satisfied:
                with memory_errors():
                    self._decode(join(paused), length, length, watch, drafts)
            paused.clear()
            return
        except torch.OutOfMemoryError:
            if not self._switches.use_memory_recovery:
                raise TrialError("the device is out of memory for the responses that are left") from None
        paused.clear()
        self._decodes.shrink(self._decodes.size)

    def _whole(self, found: _PromptSet, part: Sequence[int], watch: StopWhenDecided | StopWhenDiverged) -> Sequence[int]:
        """Rows from their start to their end, or until the watch is satisfied."""
        watch.begin(part)
        length = self.reference.max_new_tokens
        self._decode(self._started(found.groups[0], part), length, length, watch, found.drafts)
        return part

    def _started(self, group: RowGroup, places: Sequence[int]) -> Decoding:
        rows = self._tensor(places)
        logits, cache = self._prefill(group, rows, keep_cache=True)
        assert cache is not None
        said: list[list[int]] = [[] for _ in places]
        return Decoding(list(places), said, logits, cache, group.layout.mask[rows], group.layout.whole[rows], set())

    def _chunks(self, found: _PromptSet, limit: int | None) -> list[list[int]]:
        """Rows in the order in which they are tried. Where a trial may stop: hardest first, and few at first."""
        size = self._decodes.size
        rows = list(range(len(found.history)))
        first = 0
        if limit is not None:
            rows.sort(key=lambda row: -found.hardness(row))
            first = min(size, limit + self._pacing.margin)
        rest = [rows[start : start + size] for start in range(first, len(rows), size)]
        return [rows[:first], *rest] if first else rest

    def _set(self, prompts: Sequence[Prompt], *, together: bool) -> _PromptSet:
        return self._sets.get((together, tuple(prompts))) or self._lay_out(prompts, together=together)

    def _lay_out(self, prompts: Sequence[Prompt], *, together: bool) -> _PromptSet:
        """`together`: in one group, so that any rows can share a batch; else by length, which needs fewer pads."""
        tokens = [self.chat.token_ids(prompt) for prompt in prompts]
        prefix = self._prefix if all(row[: len(self._prefix)] == self._prefix for row in tokens) else []
        prefix = prefix[: min(map(len, tokens)) - 1]
        rows = list(range(len(prompts)))
        parts = [rows]
        if not together:
            rows.sort(key=lambda row: len(tokens[row]))
            size = self._prefills.size
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        device = self.chat.device
        groups = [self._prefill.group(part, [tokens[row] for row in part], prefix, device) for part in parts]
        opens = [self.reference.reader.starts_open(self.chat.tail(prompt)) for prompt in prompts]
        drafts = Drafts(len(prompts), self._pacing.pass_cost) if self.drafting and together else None
        return _PromptSet(groups, opens, [[0, 0] for _ in prompts], drafts)

    def _tensor(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(list(places), dtype=torch.long, device=self.chat.device)

    @torch.inference_mode()
    def _examine(self) -> Sharing:
        """One short pass: what the layers return, and what the model's own cache can do."""
        ids = self._tensor(self.chat.token_ids(Prompt("Hi")))[None, :]
        with self.passes.observing():
            _, cache = self.passes(ids, torch.ones_like(ids), None)
        if not is_supported(cache):
            raise Unsupported(f"rows of a {type(cache).__name__} can't be selected")
        return sharing_of(cache, self.reference.model.config.get_text_config())
