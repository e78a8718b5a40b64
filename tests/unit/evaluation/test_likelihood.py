"""Log-probabilities of answers and sampled answers, against one plain pass per row and per token."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.sampling import Drawn
from abliterate.errors import TrialError
from abliterate.evaluation import likelihood
from abliterate.evaluation.likelihood import AskedBase, own_answers, token_logprobs
from abliterate.evaluation.teacher_forced import ModelView, TeacherForced, answer_logits, fed_tokens, may_share
from abliterate.types import BatchSizes
from support.engine import HARMFUL, make_engine, make_lab
from support.models import make_model

ANSWERS = ((5, 6, 7, 8, 9, 5, 6), (40,), (300, 2, 17), (9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9), (12, 700))


@pytest.fixture(scope="module")
def engine() -> ReferenceEngine:
    torch.manual_seed(3)
    return make_engine(make_model("llama"), 3, max_new_tokens=9)


def rows_of(engine: ReferenceEngine) -> list[TeacherForced]:
    return [TeacherForced(engine.chat.token_ids(p), ids) for p, ids in zip(HARMFUL, ANSWERS, strict=True)]


@torch.inference_mode()
def plain_logits(engine: ReferenceEngine, ids: Sequence[int]) -> Tensor:
    return engine.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def slow_logprobs(engine: ReferenceEngine, row: TeacherForced) -> list[float]:
    """Each row by itself, without pads, and each token from the whole distribution."""
    logprobs = plain_logits(engine, [*row.prompt, *row.answer]).double().log_softmax(-1)
    return [float(logprobs[len(row.prompt) - 1 + index, token]) for index, token in enumerate(row.answer)]


@pytest.mark.parametrize(("batch_size", "budget"), [(1, 2**29), (3, 2**29), (5, 1), (5, 2**29)])
def test_log_probabilities_are_those_of_a_pass_without_pads(engine: ReferenceEngine, batch_size: int, budget: int) -> None:
    sized = make_engine(engine.model, batch_size)
    rows, done = rows_of(engine), []
    found = token_logprobs(sized, rows, done.append, budget=budget)
    for row, logprobs in zip(rows, found, strict=True):
        assert logprobs.dtype == torch.float64
        assert logprobs.tolist() == pytest.approx(slow_logprobs(engine, row), abs=2e-5)
    assert done[-1] == len(rows)
    assert len(done) == (len(rows) if budget == 1 else -(-len(rows) // batch_size))
    assert token_logprobs(sized, []) == []


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_prompts_that_are_shared_change_nothing(family: str) -> None:
    """Of every answer after every prompt, each prompt and what all prompts begin with is fed once."""
    engine = make_engine(make_model(family), 8)
    own = rows_of(engine)
    rows = [TeacherForced(row.prompt, other.answer) for row in own for other in own]
    fed: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(int(kwargs["input_ids"].numel())), with_kwargs=True
    )
    expected, apart = token_logprobs(engine, rows), sum(fed)
    fed.clear()
    found = token_logprobs(engine, rows, share=True)
    assert sum(fed) < 0.7 * apart
    for one, other, row in zip(found, expected, rows, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
        assert len(one) == len(row.answer)


def test_a_shared_prompt_is_fed_once(engine: ReferenceEngine) -> None:
    """By hand: five tokens in common, a prompt of two rows with two more, and another one."""
    rows = [
        TeacherForced((1, 2, 3, 4, 5, 6, 7, 8), (9, 10)),
        TeacherForced((1, 2, 3, 4, 5, 6, 7, 8), (11,)),
        TeacherForced((1, 2, 3, 4, 5, 12, 13), (14, 15, 16)),
    ]
    # The last token of a prompt goes with the answer: (1 + 1) + 1 + (1 + 2).
    assert fed_tokens(rows, share=True) == 5 + (2 + 1) + 6
    assert fed_tokens(rows[:2], share=True) == 7 + (1 + 1) + 1
    assert fed_tokens(rows[::2], share=True) == 5 + (3 + 1) + (2 + 2)
    assert fed_tokens(rows, share=False) == 9 + 8 + 9
    for share in (True, False):
        found = answer_logits(engine.model, rows, torch.device("cpu"), share=share)
        for row, logits in zip(rows, found, strict=True):
            alone = plain_logits(engine, [*row.prompt, *row.answer[:-1]])[-len(row.answer) :]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "switches", "expected"),
    [("llama", {}, True), ("llama", {"use_shared_prefix": False}, False), ("gemma2", {}, False)],
)
def test_only_caches_that_allow_it_share(family: str, switches: dict[str, bool], expected: bool) -> None:
    """Gemma 2 has sliding windows; a model that takes no positions may count the gaps; the reference shares nothing."""
    lab = make_lab(family)
    engine = lab.engine(**switches)
    assert may_share(engine) is expected
    engine.passes.takes_positions = False
    assert not may_share(engine)
    assert not may_share(lab.reference)


@pytest.mark.parametrize("prompt", [(1,), (1, 2)])
def test_prompts_that_have_nothing_to_share(engine: ReferenceEngine, prompt: tuple[int, ...]) -> None:
    rows = [TeacherForced(prompt, (9, 10)), TeacherForced(prompt, (11,)), TeacherForced((3, 4), (5,))]
    for row, logits in zip(rows, answer_logits(engine.model, rows, torch.device("cpu"), share=True), strict=True):
        alone = plain_logits(engine, [*row.prompt, *row.answer[:-1]])[-len(row.answer) :]
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


def test_batches_shrink_where_memory_runs_out(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sizes = likelihood.answer_logits, []

    def narrow(model: Any, rows: Sequence[TeacherForced], device: torch.device, *, share: bool) -> list[Tensor]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no room")
        return whole(model, rows, device, share=share)

    expected = token_logprobs(engine, rows_of(engine))
    monkeypatch.setattr(likelihood, "answer_logits", narrow)
    found = token_logprobs(make_engine(engine.model, 5), rows_of(engine))
    assert sizes[0] == 5
    assert max(sizes[1:]) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_logits_that_are_no_numbers_are_an_error(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, rows: Sequence[TeacherForced], device: torch.device, *, share: bool) -> list[Tensor]:
        return [torch.full((len(row.answer), 1024), torch.nan) for row in rows]

    monkeypatch.setattr(likelihood, "answer_logits", broken)
    with pytest.raises(TrialError, match="not numbers"):
        token_logprobs(engine, rows_of(engine))


def test_draws_have_the_distribution_of_the_scores() -> None:
    """Places on an even grid give each token as often as its probability says; an impossible token never comes."""
    scores = torch.tensor([0.3, -torch.inf, 2.0, 1.1, -4.0])
    count = 10_000
    places = ((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]
    drawn = Drawn(places)(torch.zeros(count, 1), scores.expand(count, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=5) / count
    assert shares.tolist() == pytest.approx(scores.softmax(-1).tolist(), abs=2 / count)
    edges = Drawn(torch.tensor([[0.0], [1.0 - 1e-16]], dtype=torch.float64))(torch.zeros(2, 1), scores.expand(2, -1)).argmax(-1)
    assert edges.tolist() == [0, 4]


def slow_answers(engine: ReferenceEngine, seed: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token by token: the first whose cumulative probability exceeds the row's next random number, and the likeliest."""
    length = engine.max_new_tokens
    uniform = torch.rand(len(HARMFUL), length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    answers: tuple[list[tuple[int, ...]], list[tuple[int, ...]]] = ([], [])
    for greedy, found in enumerate(answers):
        for prompt, row in zip(HARMFUL, uniform.tolist(), strict=True):
            ids, given = list[int](), engine.chat.token_ids(prompt)
            for place in row:
                probabilities = plain_logits(engine, [*given, *ids])[-1].double().softmax(-1).tolist()
                drawn = next(token for token, total in enumerate(itertools.accumulate(probabilities)) if total > place)
                ids.append(probabilities.index(max(probabilities)) if greedy else drawn)
                if ids[-1] in engine.ends.ids:
                    break
            found.append(tuple(ids))
    return answers


def test_own_answers_are_the_chain_of_draws_whatever_the_batch_size(engine: ReferenceEngine) -> None:
    expected = slow_answers(engine, 7)
    for batch_size in (1, 3, 10):
        found = own_answers(make_engine(engine.model, batch_size, engine.max_new_tokens), HARMFUL, 5, 7)
        assert (found.sampled, found.greedy) == expected
    other = own_answers(engine, HARMFUL, 2, 8)
    assert other.sampled != expected[0]
    assert other.greedy == expected[1][:2]


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma3", {}), ("llama", {"repetition_penalty": 1.3})])
def test_the_trial_engine_gives_the_same_own_answers(family: str, options: dict[str, Any]) -> None:
    """With a shared prefix, rows that leave, and the model's own processors; `generate` feeds every row to the end."""
    lab = make_lab(family, batch_size=7, tokens=16, generation={"eos_token_id": list(range(3, 90)), **options})
    done: list[tuple[int, int]] = []
    found = own_answers(lab.engine(), HARMFUL, 5, 5, lambda *counts: done.append(counts))
    plain = own_answers(lab.reference, HARMFUL, 5, 5)
    assert (found.sampled, found.greedy) == (plain.sampled, plain.greedy)
    assert done == [(7, 10), (10, 10)]
    assert len({len(ids) for ids in (*found.sampled, *found.greedy)}) > 2, "rows end at different times"
    # What was noted while sampling is what the base says of whole answers, by its raw logits.
    assert found.noted is not None
    assert plain.noted is None
    rows = [
        TeacherForced(lab.reference.chat.token_ids(prompt), ids) for prompt, ids in zip(HARMFUL, found.sampled, strict=True)
    ]
    for token in sorted(lab.reference.ends.ids)[::40]:
        for noted, both in zip(found.noted, token_logprobs(lab.reference, rows, beside=token), strict=True):
            torch.testing.assert_close(torch.stack([noted[None], noted[token]]), both, rtol=1e-4, atol=1e-4)


def test_a_token_beside_each_of_an_answer(engine: ReferenceEngine) -> None:
    rows = rows_of(engine)
    for row, both in zip(rows, token_logprobs(engine, rows, beside=40), strict=True):
        assert both[0].tolist() == pytest.approx(slow_logprobs(engine, row), abs=2e-5)
        for place, found in enumerate(both[1].tolist()):
            begun = TeacherForced(row.prompt, (*row.answer[:place], 40))
            assert found == pytest.approx(slow_logprobs(engine, begun)[-1], abs=2e-5)


def test_the_base_is_asked_while_it_is_active(engine: ReferenceEngine) -> None:
    entered = []

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        entered.append(True)
        yield

    base = AskedBase(ModelView(engine, active), HARMFUL, lambda view: pytest.fail("nobody asks"))
    found = base.logprobs(HARMFUL, ANSWERS)
    assert entered
    for logprobs, row in zip(found, rows_of(engine), strict=True):
        assert logprobs.tolist() == pytest.approx(slow_logprobs(engine, row), abs=2e-5)
    assert base.ends == engine.ends.ids
    assert BatchSizes.same(3) == engine.sizes
