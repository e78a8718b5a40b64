"""Ask the unedited model about answers: the log-probability of each of their tokens, and answers sampled from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from abliterate.engine.batching import Batches, batches_of_trials
from abliterate.engine.reference import ReferenceEngine, greedy_config
from abliterate.engine.sampling import Drawn
from abliterate.engine.self_check import Engine
from abliterate.engine.trial_engine import TrialEngine
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
        return self._logprobs(prompts, answers, None)

    def logprobs_beside(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], token: int) -> list[Tensor]:
        """The log-probabilities (2, T) float64 of each answer's T ids, and of `token` instead of each of them."""
        return self._logprobs(prompts, answers, token)

    def _logprobs(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], beside: int | None) -> list[Tensor]:
        engine = self.model.engine
        rows = [TeacherForced(engine.chat.token_ids(prompt), ids) for prompt, ids in zip(prompts, answers, strict=True)]
        with self.model.active():
            return token_logprobs(engine, rows, share=self.model.share, beside=beside)

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
    beside: int | None = None,
) -> list[Tensor]:
    """log p (T) float64 on the CPU of each of the T tokens of each answer under the engine's model in its current state.

    With a token `beside` it is (2, T), and the second row has log p of that token in the place of each of the answer's.
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
        found = [_of_tokens(row_logits, rows[index].answer, beside) for row_logits, index in zip(logits, batch, strict=True)]
        done += len(batch)
        progress(done)
        engine.check()
        return found

    by_row = dict(zip(order, batches.run(order, work), strict=True))
    return [by_row[index] for index in range(len(rows))]


def _of_tokens(logits: Tensor, answer: Sequence[int], beside: int | None) -> Tensor:
    """log p (T) of the tokens of one answer, or (2, T) with a token `beside`, from its raw logits (T, vocabulary)."""
    with memory_errors():
        logits = logits.float()
        asked = [list(answer)] + ([] if beside is None else [[beside] * len(answer)])
        tokens = torch.tensor(asked, device=logits.device).T
        # The log-probabilities of the whole vocabulary would take as much memory again.
        logprobs = (logits.gather(1, tokens).T - logits.logsumexp(dim=-1)).cpu().double()
    if torch.isnan(logprobs).any():
        raise TrialError("the model's logits are not numbers")
    return logprobs[0] if beside is None else logprobs


@dataclass(frozen=True)
class OwnAnswers:
    """The ids of the model's `sampled` answers to harmless prompts, and of its `greedy` ones to the first of them.

    `noted` are {token: log p of this token in the place of each id} for the end tokens, one for each sampled answer, and with
    the key None log p of the ids themselves; each is (T) float64. It is None where sampling didn't note them.
    """

    sampled: Sequence[Sequence[int]]
    greedy: Sequence[Sequence[int]]
    noted: Sequence[Mapping[int | None, Tensor]] | None = None


@torch.inference_mode()
def own_answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    looked: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> OwnAnswers:
    """A sampled answer to each prompt, and a greedy one to the first `looked`, up to end or length limit.

    Sampling is at temperature 1, from the distribution that responses are chosen from, so the model's own processors apply. A
    row's random numbers depend on `seed` and the row's number alone. Both kinds share their batches, because few long answers
    make most of the passes.

    Raises:
        TrialError: the device is too small for a single prompt, or a logit is not a number.
    """
    reference = engine.reference if isinstance(engine, TrialEngine) else engine
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(prompts), reference.max_new_tokens, generator=generator, dtype=torch.float64)
    uniform, both = torch.cat([drawn, torch.full_like(drawn[:looked], torch.nan)]), [*prompts, *prompts[:looked]]
    if not isinstance(engine, TrialEngine):
        found = _by_generate(engine, both, uniform, progress)
        return OwnAnswers(found[: len(prompts)], found[len(prompts) :])
    found, logprobs = engine.whole_ids(both, uniform, progress)
    if any(torch.isnan(values).any() for values in logprobs):
        raise TrialError("the model's logits are not numbers")
    tokens: list[int | None] = [None, *sorted(reference.ends.ids)]
    noted = [dict(zip(tokens, values, strict=True)) for values in logprobs[: len(prompts)]]
    return OwnAnswers(found[: len(prompts)], found[len(prompts) :], noted)


def _by_generate(
    engine: ReferenceEngine, prompts: Sequence[Prompt], uniform: Tensor, progress: Callable[[int, int], None]
) -> list[tuple[int, ...]]:
    """The ids of answers by `generate`, whose tokens are drawn by `uniform` (n, T) (`Drawn`)."""
    _, batches = batches_of_trials(engine.sizes, engine.chat.device)
    batches.expect(max(len(engine.chat.token_ids(prompt)) for prompt in prompts))
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
