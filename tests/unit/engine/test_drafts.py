"""Drafts change how many passes responses take, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from abliterate.engine import decode, drafts
from abliterate.engine.decode import Decoding, join
from abliterate.engine.drafts import Drafts
from abliterate.engine.kv_cache import take_columns
from abliterate.engine.trial_engine import Pacing, TrialEngine
from abliterate.model.chat_template import PromptEncoder
from abliterate.scorers.refusals import Refusals
from support.engine import HARMFUL, Lab, make_lab, trials, trusted, whole

DRAFTING = ("llama", "qwen2", "qwen3", "phi3", "falcon", "gpt2", "gpt_neox")
Proposed = Sequence[int]


@pytest.fixture(scope="module", params=DRAFTING)
def lab(request: pytest.FixtureRequest) -> Lab:
    """One lab per family whose layers attend to everything."""
    return make_lab(request.param, batch_size=4, tokens=14)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the passes after the prompts."""
    seen: list[int] = []
    feed = decode.Decoder._feed

    def noting(self: decode.Decoder, rows: Decoding, ids: torch.Tensor, fed: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return feed(self, rows, ids, fed)

    monkeypatch.setattr(decode.Decoder, "_feed", noting)
    return seen


def always_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed whole drafts, whether that pays or not."""
    monkeypatch.setattr(Drafts, "width", lambda self, proposed: 1 + max(map(len, proposed), default=0))


def drafting_from(monkeypatch: pytest.MonkeyPatch, said: dict[int, list[int]], right: float, seed: int) -> None:
    """Drafts of known responses, each token right with a probability."""
    draw = random.Random(seed)

    def propose(self: Drafts, row: int, so_far: Sequence[int], length: int) -> Proposed:
        known = said[row][len(so_far) : len(so_far) + draw.randint(0, length)]
        return [token if draw.random() < right else draw.randrange(5, 300) for token in known]

    monkeypatch.setattr(Drafts, "propose", propose)
    always_widest(monkeypatch)


def said_by(texts: Sequence[str], chat: PromptEncoder) -> dict[int, list[int]]:
    """Responses as tokens."""
    return {row: chat.tokenizer.encode(text, add_special_tokens=False) for row, text in enumerate(texts)}


@pytest.mark.parametrize("right", [pytest.param(0.0, marks=pytest.mark.slow), 0.6, pytest.param(0.95, marks=pytest.mark.slow)])
def test_any_draft_gives_the_references_responses(lab: Lab, right: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, params in enumerate(trials(lab, 3)):
        pacing = Pacing(holes=[0.0, 0.25, 1.0][seed % 3])
        engine = dataclasses.replace(lab, pacing=pacing).engine(Refusals(["no such text"]))
        assert engine.drafting
        expected = lab.expected(params)[1]
        with monkeypatch.context() as patch:
            drafting_from(patch, said_by(expected, lab.reference.chat), right, seed)
            for limit in (1, 3, None):  # chunks that wait for each other, with unequal numbers of tokens
                found = engine.respond(HARMFUL, limit=limit)
                assert found is not None
                assert [response.text for response in found] == expected


def test_what_was_said_before_takes_fewer_passes(lab: Lab, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    always_widest(monkeypatch)
    engine = lab.engine()
    lab.editor.apply(trials(lab, 1)[0])
    first, passes = engine.respond(HARMFUL), len(widths)
    widths.clear()
    assert engine.respond(HARMFUL) == first
    assert len(widths) < passes / 2
    assert max(widths) == decode.BLOCK


def test_a_draft_never_passes_the_limit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []

    def propose(self: Drafts, row: int, so_far: Sequence[int], length: int) -> Proposed:
        ends.append(len(so_far) + length)
        return [7] * length

    monkeypatch.setattr(Drafts, "propose", propose)
    always_widest(monkeypatch)
    found = lab.engine().respond(HARMFUL)
    assert found is not None
    assert [response.text for response in found] == whole(lab.reference)[1]
    assert max(ends) == lab.reference.max_new_tokens - 1, "the model adds one"


def test_logits_of_blocks_take_no_more_than_allowed(lab: Lab, widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = lab.loaded.model.config.vocab_size
    always_widest(monkeypatch)
    pacing = Pacing(block_bytes=3 * 4 * vocabulary * 4)  # three tokens of four rows
    engine = dataclasses.replace(lab, pacing=pacing).engine(use_settled_rows=False)
    engine.respond(HARMFUL[:4])
    widths.clear()
    engine.respond(HARMFUL[:4])
    assert max(widths) <= 3


def test_processors_see_every_token(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", generation={"repetition_penalty": 1.8})
    always_widest(monkeypatch)
    engine = lab.engine()
    for _ in range(2):
        engine.respond(HARMFUL)
    assert set(widths[-8:]) == {1}


@pytest.mark.parametrize("family", ["gemma3", "mistral", "qwen3_5", "lfm2", "gpt_oss"])
def test_no_drafts_where_a_layer_does_not_attend_to_everything(family: str) -> None:
    engine = make_lab(family).engine()
    assert not engine.drafting
    assert engine._set(HARMFUL, together=True).drafts is None


def test_the_switch_turns_drafts_off() -> None:
    assert not make_lab("llama").engine(use_drafts=False).drafting


def newest(learned: Sequence[Sequence[int]], so_far: Sequence[int], kept: int) -> Iterator[Proposed]:
    """Slow reference: where the last tokens were seen, newest first, in the newest distinct responses."""
    distinct: list[tuple[int, ...]] = []
    for tokens in map(tuple, learned):
        if tokens not in distinct[-kept:]:
            distinct.append(tokens)
    key = tuple(([drafts.START] * drafts.CONTEXT + list(so_far))[-drafts.CONTEXT :])
    for age, tokens in enumerate(reversed(distinct)):
        padded = (drafts.START,) * drafts.CONTEXT + tokens
        ends = [end for end in range(len(tokens)) if padded[end : end + drafts.CONTEXT] == key]
        if ends:
            # The newest place is forgotten with its response, and older ones aren't looked for again.
            yield tokens[ends[-1] :] if age < kept else ()
            return
    yield ()


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=10)


@given(st.lists(TOKENS, max_size=14), TOKENS, st.integers(1, 5))
def test_drafts_are_the_newest_continuation(learned: list[list[int]], so_far: list[int], length: int) -> None:
    memory = Drafts(2)
    for tokens in learned:
        memory.learn(1, tokens)
    expected = next(newest(learned, so_far, drafts.OF_A_PROMPT)) or next(newest(learned, so_far, drafts.OF_ALL))
    assert tuple(memory.propose(1, so_far, length)) == tuple(expected[:length])
    assert tuple(memory.propose(0, so_far, length)) == tuple(next(newest(learned, so_far, drafts.OF_ALL))[:length])


def test_memory_is_bounded() -> None:
    memory, draw = Drafts(1), random.Random(0)
    for _ in range(1000):
        memory.learn(0, [draw.randrange(1000) for _ in range(20)])
    assert len(memory._by_prompt[0]._seen_at) <= drafts.OF_A_PROMPT * 20
    assert len(memory._shared._seen_at) <= drafts.OF_ALL * 20


def test_width_is_what_decides_most_for_its_work() -> None:
    memory = Drafts(1)
    assert memory.width([()] * 10) == 1
    assert memory.width([]) == 1
    for _ in range(50):
        memory.score([(1,) * 7] * 10, [7] * 10)
    assert memory.width([(1,) * 7] * 10) == 8
    assert memory.width([(1,) * 7] + [()] * 99) == 1, "one row's draft doesn't pay for a hundred rows"
    for _ in range(50):
        memory.score([(1,) * 7] * 10, [0] * 10)
    assert memory.width([(1,) * 7] * 100) == 1
    for _ in range(1000):
        memory.score([()] * 10, [0] * 10)
    assert memory.width([(1,) * 7] * 100) > 1, "drafts are tried again after a while"


@pytest.mark.parametrize(("cost", "rate", "least", "most"), [(12.0, 0.4, 0.99, 1.01), (200.0, 0.9, 2.0, 6.0)])
def test_drafts_pay_or_cost_next_to_nothing(cost: float, rate: float, least: float, most: float) -> None:
    """Simulated passes of 40 rows: the speed with drafts over that without, by what a pass truly costs."""
    memory, draw = Drafts(40), random.Random(1)
    seconds, decided, plain_seconds, plain_decided = 0.0, 0, 0.0, 0
    for _ in range(3000):
        rows = draw.choice([40, 40, 40, 20, 10])
        proposed = [(1,) * 7 if draw.random() < 0.8 else () for _ in range(rows)]
        width = memory.width(proposed)
        proposed = [draft[: width - 1] for draft in proposed]
        right = [next((n for n in range(len(draft)) if draw.random() > rate), len(draft)) for draft in proposed]
        memory.times.note(rows * width, cost + rows * width)
        memory.score(proposed, right)
        seconds, decided = seconds + cost + rows * width, decided + rows + sum(right)
        plain_seconds, plain_decided = plain_seconds + cost + rows, plain_decided + rows
    assert least < (decided / seconds) / (plain_decided / plain_seconds) < most


def test_useless_drafts_cost_little(widths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drafts, "propose", lambda self, row, so_far, length: [7] * length)
    lab = make_lab("llama", tokens=60, pacing=Pacing(pass_cost=0))
    lab.engine().respond(HARMFUL)
    assert sum(widths) < 1.35 * len(widths)


def test_columns_are_taken_row_by_row() -> None:
    cache, draw = DynamicCache(), torch.Generator().manual_seed(0)
    keys, values = torch.randn(5, 3, 7, 4, generator=draw), torch.randn(5, 3, 7, 6, generator=draw)
    cache.update(keys, values, 0)
    rows, columns = torch.tensor([4, 0, 0]), torch.tensor([[0, 6], [1, 2], [5, 3]])
    take_columns(cache.layers, rows, columns)
    for place, head in itertools.product(range(3), range(3)):
        assert torch.equal(cache.layers[0].keys[place, head], keys[rows[place], head][columns[place]])
        assert torch.equal(cache.layers[0].values[place, head], values[rows[place], head][columns[place]])


def decoding(mask: list[list[int]], first: int) -> Decoding:
    """Rows whose cache holds its own column numbers."""
    n, width = len(mask), len(mask[0])
    states = torch.arange(width, dtype=torch.float32)[None, None, :, None].expand(n, 2, width, 3).contiguous()
    cache = DynamicCache()
    cache.update(states, states + 100, 0)
    rows = list(range(first, first + n))
    return Decoding(
        rows,
        [[row] for row in rows],
        torch.ones(n, 9),
        cache,
        torch.tensor(mask),
        torch.zeros(n, 2).long(),
        list(map(sum, mask)),
        set(),
    )


def test_closing_moves_what_counts_to_the_right() -> None:
    rows = decoding([[0, 1, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1]], 0)
    rows.finished = {2}
    assert rows.holes == 0
    rows.close(leaving=True)
    assert rows.rows == [0, 1]
    assert rows.finished == set()
    assert rows.mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert rows.cache.layers[0].keys[:, 0, :, 0].tolist()[1] == [0, 1, 3, 5]
    assert rows.cache.layers[0].values[0, 1, 1:, 2].tolist() == [101, 102, 105]


def test_closing_may_keep_settled_rows() -> None:
    rows = decoding([[1, 0, 1], [0, 0, 1]], 0)
    rows.finished = {1}
    assert rows.holes == pytest.approx(1 / 3)
    rows.close(leaving=False)
    assert (rows.rows, rows.finished) == ([0, 1], {1})
    assert rows.mask.tolist() == [[1, 1], [0, 1]]


def test_parts_of_unequal_width_are_joined_at_the_right() -> None:
    joined = join([decoding([[1, 1, 1, 1]], 0), decoding([[0, 1], [1, 1]], 1)])
    assert joined.rows == [0, 1, 2]
    assert joined.generated == [[0], [1], [2]]
    assert joined.mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    assert joined.cache.layers[0].keys[2, 0, :, 0].tolist() == [0, 0, 0, 1]


def at_the_end_of_its_table(tokens: int) -> Lab:
    """A model whose table of positions ends where the longest prompt's response may end."""
    lab = make_lab("gpt2", batch_size=5, tokens=tokens)
    longest = max(len(lab.reference.chat.token_ids(prompt)) for prompt in HARMFUL)
    table = lab.loaded.model.transformer.wpe  # type: ignore[union-attr]
    table.weight = torch.nn.Parameter(table.weight[: longest + tokens - 1].clone(), requires_grad=False)  # type: ignore[union-attr]
    return lab


def test_finished_rows_are_not_fed_beyond_a_table_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts bring the longest prompt's row to its limit while the others, which it waits for, have just begun."""
    lab = at_the_end_of_its_table(14)
    lab.editor.apply(trials(lab, 1)[0])
    expected = whole(lab.reference)[1]
    engine = lab.engine(use_settled_rows=False)
    lab.editor.apply(trials(lab, 1)[0])
    longest = max(range(len(HARMFUL)), key=lambda row: len(lab.reference.chat.token_ids(HARMFUL[row])))
    ids = engine.respond(HARMFUL)
    assert ids is not None
    said = list(ids[longest].ids)

    def propose(self: Drafts, row: int, so_far: Sequence[int], length: int) -> Proposed:
        return said[len(so_far) : len(so_far) + length] if row == longest else ()

    monkeypatch.setattr(Drafts, "propose", propose)
    always_widest(monkeypatch)
    found = engine.respond(HARMFUL)
    assert found is not None
    assert [response.text for response in found] == expected


@pytest.mark.parametrize("tokens", [4, 5, 9, 10])
def test_the_self_check_stays_within_a_table_of_positions(tokens: int) -> None:
    warnings: list[str] = []
    engine = trusted(at_the_end_of_its_table(tokens), warnings)
    assert isinstance(engine, TrialEngine)
    assert engine.drafting
    assert warnings == []
