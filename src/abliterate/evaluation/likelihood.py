"""Ask the unedited model about answers: the log-probability of each of their tokens, and answers sampled from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from abliterate.engine.batching import Batches
from abliterate.engine.reference import ReferenceEngine, greedy_config
from abliterate.errors import TrialError
from abliterate.evaluation.teacher_forced import BUDGET, ModelView, TeacherForced, answer_logits
from abliterate.model.memory import memory_errors
from abliterate.scorers.yardstick import Yardstick
from abliterate.types import Prompt


@dataclass(frozen=True)
class AskedBase:
    """The unedited model as scorers see it (`scorers.BaseView`); `find` gives its yardstick."""

    model: ModelView
    harmless: Sequence[Prompt]
    find: Callable[[AskedBase], Yardstick]

    @property
    def ends(self) -> Set[int]:
        """The ids that end a response."""
        return self.model.engine.ends.ids

    def logprobs(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """The log-probabilities (T) float64 of each answer's T ids; it raises as `token_logprobs` does."""
        engine = self.model.engine
        rows = [TeacherForced(engine.chat.token_ids(prompt), ids) for prompt, ids in zip(prompts, answers, strict=True)]
        with self.model.active():
            return token_logprobs(engine, rows, share=self.model.share)

    def yardstick(self) -> Yardstick:
        """The model's measures of its own answers to harmless prompts."""
        return self.find(self)


def token_logprobs(
    engine: ReferenceEngine,
    rows: Sequence[TeacherForced],
    progress: Callable[[int], None] = lambda done: None,
    *,
    budget: int = BUDGET,
    share: bool = False,
) -> list[Tensor]:
    """log p (T) float64 on the CPU of each of the T tokens of each answer under the engine's model in its current state.

    Rows of similar lengths share a batch, at most `budget` bytes of logits are held, and batches shrink where memory runs out.
    With `share`, prompts are shared (`answer_logits`), and rows of one prompt follow each other. `progress(done)` counts rows.

    Raises:
        TrialError: a logit is not a number, or a single row doesn't fit.
    """
    if not rows:
        return []
    repeated = share and len({tuple(row.prompt) for row in rows}) < len(rows)

    def rank(index: int) -> tuple[int, ...]:
        prompt, answer = rows[index].prompt, len(rows[index].answer)
        return (answer, len(prompt), *prompt, index) if repeated else (len(prompt) + answer, index)

    order = sorted(range(len(rows)), key=rank)
    longest = max(len(row.answer) for row in rows)
    # The logits of a row in the model's own dtype, and one row's in float32 with its exponentials.
    per_row = 3 * longest * engine.model.config.get_text_config().vocab_size * 4
    batches = Batches(max(1, min(engine.sizes.prefill, budget // per_row)), engine.chat.device, row_bytes=per_row)
    done = 0

    def work(batch: Sequence[int]) -> Sequence[Tensor]:
        nonlocal done
        logits = answer_logits(engine.model, [rows[index] for index in batch], engine.chat.device, share=share)
        found = [_of_tokens(row_logits, rows[index].answer) for row_logits, index in zip(logits, batch, strict=True)]
        done += len(batch)
        progress(done)
        engine.check()
        return found

    by_row = dict(zip(order, batches.run(order, work), strict=True))
    return [by_row[index] for index in range(len(rows))]


def _of_tokens(logits: Tensor, answer: Sequence[int]) -> Tensor:
    """log p (T) of the tokens of one answer from its raw logits (T, vocabulary)."""
    with memory_errors():
        logits = logits.float()
        tokens = torch.tensor(list(answer), device=logits.device)[:, None]
        # The log-probabilities of the whole vocabulary would take as much memory again.
        logprobs = (logits.gather(1, tokens)[:, 0] - logits.logsumexp(dim=-1)).cpu().double()
    if torch.isnan(logprobs).any():
        raise TrialError("the model's logits are not numbers")
    return logprobs


class Drawn(LogitsProcessor):
    """Draws the next token of each row at temperature 1: all other tokens get −inf, so that a greedy choice takes it.

    `uniform` (n, T) in [0, 1) is the place of each row's token in the cumulative distribution over the vocabulary. It is given
    for each row and position, so a row's answer depends neither on its neighbours nor on the batch size.
    """

    def __init__(self, uniform: Tensor) -> None:
        self._uniform = uniform
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        distribution = scores.float().softmax(dim=-1).cpu().double().cumsum(dim=-1)
        place = self._uniform[:, self._step, None] * distribution[:, -1:]
        self._step += 1
        # The first token whose cumulative probability exceeds the place, which therefore has a probability above 0.
        tokens = torch.searchsorted(distribution, place, right=True).clamp_max(scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.to(scores.device), 0.0)


@torch.inference_mode()
def sampled_answers(
    engine: ReferenceEngine,
    prompts: Sequence[Prompt],
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[int, ...]]:
    """The ids of an answer to each prompt, sampled at temperature 1, up to its end or to the length limit.

    The distribution is the one that responses are chosen from, so the model's own processors apply. A row's random numbers
    depend on `seed` and the row's number alone.

    Raises:
        TrialError: the device is too small for a single prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(prompts), engine.max_new_tokens, generator=generator, dtype=torch.float64)
    batches = Batches(engine.sizes.decode, engine.chat.device, row_bytes=engine.sizes.row_bytes[2])
    done = 0

    def work(batch: Sequence[int]) -> Sequence[tuple[int, ...]]:
        nonlocal done
        drawn = LogitsProcessorList([Drawn(uniform[list(batch)])])
        encoded = engine.chat.encode([prompts[index] for index in batch])
        config = greedy_config(engine.model, engine.max_new_tokens)
        output = engine.model.generate(
            **encoded, generation_config=config, logits_processor=drawn, stopping_criteria=engine.ends.criteria()
        )
        width = encoded["input_ids"].shape[1]
        answers = []
        for whole in output.tolist():
            ids = whole[width:]
            answers.append(tuple(ids[: engine.ends.length(ids, whole[:width])]))
        done += len(batch)
        progress(done, len(prompts))
        engine.check()
        return answers

    return batches.run(range(len(prompts)), work)
