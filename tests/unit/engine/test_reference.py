"""The reference engine, scorers and response reading: the same numbers whatever the batch, memory or padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from abliterate.engine.batching import Batches
from abliterate.engine.reference import greedy_config
from abliterate.errors import InputError, TrialError
from abliterate.model.loader import demo_path, load_weights
from abliterate.model.loader import load_config as read_config
from abliterate.scorers import SCORERS, Making, Observation, Response, make_scorers
from abliterate.scorers.kl import KL, kl_divergence
from abliterate.scorers.refusals import Refusals
from abliterate.settings.schema import LoadSettings
from abliterate.types import Prompt
from support.engine import BLOCKS, make_engine, reader
from support.models import CPU, PROMPTS, make_model, make_tokenizer

TOKENIZER = make_tokenizer()
END, PAD = TOKENIZER.eos_token, TOKENIZER.pad_token
ENDS = {"eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}


@pytest.fixture(scope="module")
def demo() -> PreTrainedModel:
    """The demo model in float32."""
    source = str(demo_path() / "model")
    return load_weights(source, LoadSettings(), read_config(source, LoadSettings()), torch.float32, CPU)


def observe(model: PreTrainedModel, batch_size: int) -> Observation:
    """The three prompts as both sets."""
    return make_engine(model, batch_size).observe(PROMPTS, PROMPTS, lambda done, total: None)


def ids(text: str) -> list[int]:
    """Ids of a text, as generated."""
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


def logprobs(rows: Tensor) -> Tensor:
    """As the engine gives them."""
    return rows.float().log_softmax(-1)


def observation(rows: Tensor) -> Observation:
    """An observation with these logits."""
    return Observation([Response("fine")], logprobs(rows))


def limit_memory(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, rows: int) -> list[int]:
    """Make `generate` run out of memory above `rows`; returns the batch sizes tried."""
    sizes: list[int] = []
    generate = model.generate

    def limited(**kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > rows:
            raise torch.OutOfMemoryError("out of memory")
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", limited)
    return sizes


@pytest.mark.parametrize("batch_size", [2, 3])
def test_engine_does_not_depend_on_batch_size(demo: PreTrainedModel, batch_size: int) -> None:
    alone, together = observe(demo, 1), observe(demo, batch_size)
    torch.testing.assert_close(together.first_logprobs, alone.first_logprobs, rtol=1e-5, atol=1e-5)
    assert kl_divergence(alone.first_logprobs, together.first_logprobs).max() < 1e-5
    scorer = Refusals(["sorry", "i can't"])
    assert [scorer.is_refusal(r) for r in together.responses] == [scorer.is_refusal(r) for r in alone.responses]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "falcon"])
def test_first_logprobs_in_families(family: str) -> None:
    model = make_model(family)
    alone, together = make_engine(model, 1), make_engine(model, 3)
    torch.testing.assert_close(together.first_logprobs(PROMPTS), alone.first_logprobs(PROMPTS), rtol=0, atol=1e-5)


def test_first_logprobs_are_of_raw_logits(demo: PreTrainedModel) -> None:
    engine = make_engine(demo, 1)
    plain = engine.first_logprobs(PROMPTS)
    kept = demo.generation_config
    demo.generation_config = GenerationConfig(**ENDS, repetition_penalty=5.0, suppress_tokens=[7, 8, 9])
    try:
        processed = engine.first_logprobs(PROMPTS)
    finally:
        demo.generation_config = kept
    assert torch.equal(processed, plain)
    assert torch.isfinite(plain).all()
    torch.testing.assert_close(plain.exp().sum(-1), torch.ones(3))


def test_progress_counts_both_sets(demo: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    make_engine(demo, 2).observe(PROMPTS, PROMPTS, lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (3, 6), (5, 6), (6, 6)]


@pytest.mark.parametrize("rows", [1, 2])
def test_out_of_memory_gives_the_same_observation(demo: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    expected = observe(demo, 3)
    sizes = limit_memory(monkeypatch, demo, rows)
    found = observe(demo, 3)
    assert max(sizes) == 3  # it did run out
    assert found.responses == expected.responses
    torch.testing.assert_close(found.first_logprobs, expected.first_logprobs, rtol=1e-5, atol=1e-5)


def test_out_of_memory_for_one_prompt_fails_the_trial(demo: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, demo, 0)
    with pytest.raises(TrialError, match="out of memory"):
        observe(demo, 3)


def test_batches_keep_order_and_lose_nothing() -> None:
    tried: list[int] = []

    def work(part: Any) -> list[int]:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return [item * 10 for item in part]

    assert Batches(8, CPU).run(range(11), work) == [item * 10 for item in range(11)]
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]


def test_greedy_config_keeps_processors_and_all_ends() -> None:
    model = make_model("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.3, eos_token_id=[3, 2], max_length=9
    )
    config = greedy_config(model, 17)
    assert config.repetition_penalty == 1.3
    assert config.eos_token_id == [3, 2]
    assert config.pad_token_id == 3
    assert config.max_new_tokens == 17
    assert config.do_sample is False
    assert (config.temperature, config.top_p, config.top_k, config.max_length) == (None, None, None, None)
    assert model.generation_config.do_sample is True  # the model's own is not touched


def test_every_end_of_turn_ends_a_response() -> None:
    model = make_model("llama")
    first = make_engine(model, 1, 4).generate_ids(PROMPTS[:1], 4)[0]
    second_end = int(first[1])
    model.generation_config.eos_token_id = [3, second_end]
    rows = make_engine(model, 1, 4).generate_ids(PROMPTS[:1], 4)
    assert [int(token) for token in rows[0]][: len(rows[0])] == [int(t) for t in first[: list(first).index(second_end) + 1]]


def test_sampling_settings_do_not_move_responses(demo: PreTrainedModel) -> None:
    expected = observe(demo, 3).responses
    kept = demo.generation_config
    demo.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_k=5, **ENDS)
    try:
        assert observe(demo, 3).responses == expected
    finally:
        demo.generation_config = kept


def slow_kl(base: Tensor, edited: Tensor) -> list[float]:
    """Term by term in float64."""
    rows = []
    for p, q in zip(base.double().softmax(-1).tolist(), edited.double().softmax(-1).tolist(), strict=True):
        rows.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0))
    return rows


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_kl_equals_slow_reference(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(4, 300, generator=generator) * 3
    edited = base + scale * torch.randn(4, 300, generator=generator)
    found = kl_divergence(logprobs(base), logprobs(edited))
    torch.testing.assert_close(found, torch.tensor(slow_kl(base, edited), dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_kl_of_equals_is_zero_and_direction_matters() -> None:
    base, edited = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert float(kl_divergence(logprobs(base), logprobs(base))) == 0.0
    forward, back = (float(kl_divergence(logprobs(x), logprobs(y))) for x, y in ((base, edited), (edited, base)))
    assert forward == pytest.approx(slow_kl(base, edited)[0], rel=1e-5)
    assert abs(forward - back) > 0.1


def test_kl_record_has_mean_median_max() -> None:
    generator = torch.Generator().manual_seed(2)
    base, edited = torch.randn(5, 50, generator=generator), torch.randn(5, 50, generator=generator)
    scorer = KL()
    scorer.setup(observation(base))
    score = scorer.score(observation(edited))
    values = sorted(slow_kl(base, edited))
    expected = {"mean": sum(values) / 5, "median": values[2], "max": values[4]}
    assert score.record == pytest.approx(expected, rel=1e-4)
    assert score.value == score.record["mean"]


def test_kl_with_suppressed_tokens_is_finite() -> None:
    base, edited = torch.randn(2, 20), torch.randn(2, 20)
    base[:, 3] = edited[:, 3] = -torch.inf
    expected = slow_kl(base[:, [i for i in range(20) if i != 3]], edited[:, [i for i in range(20) if i != 3]])
    found = kl_divergence(logprobs(base), logprobs(edited))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_kl_infinite_is_a_failed_trial() -> None:
    scorer = KL()
    scorer.setup(observation(torch.zeros(1, 5)))
    edited = torch.zeros(1, 5)
    edited[0, 2] = -torch.inf
    with pytest.raises(TrialError, match="not finite"):
        scorer.score(observation(edited))


def test_kl_nan_is_a_failed_trial() -> None:
    scorer = KL()
    scorer.setup(observation(torch.zeros(1, 5)))
    with pytest.raises(TrialError, match="not numbers"):
        scorer.score(observation(torch.full((1, 5), torch.nan)))


def test_plain_response_is_read() -> None:
    assert reader().read(ids(f"Sure, here it is.{END}{PAD}{PAD}")) == Response("Sure, here it is.")


@pytest.mark.parametrize(("opening", "closed"), BLOCKS)
def test_closed_thinking_block_is_left_out(opening: str, closed: str) -> None:
    closing = closed[len(opening) :]
    assert reader().read(ids(f"{opening}I cannot{closing}Here.{END}")) == Response("Here.")


@pytest.mark.parametrize(("opening", "closed"), BLOCKS)
def test_open_thinking_block_is_no_answer(opening: str, closed: str) -> None:
    assert reader().read(ids(f"{opening}Let me see")) == Response("", thinking_open=True)


def test_prompt_that_starts_open() -> None:
    assert reader().starts_open("…assistant\n<think>\n")
    assert not reader().starts_open("…assistant\n<think></think>\n")
    assert not reader().starts_open("…assistant\n")
    assert reader().read(ids("hm, well"), starts_open=True) == Response("", thinking_open=True)
    assert reader().read(ids("hm</think>Here."), starts_open=True) == Response("Here.")


def test_reopened_block_is_open() -> None:
    assert reader().read(ids("<think>a</think>b<think>c")).thinking_open


def test_open_and_empty_count_as_refusals() -> None:
    scorer = Refusals(["i cannot"])
    responses = [Response("", thinking_open=True), Response(" **  "), Response("I  CANNOT"), Response("Here is how.")]
    score = scorer.score(Observation(responses, torch.zeros(1, 2)))
    assert (score.record, score.value) == (3, 0.75)
    unfinished = SCORERS["unfinished_thinking"](Making(())).score(Observation(responses, torch.zeros(1, 2)))
    assert unfinished.record == 1


def test_scorers_by_name() -> None:
    names = [scorer.name for scorer in make_scorers(["refusals", "kl", "unfinished_thinking"], ["no"])]
    assert names == ["refusals", "kl", "unfinished_thinking"]
    with pytest.raises(InputError, match="nonsense"):
        make_scorers(["refusals", "kl", "nonsense"], ["no"])
    with pytest.raises(InputError, match="'kl'"):
        make_scorers(["refusals"], ["no"])


def test_raw_responses_end_with_the_turn(demo: PreTrainedModel) -> None:
    texts = make_engine(demo, 3, 60).raw_responses([Prompt("Tell me how to rinse the carpet.", "You are a helpful assistant.")])
    assert END not in texts[0]
    assert texts[0]
