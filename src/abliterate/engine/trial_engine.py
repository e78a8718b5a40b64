"""The trial engine gives the reference's numbers and leaves out most of its work (docs/design.md §5).

Every mechanism has a switch. A mechanism that a model's cache doesn't support stays off and is reported; the numbers are then
computed the plain way and stay the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from abliterate.engine.batching import batches_of_trials
from abliterate.engine.decode import BLOCK_BYTES, HOLES, Decoder, Decoding, join
from abliterate.engine.drafts import Drafts
from abliterate.engine.forward import Passes
from abliterate.engine.graphs import Graphs, capture_of
from abliterate.engine.kv_cache import is_supported, sharing_of
from abliterate.engine.layout import Sharing, shared_prefix
from abliterate.engine.pass_times import PassTimes
from abliterate.engine.prefill import EditState, Prefill, RowGroup
from abliterate.engine.reference import Progress, ReferenceEngine, greedy_config
from abliterate.engine.sampling import TokenLogprobs
from abliterate.engine.static_cache import StaticCache
from abliterate.engine.stopping import StopWhenDecided, StopWhenDiverged
from abliterate.model.generation import rope_switch
from abliterate.model.memory import memory_errors
from abliterate.scorers.base import EarlyScorer, Response
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import Prompt


class Unsupported(Exception):
    """The model lacks something that the engine needs."""


# Parameters of a generation config whose logits processors remember the passes before, or make passes of their own.
STATEFUL = ("guidance_scale", "watermarking_config")

# Rows of the first chunk beyond the r* that prune a trial, because some of the hardest prompts may comply.
MARGIN = 4
# Tokens after which a chunk waits for the others; most refusals are confirmed by then.
PAUSE = 24


@dataclass(frozen=True)
class Pacing:
    """How the engine cuts its work into passes; no number that it returns depends on these values.

    `margin` and `pause` are explained at `MARGIN` and `PAUSE`, `holes` and `block_bytes` at `HOLES` and `BLOCK_BYTES` in
    decode.py, and `pass_cost` is the fixed cost of a pass in tokens; without it, it is learned.
    """

    margin: int = MARGIN
    pause: int = PAUSE
    holes: float = HOLES
    block_bytes: int = BLOCK_BYTES
    pass_cost: float | None = None


PACING = Pacing()


@dataclass
class _PromptSet:
    """A prompt set as token rows.

    `opens` tells which prompts end inside a thinking block; `before` holds their last ids, in which a stop text may begin;
    `history` holds [times counted, times decided] for each prompt's responses; `drafts` remembers earlier responses if drafting
    is on. `longest` is the number of tokens of the longest prompt.
    """

    groups: list[RowGroup]
    opens: list[bool | None]
    before: list[list[int]]
    history: list[list[int]]
    drafts: Drafts | None
    longest: int

    def hardness(self, row: int) -> float:
        """The estimated share of trials in which the response counts."""
        counted, decided = self.history[row]
        return (counted + 1) / (decided + 2)


class TrialEngine:
    """Observes the model of `reference` under the current edit (`edits`).

    `early` is the scorer that lets responses end early, if all scorers allow that.

    Raises:
        Unsupported: rows of the model's cache can't be selected, or its logits processors must see every pass, so only the
            reference can be used.
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
        self._prefills, self._decodes = batches_of_trials(reference.sizes, self.chat.device)
        self._prefills.free = self._decodes.free = self._free
        self._paused: list[Decoding] = []  # rows that wait to be decoded together, and are decoded again if they are dropped
        for name in STATEFUL:
            if getattr(reference.model.generation_config, name, None) not in (None, 1):
                raise Unsupported(f"the generation config has {name}, whose processor depends on all earlier passes")
        possible = self._examine()
        self.sharing: Sharing = possible if switches.use_shared_prefix else "none"
        masks_hide = possible == "between" and self.passes.takes_positions
        self.static = switches.use_static_cache and masks_hide
        self.drafting = switches.use_drafts and masks_hide and not self.static
        self._prefill = Prefill(self.passes, edits, self.sharing)
        self.left_out = self._prefill.left_out
        if switches.use_static_cache and not self.static:
            self.left_out["static"] = "this model's cache isn't plain keys and values under a mask, so it can't be static"
        self._ends = reference.ends
        self._decode = Decoder(
            reference.model,
            self.passes,
            greedy_config(reference.model, reference.max_new_tokens),
            leaving=switches.use_settled_rows,
            check=reference.check,
            holes=pacing.holes,
            block_bytes=pacing.block_bytes,
            static=self._static_cache(edits) if self.static else None,
        )
        self._times = PassTimes(pacing.pass_cost)
        self._sets: dict[tuple[bool, tuple[Prompt, ...]], _PromptSet] = {}
        self._prefix: list[int] = []

    @property
    def decode_speed(self) -> float:
        """Tokens a second of decoding a full batch, one token of each row a pass; 0 if no pass was timed yet."""
        return self._times.speed(self._decodes.size)

    @torch.inference_mode()
    def prepare(
        self,
        harmful: Sequence[Prompt],
        harmless: Sequence[Prompt],
        resume_layers: Sequence[int],
        budget_bytes: float = inf,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """Lay out both sets and keep the base model's states; the model must carry no edit. `progress` counts prompts.

        A trial's passes may begin at `resume_layers`; at most `budget_bytes` are kept.

        Raises:
            Unsupported: the model turns positions by other angles once a text is long, as some responses may become.
        """
        self._prefill.budget_bytes = budget_bytes
        rows = [self.chat.token_ids(prompt) for prompt in (*harmful, *harmless)]
        switch, lengths = rope_switch(self.reference.model.config.get_text_config()), sorted(map(len, rows))
        if switch and lengths[0] <= switch < lengths[-1] + self.reference.max_new_tokens:
            raise Unsupported(f"the model reads a text of more than {switch} tokens anew from its beginning (LongRoPE)")
        self._prefix = shared_prefix(rows) if self._switches.use_shared_prefix else []
        done = 0

        def kept(count: int) -> None:
            nonlocal done
            done += count
            progress(done, len(rows))

        for prompts, with_cache, batches in ((harmful, True, self._decodes), (harmless, False, self._prefills)):
            prompt_set = self._lay_out(prompts, together=with_cache)
            batches.expect(prompt_set.longest)
            if self._switches.use_layer_skip:
                for group in prompt_set.groups:
                    self._prefill.keep(group, resume_layers, batches.affordable(), with_cache=with_cache, kept=kept)
            self._sets[(with_cache, tuple(prompts))] = prompt_set

    @torch.inference_mode()
    def first_logprobs(self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None) -> Tensor:
        """The log-probabilities of `ReferenceEngine.first_logprobs` by one prefill, which fills no cache."""
        return self.some_first_logprobs(prompts, range(len(prompts)), progress)

    @torch.inference_mode()
    def some_first_logprobs(
        self, prompts: Sequence[Prompt], rows: Sequence[int], progress: Progress = lambda done, total: None
    ) -> Tensor:
        """`first_logprobs` of the given rows of a prompt set, in their order."""
        by_row: dict[int, Tensor] = {}
        wanted = set(rows)
        for group in self._set(prompts, together=False).groups:

            def work(indices: Sequence[int], group: RowGroup = group) -> list[Tensor]:
                logits, _ = self._prefill(group, self._tensor(indices), keep_cache=False)
                self.reference.check()
                return list(logits.float().log_softmax(dim=-1).unbind())

            indices = [index for index, row in enumerate(group.rows) if row in wanted]
            logprobs = self._prefills.run(indices, work)
            by_row |= zip((group.rows[index] for index in indices), logprobs, strict=True)
            progress(len(by_row), len(prompts))
        return torch.stack([by_row[row] for row in rows])

    @torch.inference_mode()
    def respond(
        self,
        prompts: Sequence[Prompt],
        progress: Progress = lambda done, total: None,
        *,
        limit: int | None = None,
        length: int | None = None,
    ) -> list[Response] | None:
        """The responses of `ReferenceEngine.respond`; with pruning on, None as soon as `limit` responses count for certain.

        A response that is decided before its end is cut there.
        """
        limit = limit if self._early is not None and self._switches.use_certified_stop else None
        if limit is not None and limit <= 0:
            return None
        prompt_set = self._set(prompts, together=True)
        most, reader = self.reference.max_new_tokens, self.reference.reader
        length = min(length or most, most)
        watch = StopWhenDecided(reader, self._ends, length, prompt_set.opens, prompt_set.before, self._early, limit)
        self._respond(prompt_set, self._chunks(prompt_set, limit), watch, length)
        progress(len(prompts), len(prompts))
        for row, counts in watch.counts.items():
            prompt_set.history[row][0] += counts
            prompt_set.history[row][1] += 1
            if prompt_set.drafts is not None:
                prompt_set.drafts.learn(row, watch.ids[row])
        return None if watch.satisfied else [watch.responses[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def raw_responses(self, prompts: Sequence[Prompt]) -> list[str]:
        """The responses of `ReferenceEngine.raw_responses`, cut where they have diverged: a shared prefix needs no more."""
        prompt_set = self._lay_out(prompts, together=True)
        self._decodes.expect(prompt_set.longest)
        watch = StopWhenDiverged(self.chat, self._ends, self.reference.reader.markup, prompt_set.before)
        prompt_set.drafts = None  # no response comes twice
        self._decodes.run(range(len(prompts)), lambda rows: self._whole(prompt_set, rows, watch, self.reference.max_new_tokens))
        return [watch.text(row) for row in range(len(prompts))]

    @torch.inference_mode()
    def whole_ids(
        self, prompts: Sequence[Prompt], uniform: Tensor, progress: Progress = lambda done, total: None
    ) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        """The ids of whole answers up to the end or the length limit, drawn by `uniform` (n, T) (`sampling.Drawn`).

        With them come log p of each answer's T ids, and of each end token in their places: (1+E, T) float64 on the CPU, the
        ends in ascending order. No scorer decides an answer early.
        """
        prompt_set, length = self._lay_out(prompts, together=True), self.reference.max_new_tokens
        self._decodes.expect(prompt_set.longest)
        watch = StopWhenDecided(self.reference.reader, self._ends, length, prompt_set.opens, prompt_set.before, None, None)
        noted = TokenLogprobs(sorted(self._ends.ids))

        def work(batch: Sequence[int]) -> Sequence[int]:
            watch.begin(batch)
            noted.begin()
            rows = self._started(prompt_set.groups[0], batch)
            rows.uniform, rows.noted = uniform[list(batch)], noted
            self._decode(rows, length, length, watch)
            noted.finish()
            progress(len(watch.responses), len(prompts))
            return batch

        self._decodes.run(range(len(prompts)), work)
        answers = [tuple(watch.ids[row]) for row in range(len(prompts))]
        return answers, [noted.of_row[row][:, : len(ids)] for row, ids in enumerate(answers)]

    @torch.inference_mode()
    def forced_logits(self, prompts: Sequence[Prompt], rows: Sequence[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw logits of some rows of a prompt set, continued with `tokens` (n, T) in the way responses are decoded.

        Two chunks are decoded apart for the first T/2 tokens, which gives (n, T/2, vocabulary). Then they are joined and the
        first row leaves, which gives (n−1, T−T/2, vocabulary).
        """
        group = self._set(prompts, together=True).groups[0]
        half, cut = max(1, len(rows) // 2), tokens.shape[1] // 2
        chunks = [chunk for chunk in (rows[:half], rows[half:]) if chunk]
        started = [self._started(group, chunk) for chunk in chunks]
        self._decode.processors(started[0], tokens.shape[1])  # made as for responses, because here a failure does no harm
        before = [
            self._decode.forced(decoding, chunk_tokens[:, :cut], in_blocks=self.drafting)
            for decoding, chunk_tokens in zip(started, tokens.split([len(chunk) for chunk in chunks]), strict=True)
        ]
        if self.drafting and len(started) > 1:  # drafts leave unequal widths and holes to close; make both here
            self._decode.widen(started[0])
        together = join(started)
        if len(rows) > 1:
            together.finished = {0}
            together.leave()
        if self.drafting:
            together.close(leaving=True)
        rest = tokens[-len(together.rows) :, cut:]
        return torch.cat(before), self._decode.forced(together, rest, in_blocks=self.drafting)

    def _respond(self, prompt_set: _PromptSet, chunks: Sequence[Sequence[int]], watch: StopWhenDecided, length: int) -> None:
        """Decode every chunk up to where most refusals are confirmed, then all remaining rows together.

        So a hopeless trial ends after few rows, and long responses share their passes. The rows in memory, waiting rows
        included, never exceed one batch.
        """
        paused = self._paused

        def begin(batch: Sequence[int]) -> Sequence[int]:
            if watch.satisfied:
                return batch
            if sum(len(rows.rows) for rows in paused) + len(batch) > self._decodes.affordable():
                self._finish_paused(paused, watch, prompt_set.drafts, length)
            watch.begin(batch)  # a batch that ran out of memory is decoded again from its start
            rows = self._started(prompt_set.groups[0], batch)
            self._decode(rows, length, min(self._pacing.pause, length), watch, prompt_set.drafts)
            if rows.open and rows.count < length:
                paused.append(rows)
            return batch

        try:
            for chunk in chunks:
                self._decodes.run(chunk, begin)
            self._finish_paused(paused, watch, prompt_set.drafts, length)
        finally:
            paused.clear()  # after an interruption they would stay in memory
        left = [row for chunk in chunks for row in chunk if row not in watch.responses]
        self._decodes.run(left, lambda batch: batch if watch.satisfied else self._whole(prompt_set, batch, watch, length))

    def _free(self) -> bool:
        """Drop what takes memory beside a batch: paused rows, and static buffers of a whole batch."""
        held = bool(self._paused)
        self._paused.clear()
        return self._decode.release() or held

    def _finish_paused(self, paused: list[Decoding], watch: StopWhenDecided, drafts: Drafts | None, length: int) -> None:
        """Decode the paused rows to their end. If they don't fit into memory together, they are left undone."""
        try:
            if paused and not watch.satisfied:
                with memory_errors():
                    self._decode(join(paused), length, length, watch, drafts)
            paused.clear()
            return
        except torch.OutOfMemoryError:
            pass  # outside this block no traceback keeps their tensors alive
        paused.clear()
        self._decode.release()
        self._decodes.shrink(self._decodes.size)

    def _whole(
        self, prompt_set: _PromptSet, batch: Sequence[int], watch: StopWhenDecided | StopWhenDiverged, length: int
    ) -> Sequence[int]:
        """Decode rows from their start to their end, or until the watch is satisfied."""
        watch.begin(batch)
        self._decode(self._started(prompt_set.groups[0], batch), length, length, watch, prompt_set.drafts)
        return batch

    def _started(self, group: RowGroup, batch: Sequence[int]) -> Decoding:
        rows = self._tensor(batch)
        logits, cache = self._prefill(group, rows, keep_cache=True)
        assert cache is not None
        layout, generated = group.layout, [list[int]() for _ in batch]
        cached = [layout.lengths[row] for row in batch]
        return Decoding(list(batch), generated, logits, cache, layout.mask[rows], layout.whole[rows], cached, set())

    def _chunks(self, prompt_set: _PromptSet, limit: int | None) -> list[list[int]]:
        """Rows in the order in which they are tried. If the trial may be pruned: hardest first, and few at first."""
        size = self._decodes.size
        rows = list(range(len(prompt_set.history)))
        first = 0
        if limit is not None:
            rows.sort(key=lambda row: -prompt_set.hardness(row))
            first = min(size, limit + self._pacing.margin)
        rest = [rows[start : start + size] for start in range(first, len(rows), size)]
        return [rows[:first], *rest] if first else rest

    def _static_cache(self, edits: EditState) -> StaticCache:
        """Static buffers, whose passes are captured on CUDA."""
        capture = capture_of(self.reference.model, self.chat.device)
        if capture is None:
            return StaticCache(self.passes)
        return StaticCache(self.passes, Graphs(edits, capture, lambda text: self.left_out.update(graphs=text)))

    def _set(self, prompts: Sequence[Prompt], *, together: bool) -> _PromptSet:
        found = self._sets.get((together, tuple(prompts))) or self._lay_out(prompts, together=together)
        (self._decodes if together else self._prefills).expect(found.longest)
        return found

    def _lay_out(self, prompts: Sequence[Prompt], *, together: bool) -> _PromptSet:
        """Lay out `together`, in one group, so that any rows can share a batch; else by length, which needs fewer pads."""
        tokens = [self.chat.token_ids(prompt) for prompt in prompts]
        prefix = self._prefix if all(row[: len(self._prefix)] == self._prefix for row in tokens) else []
        prefix = prefix[: min(map(len, tokens)) - 1]
        rows = list(range(len(prompts)))
        batches = [rows]
        if not together:
            rows.sort(key=lambda row: len(tokens[row]))
            size = self._prefills.size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        device = self.chat.device
        groups = [self._prefill.group(batch, [tokens[row] for row in batch], prefix, device) for batch in batches]
        opens = [self.reference.reader.starts_open(self.chat.tail(prompt)) for prompt in prompts]
        drafts = Drafts(len(prompts), self._times) if self.drafting and together else None
        before = [self._ends.context(row) for row in tokens]
        longest = max(map(len, tokens), default=0)
        return _PromptSet(groups, opens, before, [[0, 0] for _ in prompts], drafts, longest)

    def _tensor(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.long, device=self.chat.device)

    @torch.inference_mode()
    def _examine(self) -> Sharing:
        """Run one short pass to learn what the layers return and what the model's own cache supports."""
        # Plain text: a template may want a system prompt.
        ids = self._tensor(self.chat.tokenizer("Hi")["input_ids"] or [0])[None, :]
        with self.passes.observing():
            _, cache = self.passes(ids, torch.ones_like(ids), None)
        if not is_supported(cache):
            raise Unsupported(f"rows of a {type(cache).__name__} can't be selected")
        return sharing_of(cache, self.reference.model.config.get_text_config())
