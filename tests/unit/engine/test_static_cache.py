"""Decoding in static buffers, as it is and by graphs, gives the reference's responses and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from abliterate.engine import static_cache, trial_engine
from abliterate.engine.self_check import check
from abliterate.engine.static_cache import Bucket, StaticCache, column_bucket, row_bucket
from abliterate.engine.trial_engine import Pacing, TrialEngine
from abliterate.scorers.refusals import Refusals
from support.engine import (
    HARMFUL,
    Lab,
    assert_same,
    limited,
    make_lab,
    make_setup,
    markers_of,
    short_lab,
    trials,
    trusted,
    whole,
)
from support.recorded import Recorder


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> list[Bucket]:
    """The buckets of the passes, in order; columns are in buckets of 8, so that responses cross some."""
    monkeypatch.setattr(static_cache, "COLUMNS", 8)
    seen: list[Bucket] = []
    run = StaticCache._pass
    monkeypatch.setattr(StaticCache, "_pass", lambda self, bucket: seen.append(bucket) or run(self, bucket))
    return seen


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Passes are captured as on CUDA."""
    recorder = Recorder()
    monkeypatch.setattr(trial_engine, "capture_of", lambda model, device: recorder)
    return recorder


def test_buckets() -> None:
    assert [row_bucket(rows) for rows in (1, 2, 3, 5, 9, 16, 17, 33, 100)] == [1, 2, 4, 8, 16, 16, 32, 48, 112]
    assert [column_bucket(columns) for columns in (1, 64, 65, 129)] == [64, 64, 128, 192]


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("qwen2", "qwen3", "phi3", "gpt2", "olmo2")]


@pytest.mark.parametrize("family", ["llama", "falcon", "qwen3_moe", *SLOW])
def test_responses_and_logits_are_the_references(family: str, buckets: list[Bucket]) -> None:
    """Chunks pause and are joined, rows leave, and the self-check compares logits."""
    lab = make_lab(family, batch_size=5, tokens=12, pacing=Pacing(margin=0, pause=4))
    markers = markers_of(whole(lab.reference)[1], 0.6)
    engine, cutting = lab.engine(use_static_cache=True), lab.engine(Refusals(markers), use_static_cache=True)
    assert engine.static
    assert not engine.drafting
    for params in trials(lab, 2):
        expected = lab.expected(params)
        buckets.clear()
        assert_same(whole(engine), expected)
        assert {rows for rows, _ in buckets} == {8}
        assert len({columns for _, columns in buckets}) > 1
        found = cutting.respond(HARMFUL, limit=len(HARMFUL) + 1)
        assert found is not None
        for response, text in zip(found, expected[1], strict=True):
            assert text.startswith(response.text)
        assert check(engine, make_setup(lab)).difference < 1e-4
    assert {1, 2, 4} & {rows for rows, _ in buckets}, "no row left"


def test_the_same_passes_as_without_buffers() -> None:
    """Logits are equal within rounding where a batch pauses, is joined with another one, and loses a row."""
    lab = short_lab("llama")
    plain, static = lab.engine(use_drafts=False), lab.engine(use_static_cache=True)
    lab.editor.apply(trials(lab, 1)[0])
    tokens = torch.randint(5, 300, (4, 7), generator=torch.Generator().manual_seed(0))
    for found, expected in zip(
        static.forced_logits(HARMFUL, range(4), tokens), plain.forced_logits(HARMFUL, range(4), tokens), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("generation", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}], ids=str)
def test_the_models_own_processors_apply(generation: dict[str, float]) -> None:
    lab = short_lab("llama", generation=generation)
    engine = lab.engine(use_static_cache=True)
    expected = lab.expected(trials(lab, 1)[0])
    assert_same(whole(engine), expected)


