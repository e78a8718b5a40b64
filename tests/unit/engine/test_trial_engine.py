"""The trial engine gives the reference's numbers: for every switch, chunk, order and batch size."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import random
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from abliterate.engine.decode import Decoding
from abliterate.engine.forward import Passes
from abliterate.engine.prefill import resume_layers
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.trial_engine import Pacing, TrialEngine, Unsupported
from abliterate.errors import Interrupted
from abliterate.evaluation.trial import early_scorer, evaluate
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.generation import rope_switch
from abliterate.objectives import BY_MARKERS
from abliterate.pipeline.calibrate import common_start, prefix_responses
from abliterate.scorers import make_scorers
from abliterate.scorers.base import Observation
from abliterate.scorers.refusals import Refusals
from abliterate.search.front import pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import Baseline, BatchSizes, Trial
from support.engine import (
    HARMFUL,
    HARMLESS,
    TOKENS,
    Lab,
    assert_same,
    last_layer,
    limited,
    make_lab,
    markers_of,
    no_progress,
    short_lab,
    trials,
    whole,
    with_batch_size,
)
from support.models import make_params

SWITCHES = (
    "use_shared_prefix",
    "use_layer_skip",
    "use_certified_stop",
    "use_settled_rows",
    "use_drafts",
    "use_efficient_refusal_detection",
)


@pytest.fixture(scope="module")
def llama() -> Lab:
    """The plainest family."""
    return short_lab("llama")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "qwen3_5"))]
)
def test_each_switch_gives_the_same_numbers(family: str, switch: str) -> None:
    lab = short_lab(family)
    markers = markers_of(whole(lab.reference)[1])
    scorers = [
        make_scorers(["refusals", "kl"], markers, efficient=switch != "use_efficient_refusal_detection" or on) for on in (1, 0)
    ]
    engines = [lab.engine(early_scorer(some), **{switch: bool(on)}) for some, on in zip(scorers, (1, 0), strict=True)]
    for some in scorers:
        for scorer in some:
            scorer.setup(Observation((), lab.reference.first_logprobs(HARMLESS)))
    counts = set()
    for params in trials(lab, 4):
        lab.editor.apply(params)
        never = DominancePruner(((0.0, 99),), BY_MARKERS)
        found = [evaluate(e, some, HARMFUL, HARMLESS, never, no_progress) for e, some in zip(engines, scorers, strict=True)]
        assert len({one.scores["refusals"].record for one in found}) == 1
        assert found[0].scores["kl"].value == pytest.approx(found[1].scores["kl"].value, abs=1e-5)
        counts.add(found[0].scores["refusals"].record)
        if switch == "use_certified_stop" and found[0].scores["refusals"].record:
            limit = DominancePruner(((0.0, found[0].scores["refusals"].record),), BY_MARKERS)
            stopped = [
                evaluate(e, some, HARMFUL, HARMLESS, limit, no_progress) for e, some in zip(engines, scorers, strict=True)
            ]
            # Without the switch all responses are generated, and what the sampler learns is the same.
            assert stopped[0] == stopped[1]
            assert stopped[0].stopped
    assert max(counts) > 0


def test_texts_that_a_model_reads_anew_once_they_are_long_are_left_to_generate() -> None:
    """With LongRoPE, `generate` feeds a text again at the length at which its angles change."""
    lab = short_lab("llama")
    lengths = sorted(len(lab.reference.chat.token_ids(prompt)) for prompt in (*HARMFUL, *HARMLESS))
    config = lab.reference.model.config
    for switch, fits in ((lengths[0], False), (lengths[-1] + lab.reference.max_new_tokens, True), (lengths[0] - 1, True)):
        config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": switch}
        assert rope_switch(config) == switch
        with contextlib.nullcontext() if fits else pytest.raises(Unsupported, match=f"more than {switch} tokens anew"):
            lab.engine()
    config.rope_parameters = {"rope_type": "default"}
    assert rope_switch(config) == 0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_size_gives_the_same_numbers(llama: Lab, size: int) -> None:
    params = make_params(3)
    small = dataclasses.replace(llama, reference=short_lab("llama", batch_size=size).reference)
    small.reference.model = llama.reference.model
    engine = small.engine()
    llama.editor.apply(params)
    assert_same(whole(engine), whole(llama.reference))


@pytest.mark.parametrize(
    "generation",
    [
        {"repetition_penalty": 1.8},
        {"suppress_tokens": list(range(10, 500))},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [3, 200, 201, 202, *range(300, 420)]},
        {"repetition_penalty": 1.5, "min_length": 25, "begin_suppress_tokens": [5, 6, 7]},
        {"forced_eos_token_id": 3},
    ],
    ids=lambda generation: "+".join(generation),
)
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_models_own_processors_apply(family: str, generation: dict[str, Any]) -> None:
    plain, lab = short_lab(family), short_lab(family, generation=generation)
    engine = lab.engine()
    changed = False
    for params in trials(lab, 5):
        lab.editor.apply(params)
        plain.editor.apply(params)
        found = whole(engine)
        assert_same(found, whole(lab.reference))
        changed = changed or found[1] != whole(plain.reference)[1]
    assert changed, "the processor does nothing here"


def test_a_penalty_does_not_see_pads() -> None:
    """Where the pad token is the end token, padding with it would make responses depend on the neighbours' lengths."""
    lab = short_lab("llama", generation={"repetition_penalty": 3.0, "pad_token_id": 3})
    together = [response.text for response in lab.reference.respond(HARMFUL) or []]
    alone = [response.text for prompt in HARMFUL for response in lab.reference.respond([prompt]) or []]
    assert together == alone


