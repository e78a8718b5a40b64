"""The reference engine observes a model the slow, plain way: one `model.generate` per batch and prompt set.

Every faster way must give the same numbers as this one (docs/design.md §5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from abliterate.engine.batching import Batches, batches_of_trials
from abliterate.engine.ends import Ends
from abliterate.engine.responses import Answer, ResponseReader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.generation import limited_config
from abliterate.scorers.base import Observation, Response
from abliterate.types import BatchSizes, Prompt

Progress = Callable[[int, int], None]


class ReferenceEngine:
    """Observes a model on fixed prompt sets. `check` is called between passes and may raise `Interrupted`."""

    def __init__(
        self,
        model: PreTrainedModel,
        chat: PromptEncoder,
        reader: ResponseReader,
        *,
        max_new_tokens: int,
        sizes: BatchSizes,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.model: Any = model
        self.chat = chat
        self.reader = reader
        self.ends = Ends.of(model, chat.tokenizer)
        self.max_new_tokens = max_new_tokens
        self.sizes = sizes
        self._prefills, self._decodes = batches_of_trials(sizes, chat.device)
        self.check = check

    def observe(self, harmful: Sequence[Prompt], harmless: Sequence[Prompt], progress: Progress) -> Observation:
        """Run the harmless prompts first (KL is cheap), then generate the responses to the harmful prompts.

        `progress(done, total)` counts prompts of both sets.
        """
        total = len(harmful) + len(harmless)
        logprobs = self.first_logprobs(harmless, lambda done, _: progress(done, total))
        responses = self.respond(harmful, lambda done, _: progress(len(harmless) + done, total))
        assert responses is not None
        return Observation(responses, logprobs, harmful)

    @torch.inference_mode()
    def first_logprobs(self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None) -> Tensor:
        """Log-softmax of the raw logits of the first response token, (n_prompts, vocabulary) float32 on the device."""
        counted = _Counter(len(prompts), progress, self.check)

        def work(batch: Sequence[Prompt]) -> Sequence[Tensor]:
            output = self._generate(batch, 1, output_logits=True, return_dict_in_generate=True)
            rows = output.logits[0].float().log_softmax(dim=-1)
            counted.add(len(batch))
            return rows.unbind()

        return torch.stack(self._expecting(self._prefills, prompts).run(prompts, work))

    @torch.inference_mode()
    def respond(
        self,
        prompts: Sequence[Prompt],
        progress: Progress = lambda done, total: None,
        *,
        limit: int | None = None,
        length: int | None = None,
    ) -> list[Response] | None:
        """The greedy responses, never None: the reference ignores the `limit` at which a trial could be pruned.

        They have at most `length` tokens, if that is less than the engine's own limit.
        """
        counted = _Counter(len(prompts), progress, self.check)

        def work(batch: Sequence[Prompt]) -> Sequence[Response]:
            ids = self.generate_ids(batch, min(length or self.max_new_tokens, self.max_new_tokens))
            counted.add(len(batch))
            opens = [self.reader.starts_open(self.chat.tail(prompt)) for prompt in batch]
            return [self.reader.read(row, starts_open=is_open) for row, is_open in zip(ids, opens, strict=True)]

        return self._expecting(self._decodes, prompts).run(prompts, work)

    @torch.inference_mode()
    def generate_ids(
        self, prompts: Sequence[Prompt], max_new_tokens: int, after_token: Callable[[], None] | None = None
    ) -> list[list[int]]:
        """The generated ids of one batch without the prompts' ids, each row up to its end.

        `after_token` is called after every token of the batch.
        """
        return [ids for ids, _ in self._rows(prompts, max_new_tokens, after_token)]

    def _rows(
        self, prompts: Sequence[Prompt], max_new_tokens: int, after_token: Callable[[], None] | None = None
    ) -> list[tuple[list[int], bool]]:
        """The generated ids of one batch, each row up to its end, and whether it ended before the length limit."""
        batch = self.chat.encode(prompts)
        config = greedy_config(self.model, max_new_tokens)
        criteria = self.ends.criteria()
        if after_token:
            criteria.append(_Never(after_token))
        output = self.model.generate(**batch, generation_config=config, stopping_criteria=criteria)
        width, rows = batch["input_ids"].shape[1], []
        for whole in output.tolist():
            ids, before = whole[width:], whole[:width]
            length = self.ends.length(ids, before)
            rows.append((ids[:length], length is not None))
        return rows

    @torch.inference_mode()
    def raw_logits(self, prompts: Sequence[Prompt], max_new_tokens: int) -> tuple[Tensor, Tensor]:
        """The generated ids (n, T) of one batch, padded after each row's end, and their raw logits (n, T, vocabulary)."""
        output = self._generate(prompts, max_new_tokens, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(output.logits, dim=1)
        return output.sequences[:, -logits.shape[1] :], logits

    def answers(self, prompts: Sequence[Prompt], progress: Progress = lambda done, total: None) -> list[Answer]:
        """The whole greedy answers with their ids, up to the end token or the length limit."""
        counted = _Counter(len(prompts), progress, self.check)

        def work(batch: Sequence[Prompt]) -> Sequence[Answer]:
            answers = []
            for prompt, (ids, ended) in zip(batch, self._rows(batch, self.max_new_tokens), strict=True):
                is_open = self.reader.starts_open(self.chat.tail(prompt))
                response, in_text = self.reader.read(ids, starts_open=is_open), ended and ids[-1] not in self.ends.ids
                answers.append(Answer(tuple(ids), ended, response, in_text))
            counted.add(len(batch))
            return answers

        return self._expecting(self._decodes, prompts).run(prompts, work)

    def raw_responses(self, prompts: Sequence[Prompt]) -> list[str]:
        """Responses with their special tokens, up to the end of the turn; the response prefix is detected in them."""

        def work(batch: Sequence[Prompt]) -> Sequence[str]:
            rows = self.generate_ids(batch, self.max_new_tokens)
            return [self.chat.decode(self.ends.without_end(row), skip_special_tokens=False) for row in rows]

        return self._expecting(self._decodes, prompts).run(prompts, work)

    def _expecting(self, batches: Batches, prompts: Sequence[Prompt]) -> Batches:
        batches.expect(max((len(self.chat.token_ids(prompt)) for prompt in prompts), default=0))
        return batches

    def _generate(self, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> Any:
        config = greedy_config(self.model, max_new_tokens)
        config.update(**options)  # options beside a config are deprecated in transformers 5
        criteria = self.ends.criteria()
        return self.model.generate(**self.chat.encode(prompts), generation_config=config, stopping_criteria=criteria)


def greedy_config(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """The model's own generation config (processors, all end-of-turn ids) with sampling off and a length limit."""
    config = limited_config(model, max_new_tokens)
    config.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return config


class _Never(StoppingCriteria):
    """Never stops; calls `after_token` after every token."""

    def __init__(self, after_token: Callable[[], None]) -> None:
        self._after_token = after_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self._after_token()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Counter:
    def __init__(self, total: int, progress: Progress, check: Callable[[], None]) -> None:
        self._done, self._total, self._progress, self._check = 0, total, progress, check

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)
        self._check()