def test_what_a_broken_trial_left_hurts_no_later_one() -> None:
    """Hidden columns count 0 times their value, which is not a number if a trial before left infinity there."""
    lab = short_lab("llama", batch_size=5)
    engine = lab.engine(use_static_cache=True)
    params = trials(lab, 1)[0]
    lab.editor.apply(params)
    expected = whole(engine)
    buffers = engine._decode._static
    assert buffers is not None
    with torch.inference_mode():
        for pair in buffers._states:
            for states in pair:
                states.fill_(torch.inf)
    assert_same(whole(engine), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_running_out_of_memory_loses_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = short_lab("llama", batch_size=5)
    expected = whole(lab.reference)
    engine = lab.engine(Refusals(["no such text"]), use_static_cache=True)
    sizes = limited(lab.loaded.model, rows, monkeypatch)
    responses = engine.respond(HARMFUL)
    assert responses is not None
    assert [response.text for response in responses] == expected[1]
    assert max(sizes) > rows
    assert sizes.count(rows) > 1


def test_a_prefill_that_runs_out_of_memory_gives_the_buffers_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold a whole batch, and batches needn't shrink to one prompt beside them."""
    engine = short_lab("llama", batch_size=5).engine(use_static_cache=True)
    expected, released = engine.first_logprobs(HARMFUL), list[bool]()
    prefill = type(engine._prefill).__call__

    def limited(self: Any, group: Any, rows: torch.Tensor, **options: Any) -> Any:
        if len(rows) > 2 or not released:
            raise torch.OutOfMemoryError("out of memory")
        return prefill(self, group, rows, **options)

    monkeypatch.setattr(type(engine._prefill), "__call__", limited)
    monkeypatch.setattr(engine._decode, "release", lambda: released.append(True))
    torch.testing.assert_close(engine.first_logprobs(HARMFUL), expected, rtol=1e-4, atol=1e-5)
    assert released


def test_buffers_go_when_a_prefill_finds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of the largest batch so far, and a prefill needs its own cache beside them."""
    lab = short_lab("llama", batch_size=3)
    engine = lab.engine(Refusals(["no such text"]), use_static_cache=True)
    expected = [response.text for response in engine.respond(HARMFUL) or ()]
    static, started = engine._decode._static, TrialEngine._started
    assert static is not None
    assert static._states

    def no_room(self: TrialEngine, *given: Any) -> Any:
        if static._states and len(static._mask) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return started(self, *given)

    monkeypatch.setattr(TrialEngine, "_started", no_room)
    assert [response.text for response in engine.respond(HARMFUL) or ()] == expected


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "gpt_oss"])
def test_other_caches_stay_as_they_are(family: str) -> None:
    engine = short_lab(family).engine(use_static_cache=True)
    assert not engine.static
    assert "can't be static" in engine.left_out["static"]


def test_a_model_that_the_buffers_dont_suit_is_decoded_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lab, warnings = short_lab("llama"), list[str]()
    monkeypatch.setattr(StaticCache, "_pass", lambda self, bucket: torch.zeros(bucket[0], 1024))
    engine = trusted(lab, warnings, use_static_cache=True)
    assert isinstance(engine, TrialEngine)
    assert not engine.static
    assert engine.drafting
    assert len(warnings) == 1


def graphs_lab() -> tuple[Lab, TrialEngine]:
    lab = make_lab("llama", batch_size=3, tokens=12, pacing=Pacing(pause=5))
    return lab, lab.engine(use_static_cache=True)


def test_graphs_give_the_same_numbers(recorder: Recorder, buckets: list[Bucket]) -> None:
    """Each trial has other factors and other edited modules; a graph of an earlier trial would compute its edit."""
    lab, engine = graphs_lab()
    for params in (*trials(lab, 2), trials(lab, 1)[0]):
        before = len(recorder.graphs)
        buckets.clear()
        expected = lab.expected(params)
        assert_same(whole(engine), expected)
        new = recorder.graphs[before:]
        assert new
        # A bucket's first pass runs as it is, and one more call of Python records it.
        assert len(buckets) == len(set(buckets)) + len(new)
        assert sum(graph.replays for graph in new) > len(new)


def test_graphs_are_kept_while_the_edit_stays_and_dropped_with_the_buffers(recorder: Recorder) -> None:
    lab, engine = graphs_lab()
    lab.editor.apply(trials(lab, 1)[0])
    expected = whole(engine)
    captured = len(recorder.graphs)
    assert_same(whole(engine), expected)
    assert len(recorder.graphs) == captured
    buffers = engine._decode._static
    assert buffers is not None
    buffers.release()
    assert_same(whole(engine), expected)
    assert len(recorder.graphs) == 2 * captured


def test_a_failing_capture_leaves_plain_passes_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(waiting="index_copy_")
    monkeypatch.setattr(trial_engine, "capture_of", lambda model, device: recorder)
    lab, engine = graphs_lab()
    params = trials(lab, 1)[0]
    expected = lab.expected(params)
    assert_same(whole(engine), expected)
    assert recorder.graphs == []
    assert "can't be captured as CUDA graphs (operation not permitted" in engine.left_out["graphs"]


def test_a_capture_without_memory_counts_as_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(work: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(trial_engine, "capture_of", lambda model, device: capture)
    lab, engine = graphs_lab()
    lab.editor.apply(trials(lab, 1)[0])
    with pytest.raises(Exception, match="out of memory even for a single prompt"):
        engine.respond(HARMFUL)
    assert "graphs" not in engine.left_out


def test_several_devices_are_not_captured() -> None:
    model = dataclasses.replace(make_lab("llama").loaded).model
    assert trial_engine.capture_of(model, torch.device("cpu")) is None
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}  # type: ignore[assignment]
    assert trial_engine.capture_of(model, torch.device("cuda", 0)) is None