def test_unequal_prompts_longer_than_the_window() -> None:
    lab = short_lab("mistral")
    engine = lab.engine()
    lengths = [len(lab.reference.chat.token_ids(prompt)) for prompt in HARMFUL]
    assert min(lengths) > lab.loaded.model.config.sliding_window
    assert len(set(lengths)) > 2
    assert engine.sharing == "left"


def test_what_is_shared_follows_the_cache() -> None:
    expected = {"llama": "between", "gemma3": "left", "mistral": "left", "gpt_oss": "left", "qwen3_5": "none", "lfm2": "none"}
    assert {family: short_lab(family).engine().sharing for family in expected} == expected


def test_layers_below_the_edit_do_not_run(llama: Lab) -> None:
    engine = llama.engine()
    calls: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(llama.loaded.layers)
    ]
    llama.editor.apply(last_layer())
    assert llama.editor.hooks.first_layer == 2
    engine.first_logprobs(HARMLESS)
    for handle in handles:
        handle.remove()
    assert set(calls) == {2}


def test_prefix_is_fed_once(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, int]] = []
    call = Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, ids, *a, **k: fed.append(tuple(ids.shape)) or call(self, ids, *a, **k))
    engine = llama.engine(use_layer_skip=False)
    fed.clear()
    llama.editor.apply(make_params(1))
    whole(engine)
    prefix = engine._sets[(True, HARMFUL)].groups[0].layout.prefix_length
    assert prefix > 5
    assert sum(shape == (1, prefix) for shape in fed) == 1
    fed.clear()
    llama.editor.apply(make_params(2))
    whole(engine)
    assert sum(shape == (1, prefix) for shape in fed) == 1, "another edit needs another prefix"


def test_settled_rows_leave(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.editor.clear()
    scorer = Refusals(markers_of(whole(llama.reference)[1], 0.8))
    rows: list[int] = []
    call = Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, ids, *a, **k: rows.append(ids.shape[0]) or call(self, ids, *a, **k))
    fed = {}
    for leaving in (True, False):
        engine = llama.engine(scorer, use_settled_rows=leaving)
        rows.clear()
        engine.respond(HARMFUL)
        fed[leaving] = sum(rows)
    assert fed[True] < fed[False]


def test_harmless_prompts_fill_no_cache(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    call = Passes.__call__
    monkeypatch.setattr(
        Passes, "__call__", lambda self, *a, keep_cache=True: kept.append(keep_cache) or call(self, *a, keep_cache=keep_cache)
    )
    engine = llama.engine(use_shared_prefix=False)
    kept.clear()
    engine.first_logprobs(HARMLESS)
    assert set(kept) == {False}


def test_a_hopeless_trial_costs_no_response(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine(Refusals(["x"]))
    monkeypatch.setattr(Passes, "__call__", lambda *a, **k: pytest.fail("a pass"))
    assert engine.respond(HARMFUL, limit=0) is None


def test_hardest_prompts_lead(llama: Lab) -> None:
    scorer = Refusals(markers_of(whole(llama.reference)[1], 0.4))
    engine = llama.engine(scorer)
    flags = [scorer.is_refusal(response) for response in engine.respond(HARMFUL) or []]
    assert 0 < sum(flags) < len(flags)
    order = [row for chunk in engine._chunks(engine._sets[(True, HARMFUL)], 1) for row in chunk]
    assert sorted(order) == list(range(len(HARMFUL)))
    assert [flags[row] for row in order] == sorted(flags, reverse=True)


def test_any_order_stops_the_same_trials(llama: Lab) -> None:
    scorer = Refusals(markers_of(whole(llama.reference)[1]))
    engine = llama.engine(scorer)
    history = engine._sets[(True, HARMFUL)].history
    for params in trials(llama, 5):
        llama.editor.apply(params)
        stopped = set()
        for seed in range(4):
            draw = random.Random(seed)
            for row in history:
                row[:] = [draw.randint(0, 5), 5]
            stopped.add(engine.respond(HARMFUL, limit=2) is None)
        assert len(stopped) == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_running_out_of_memory_loses_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = short_lab("llama", batch_size=5)
    expected = whole(lab.reference)
    engine = lab.engine(Refusals(["no such text"]))
    sizes = limited(lab.loaded.model, rows, monkeypatch)
    assert_same(whole(engine), expected)
    assert max(sizes) == 5
    sizes.clear()
    assert_same(whole(engine), expected)
    assert max(sizes) <= rows, "the smaller size is kept"


def test_rows_that_do_not_fit_together_are_done_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", batch_size=5, pacing=Pacing(margin=0, pause=4))
    expected = whole(lab.reference)
    engine = lab.engine(Refusals(["no such text"]))
    sizes = limited(lab.loaded.model, 3, monkeypatch)
    found = engine.respond(HARMFUL, limit=2)
    assert found is not None
    assert [response.text for response in found] == expected[1]
    assert sizes.count(5) == 1, "the chunks of 2 and 3 rows were joined once"


@pytest.mark.parametrize("cap", [4, 2, 1])
def test_rows_that_wait_are_in_memory_too(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device holds `cap` rows, whoever they belong to; the reference would work with that."""
    lab = make_lab("llama", batch_size=4, pacing=Pacing(margin=0, pause=4))
    expected = whole(lab.reference)[1]
    engine = lab.engine(Refusals(["no such text"]))
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    started, call, seen = TrialEngine._started, Passes.__call__, []

    def counting(self: TrialEngine, *args: Any) -> Any:
        decoding = started(self, *args)
        alive.add(decoding)
        return decoding

    def limited_pass(self: Passes, *args: Any, **kwargs: Any) -> Any:
        if sum(len(decoding.rows) for decoding in alive) > cap:
            gc.collect()  # what nobody holds is no memory
        seen.append(sum(len(decoding.rows) for decoding in alive))
        if seen[-1] > cap:
            raise torch.OutOfMemoryError("out of memory")
        return call(self, *args, **kwargs)

    monkeypatch.setattr("abliterate.engine.trial_engine.Decoding", type("Decoding", (Decoding,), {"__hash__": object.__hash__}))
    monkeypatch.setattr(TrialEngine, "_started", counting)
    monkeypatch.setattr(Passes, "__call__", limited_pass)
    found = engine.respond(HARMFUL, limit=1)
    assert found is not None
    assert [response.text for response in found] == expected
    assert max(seen) <= 4, "never more rows than a batch"


def test_on_a_cpu_no_pass_has_more_rows_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is kept of the base model, nor chunks that were joined: no error would come before the killer."""
    lab = short_lab("llama", batch_size=5)
    plain = lab.reference
    sizes = BatchSizes(5, 5, 5, (1000, 1000, 1000))
    reference = ReferenceEngine(plain.model, plain.chat, plain.reader, max_new_tokens=TOKENS, sizes=sizes)
    expected = whole(plain)
    rows: list[int] = []
    call = Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, ids, *a, **k: rows.append(len(ids)) or call(self, ids, *a, **k))
    monkeypatch.setattr("abliterate.model.memory.free_memory", lambda device: 4000)
    engine = dataclasses.replace(lab, reference=reference).engine(Refusals(["no such text"]))
    assert_same(whole(engine), expected)
    assert max(rows) == 2


def test_pauses_change_nothing(llama: Lab) -> None:
    llama.editor.apply(make_params(1))
    expected = whole(llama.reference)[1]
    for pause in (1, 3, 4, 9, 10, 11):
        engine = dataclasses.replace(llama, pacing=Pacing(pause=pause)).engine(Refusals(["no such text"]))
        llama.editor.apply(make_params(1))
        for limit in (1, 3, None):
            found = engine.respond(HARMFUL, limit=limit)
            assert found is not None
            assert [response.text for response in found] == expected


def test_interrupts_are_seen_between_looks(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise Interrupted(2)

    engine = llama.engine()
    monkeypatch.setattr(engine._decode, "_check", interrupted)
    with pytest.raises(Interrupted):
        engine.respond(HARMFUL)


class WholeReader:
    """A scorer of an outsider's: it reads whole responses."""

    name, goal = "length", "none"

    def setup(self, base: Observation) -> None: ...

    def score(self, observation: Observation) -> Any: ...


def test_whole_responses_are_kept_for_scorers_that_need_them(llama: Lab) -> None:
    refusals, kl = make_scorers(["refusals", "kl"], ["a"])
    assert early_scorer([refusals, kl]) is refusals
    assert early_scorer([refusals, kl, WholeReader()]) is None  # type: ignore[list-item]
    assert early_scorer(make_scorers(["refusals", "kl", "unfinished_thinking"], ["a"])) is None


@pytest.mark.parametrize("length", [1, 7, 1000])
def test_shorter_responses_are_the_beginnings_of_whole_ones(llama: Lab, length: int) -> None:
    llama.editor.clear()
    whole = llama.reference.respond(HARMFUL)
    assert whole is not None
    for engine in (llama.reference, llama.engine(), llama.engine(Refusals(["e"]))):
        short = engine.respond(HARMFUL, length=length)
        assert short is not None
        assert all(len(one.ids) <= length for one in short)
        for one, all_of_it in zip(short, whole, strict=True):
            assert one.ids == all_of_it.ids[: len(one.ids)]
    plain, engine = llama.reference.respond(HARMFUL, length=length), llama.engine()
    assert plain is not None
    assert [len(one.ids) for one in plain] == [min(length, len(one.ids)) for one in whole]
    assert engine.respond(HARMFUL, length=length) == plain == engine.respond(HARMFUL, length=length)
    assert engine.respond(HARMFUL) == whole, "what it learned of short responses doesn't shorten whole ones"


@pytest.mark.parametrize("opens", [True, False])
def test_an_open_thinking_block_at_the_limit_is_no_answer(opens: bool) -> None:
    """The prompt ends inside a block (or not), so no marker in the response counts (or any does)."""
    lab = short_lab("llama")
    prefix = "<think>\n" if opens else "\n"
    chat = PromptEncoder(lab.reference.chat.tokenizer, lab.reference.chat.device, prefix)
    reference = ReferenceEngine(
        lab.reference.model, chat, lab.reference.reader, max_new_tokens=TOKENS, sizes=BatchSizes.same(3)
    )
    scorer = Refusals([" ", "e", "a"])
    engine = dataclasses.replace(lab, reference=reference).engine(scorer)
    expected, found = reference.respond(HARMFUL), engine.respond(HARMFUL)
    assert expected is not None
    assert found is not None
    assert [response.thinking_open for response in found] == [response.thinking_open for response in expected]
    assert all(response.thinking_open for response in expected) == opens
    assert [scorer.is_refusal(r) for r in found] == [scorer.is_refusal(r) for r in expected]


@pytest.mark.parametrize(
    ("margin", "pause", "batch_size"),
    [
        (4, 4, 3),
        (0, 1, 5),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in ((1, 9, 2), (9, 24, 1))),
    ],
)
def test_the_front_is_that_of_full_evaluation(llama: Lab, margin: int, pause: int, batch_size: int) -> None:
    """For any order, chunk and batch size."""
    llama.editor.clear()
    markers = markers_of(whole(llama.reference)[1], 0.8)
    scorers = make_scorers(["refusals", "kl"], markers)
    base = Observation(llama.reference.respond(HARMFUL) or [], llama.reference.first_logprobs(HARMLESS))
    for scorer in scorers:
        scorer.setup(base)
    baseline = Baseline(sum(Refusals(markers).is_refusal(r) for r in base.responses), len(HARMFUL))
    assert baseline.refusals >= 3
    reference = with_batch_size(llama.reference, batch_size)
    sized = dataclasses.replace(llama, reference=reference, pacing=Pacing(margin=margin, pause=pause))
    engine = sized.engine(early_scorer(scorers))
    params = trials(llama, 25)

    def evaluated(on: TrialEngine | ReferenceEngine, number: int, certificate: DominancePruner) -> Trial:
        llama.editor.apply(params[number])
        found = evaluate(on, scorers, HARMFUL, HARMLESS, certificate, no_progress)
        records = {name: score.record for name, score in found.scores.items()}
        return Trial(number, params[number], "stopped" if found.stopped else "complete", records)

    never = DominancePruner(((0.0, 10**6),), BY_MARKERS)
    whole_trials = [evaluated(llama.reference, number, never) for number in range(len(params))]  # in any order the same
    for seed in range(2):
        order = random.Random(seed + batch_size).sample(range(len(params)), len(params))
        full, stopped = [whole_trials[number] for number in order], list[Trial]()
        for number in order:
            stopped.append(evaluated(engine, number, DominancePruner.of(stopped, baseline, BY_MARKERS)))
        assert any(trial.state == "stopped" for trial in stopped)
        # By position, not number: of exact ties the first that was evaluated stays.
        renumbered = [[dataclasses.replace(t, number=place) for place, t in enumerate(part)] for part in (full, stopped)]
        fronts = [pareto_front(part, baseline, BY_MARKERS) for part in renumbered]
        assert [(t.number, t.refusals) for t in fronts[0]] == [(t.number, t.refusals) for t in fronts[1]]


def test_prefix_responses_stop_at_divergence(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    llama.editor.clear()
    passes: list[int] = []
    call = Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, *a, **k: passes.append(1) or call(self, *a, **k))
    long = ReferenceEngine(
        llama.reference.model, llama.reference.chat, llama.reference.reader, max_new_tokens=40, sizes=BatchSizes.same(9)
    )
    cut = prefix_responses(long, llama.loaded.layers, EfficiencySettings(), HARMFUL)
    assert len(passes) < 10
    expected = long.raw_responses(HARMFUL)
    assert all(text.startswith(start.rstrip("\ufffd")) for text, start in zip(expected, cut, strict=True))
    off = prefix_responses(long, llama.loaded.layers, EfficiencySettings(use_trial_engine=False), HARMFUL)
    assert off == expected
    monkeypatch.setattr(TrialEngine, "raw_responses", lambda *given: [][0])  # what code that the engine can't run may raise
    assert prefix_responses(long, llama.loaded.layers, EfficiencySettings(), HARMFUL) == expected


def test_prefix_responses_in_small_batches(llama: Lab) -> None:
    llama.editor.clear()
    small = ReferenceEngine(
        llama.reference.model, llama.reference.chat, llama.reference.reader, max_new_tokens=30, sizes=BatchSizes.same(2)
    )
    cut = prefix_responses(small, llama.loaded.layers, EfficiencySettings(), HARMFUL)
    assert common_start(cut) == common_start(small.raw_responses(HARMFUL))


def test_start_layers_save_most() -> None:
    assert resume_layers([0, 0]) == ()
    assert resume_layers([3] * 5) == (3,)
    firsts = [random.Random(seed).randint(0, 20) for seed in range(200)]
    chosen = resume_layers(firsts)
    assert len(chosen) == 4

    def skipped(starts: Sequence[int]) -> int:
        return sum(max((start for start in starts if start <= first), default=0) for first in firsts)

    best = max(skipped(some) for some in itertools.combinations(range(21), 4))
    assert skipped(chosen) > 0.95 * best


def no_edit_left(model: PreTrainedModel) -> Iterator[str]:
    """Names of layers whose forward is not their own."""
    for name, module in model.named_modules():
        if "forward" in module.__dict__:
            yield name


def test_skipping_leaves_the_model_as_it_was(llama: Lab) -> None:
    engine = llama.engine()
    llama.editor.apply(make_params(1))
    whole(engine)
    llama.editor.clear()
    assert list(no_edit_left(llama.loaded.model)) == []
    assert all(not layer._forward_pre_hooks for layer in llama.loaded.layers)


def test_keeping_states_shows_progress() -> None:
    lab, seen = make_lab("llama", batch_size=2), list[tuple[int, int]]()
    engine = lab.engine()
    engine.prepare(HARMFUL, HARMLESS, range(len(lab.loaded.layers)), progress=lambda done, total: seen.append((done, total)))
    total = len(HARMFUL) + len(HARMLESS)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) >= 4, "once a chunk"
    assert seen[-1] == (total, total)
