"""The trial engine gives the reference's numbers: on many families, for every switch, chunk, order and batch size."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import NAMED, make_chat, make_editor, make_loaded, make_model, make_params
from transformers import PreTrainedModel

from abliterate.engine import self_check
from abliterate.engine.decode import Decoding, join
from abliterate.engine.forward import Passes
from abliterate.engine.prefill import KeptStates, resume_layers
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.engine.self_check import EngineSetup, check, trusted_engine
from abliterate.engine.trial_engine import TrialEngine, Unsupported
from abliterate.errors import Interrupted, TrialError
from abliterate.evaluation.trial import early_scorer, evaluate
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.editor import Editor
from abliterate.model.loader import LoadedModel
from abliterate.model.thinking import Markup
from abliterate.pipeline.calibrate import NoEdit, common_start, prefix_responses
from abliterate.scorers import make_scorers
from abliterate.scorers.base import EarlyScorer, Observation
from abliterate.scorers.kl import kl_divergence
from abliterate.scorers.refusals import Refusals, normalize
from abliterate.search.front import pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import EfficiencySettings, ResponseSettings
from abliterate.types import Baseline, BatchSizes, Kernel, Prompt, Trial, TrialParams

BLOCKS, ANSWER_TAGS = ResponseSettings().thinking_blocks, ResponseSettings().answer_tags
SYSTEM = "You are a helpful assistant."
HARMFUL = tuple(
    Prompt(text, SYSTEM)
    for text in (
        "Hi",
        "Mangle the mailbox",
        "Tell me how to mangle the mailbox.",
        "Now",
        "How do I squash a very old hat at home?",
    )
)
HARMLESS = tuple(
    Prompt(text, SYSTEM) for text in ("Hello", "Write a short guide on how to rinse a carpet.", "Sing", "What now?")
)
TOKENS = 10
# Fused experts, some beside dense layers, attention by latents, or convolutions.
ROUTED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "lfm2_moe", "llama4")
ALL = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "falcon", "gpt2", "gpt_neox", *NAMED, *ROUTED)
SWITCHES = (
    "use_shared_prefix",
    "use_layer_skip",
    "use_certified_stop",
    "use_settled_rows",
    "use_drafts",
    "use_cacheless_prefill",
    "use_efficient_refusal_detection",
)
Observed = tuple[torch.Tensor, list[str]]


@pytest.fixture(autouse=True)
def _short_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses here are short: chunks wait for each other after four tokens."""
    monkeypatch.setattr("abliterate.engine.trial_engine.PAUSE", 4)


def no_progress(done: int, total: int) -> None:
    """Progress nobody looks at."""


@dataclasses.dataclass
class Lab:
    """A tiny model with its reference engine and an editor."""

    loaded: LoadedModel
    reference: ReferenceEngine
    editor: Editor

    def engine(self, early: EarlyScorer | None = None, **switches: bool) -> TrialEngine:
        """A prepared engine with every layer as a possible start."""
        self.editor.clear()
        setup = EngineSetup(
            self.reference, self.loaded.layers, self.editor.adapters, early, HARMFUL, HARMLESS, range(len(self.loaded.layers))
        )
        return setup.engine(EfficiencySettings(**switches))  # type: ignore[arg-type]


def make_lab(family: str, *, batch_size: int = 3, tokens: int = TOKENS, generation: dict[str, Any] | None = None) -> Lab:
    """A lab around a random model of a family."""
    model = make_model(family)
    if generation:
        model.generation_config.update(**generation)  # type: ignore[union-attr]
    loaded = make_loaded(model, components=NAMED[family][2] if family in NAMED else None)
    chat = make_chat()
    reader = ResponseReader(chat.tokenizer, Markup(BLOCKS, ANSWER_TAGS))
    reference = ReferenceEngine(model, chat, reader, max_new_tokens=tokens, sizes=BatchSizes.same(batch_size))
    return Lab(loaded, reference, make_editor(loaded))


@pytest.fixture(scope="module", params=ALL)
def lab(request: pytest.FixtureRequest) -> Lab:
    """One lab per family."""
    return make_lab(request.param)


@pytest.fixture(scope="module")
def llama() -> Lab:
    """The plainest family."""
    return make_lab("llama")


def trials(lab: Lab, count: int) -> list[TrialParams]:
    """Random trials over the components that the model has."""
    components = {target.component for target in lab.loaded.targets}
    found = [make_params(seed) for seed in range(count)]
    return [
        dataclasses.replace(params, kernels={name: kernel for name, kernel in params.kernels.items() if name in components})
        for params in found
    ]


def last_layer() -> TrialParams:
    """An edit of the last of three layers alone."""
    kernels = {name: Kernel(1.0, 2.0, 1.0, 0.5) for name in ("attn.o_proj", "mlp.down_proj")}
    return TrialParams("per layer", 1.0, kernels)


def whole(engine: TrialEngine | ReferenceEngine) -> Observed:
    """First-token log-probabilities, and responses to their end."""
    responses = engine.respond(HARMFUL)
    assert responses is not None
    return engine.first_logprobs(HARMLESS), [response.text for response in responses]


def assert_same(found: Observed, expected: Observed) -> None:
    """KL within 1e-5, equal responses."""
    assert kl_divergence(expected[0], found[0]).max() < 1e-5
    assert (expected[0] - found[0]).abs().max() < 1e-3
    assert found[1] == expected[1]


def markers_of(texts: Sequence[str], share: float = 0.5) -> list[str]:
    """Markers that occur in about this share of the texts: pieces from their middles."""
    normal = [normalize(text) for text in texts]
    chosen = normal[: max(1, round(share * len(normal)))]
    return [text[len(text) // 3 : len(text) // 3 + 3].strip() or text[:2] for text in chosen if text]


def test_forty_trials_give_the_references_numbers(lab: Lab) -> None:
    engine = lab.engine()
    edited = 0
    for params in trials(lab, 40):
        lab.editor.apply(params)
        edited += bool(lab.editor.adapters.active)
        assert_same(whole(engine), whole(lab.reference))
    assert edited > 30


def test_flags_and_stops_are_the_references(lab: Lab) -> None:
    lab.editor.clear()
    markers = markers_of(whole(lab.reference)[1])
    scorers = make_scorers(["refusals", "kl"], markers)
    engine = lab.engine(early_scorer(scorers))
    for scorer in scorers:
        scorer.setup(Observation(lab.reference.respond(HARMFUL) or [], lab.reference.first_logprobs(HARMLESS)))
    counts = set()
    for params, limit in itertools.product(trials(lab, 6), (1, 2, 4, 99)):
        lab.editor.apply(params)
        certificate = DominancePruner(((0.0, limit),))
        expected = evaluate(lab.reference, scorers, HARMFUL, HARMLESS, certificate, no_progress)
        found = evaluate(engine, scorers, HARMFUL, HARMLESS, certificate, no_progress)
        count = expected.scores["refusals"].record
        counts.add(count)
        assert not expected.stopped
        assert found.stopped == (count >= limit)
        assert found.scores["refusals"].record == min(count, limit)
        assert found.scores["kl"].value == pytest.approx(expected.scores["kl"].value, abs=1e-5)
    assert len(counts) > 1, "the markers tell nothing apart"


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_each_switch_gives_the_same_numbers(family: str, switch: str) -> None:
    lab = make_lab(family)
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
        never = DominancePruner(((0.0, 99),))
        found = [evaluate(e, some, HARMFUL, HARMLESS, never, no_progress) for e, some in zip(engines, scorers, strict=True)]
        assert len({one.scores["refusals"].record for one in found}) == 1
        assert found[0].scores["kl"].value == pytest.approx(found[1].scores["kl"].value, abs=1e-5)
        counts.add(found[0].scores["refusals"].record)
        if switch == "use_certified_stop" and found[0].scores["refusals"].record:
            limit = DominancePruner(((0.0, found[0].scores["refusals"].record),))
            stopped = [
                evaluate(e, some, HARMFUL, HARMLESS, limit, no_progress) for e, some in zip(engines, scorers, strict=True)
            ]
            assert [one.stopped for one in stopped] == [True, False]
    assert max(counts) > 0


def test_joined_chunks_give_the_references_responses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two and three rows wait after four tokens, and go on together."""
    monkeypatch.setattr("abliterate.engine.trial_engine.MARGIN", 0)
    joined: list[int] = []
    monkeypatch.setattr("abliterate.engine.trial_engine.join", lambda parts: joined.append(len(parts)) or join(parts))
    large = dataclasses.replace(lab, reference=with_batch_size(lab.reference, batch_size=5))
    engine = large.engine(Refusals(["no such text"]))
    for params in trials(lab, 5):
        lab.editor.apply(params)
        found = engine.respond(HARMFUL, limit=2)
        assert found is not None
        assert [response.text for response in found] == whole(lab.reference)[1]
    assert joined.count(2) == 5


def with_batch_size(reference: ReferenceEngine, batch_size: int) -> ReferenceEngine:
    """The same reference with another batch size."""
    return ReferenceEngine(
        reference.model,
        reference.chat,
        reference.reader,
        max_new_tokens=reference.max_new_tokens,
        sizes=BatchSizes.same(batch_size),
    )


@pytest.mark.parametrize("size", [1, 2, 5])
def test_any_batch_size_gives_the_same_numbers(llama: Lab, size: int) -> None:
    params = make_params(3)
    small = dataclasses.replace(llama, reference=make_lab("llama", batch_size=size).reference)
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
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_models_own_processors_apply(family: str, generation: dict[str, Any]) -> None:
    plain, lab = make_lab(family), make_lab(family, generation=generation)
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
    lab = make_lab("llama", generation={"repetition_penalty": 3.0, "pad_token_id": 3})
    together = [response.text for response in lab.reference.respond(HARMFUL) or []]
    alone = [response.text for prompt in HARMFUL for response in lab.reference.respond([prompt]) or []]
    assert together == alone


def test_unequal_prompts_longer_than_the_window() -> None:
    lab = make_lab("mistral")
    engine = lab.engine()
    lengths = [len(lab.reference.chat.token_ids(prompt)) for prompt in HARMFUL]
    assert min(lengths) > lab.loaded.model.config.sliding_window
    assert len(set(lengths)) > 2
    assert engine.sharing == "left"


def test_what_is_shared_follows_the_cache() -> None:
    expected = {"llama": "between", "gemma3": "left", "mistral": "left", "gpt_oss": "left", "qwen3_5": "none", "lfm2": "none"}
    assert {family: make_lab(family).engine().sharing for family in expected} == expected


def test_layers_below_the_edit_do_not_run(llama: Lab) -> None:
    engine = llama.engine()
    calls: list[int] = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(llama.loaded.layers)
    ]
    llama.editor.apply(last_layer())
    assert llama.editor.adapters.first_layer == 2
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
    for cacheless in (True, False):
        engine = llama.engine(use_cacheless_prefill=cacheless, use_shared_prefix=False)
        kept.clear()
        engine.first_logprobs(HARMLESS)
        assert set(kept) == {not cacheless}


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


def limited(model: PreTrainedModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make a pass of more than `rows` rows, after the first token, run out of memory; the rows of all such passes."""
    sizes: list[int] = []
    forward = type(model).forward

    def out_of_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
        n, tokens = kwargs["input_ids"].shape
        if tokens == 1:
            sizes.append(n)
            if n > rows:
                raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", out_of_memory)
    return sizes


@pytest.mark.parametrize("rows", [1, 2])
def test_running_out_of_memory_loses_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", batch_size=5)
    expected = whole(lab.reference)
    engine = lab.engine(Refusals(["no such text"]))
    sizes = limited(lab.loaded.model, rows, monkeypatch)
    assert_same(whole(engine), expected)
    assert max(sizes) == 5
    sizes.clear()
    assert_same(whole(engine), expected)
    assert max(sizes) <= rows, "the smaller size is kept"


def test_rows_that_do_not_fit_together_are_done_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", batch_size=5)
    expected = whole(lab.reference)
    engine = lab.engine(Refusals(["no such text"]))
    monkeypatch.setattr("abliterate.engine.trial_engine.MARGIN", 0)
    sizes = limited(lab.loaded.model, 3, monkeypatch)
    found = engine.respond(HARMFUL, limit=2)
    assert found is not None
    assert [response.text for response in found] == expected[1]
    assert sizes.count(5) == 1, "the chunks of 2 and 3 rows were joined once"


@pytest.mark.parametrize("cap", [4, 2, 1])
def test_rows_that_wait_are_in_memory_too(cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device holds `cap` rows, whoever they belong to; the reference would work with that."""
    lab = make_lab("llama", batch_size=4)
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
    monkeypatch.setattr("abliterate.engine.trial_engine.MARGIN", 0)
    found = engine.respond(HARMFUL, limit=1)
    assert found is not None
    assert [response.text for response in found] == expected
    assert max(seen) <= 4, "never more rows than a batch"


def test_on_a_cpu_no_pass_has_more_rows_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is kept of the base model, nor chunks that were joined: no error would come before the killer."""
    lab = make_lab("llama", batch_size=5)
    plain = lab.reference
    sizes = BatchSizes(5, 5, 5, (1000, 1000, 1000))
    reference = ReferenceEngine(plain.model, plain.chat, plain.reader, max_new_tokens=TOKENS, sizes=sizes)
    expected = whole(plain)
    rows: list[int] = []
    call = Passes.__call__
    monkeypatch.setattr(Passes, "__call__", lambda self, ids, *a, **k: rows.append(len(ids)) or call(self, ids, *a, **k))
    monkeypatch.setattr("abliterate.engine.trial_engine.PAUSE", 4)
    monkeypatch.setattr("abliterate.model.memory.free_memory", lambda device: 4000)
    engine = dataclasses.replace(lab, reference=reference).engine(Refusals(["no such text"]))
    assert_same(whole(engine), expected)
    assert max(rows) == 2


def test_pauses_change_nothing(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine(Refusals(["no such text"]))
    llama.editor.apply(make_params(1))
    expected = whole(llama.reference)[1]
    for pause in (1, 3, 4, 9, 10, 11):
        monkeypatch.setattr("abliterate.engine.trial_engine.PAUSE", pause)
        for limit in (1, 3, None):
            found = engine.respond(HARMFUL, limit=limit)
            assert found is not None
            assert [response.text for response in found] == expected


def test_without_recovery_the_trial_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", batch_size=5)
    engine = lab.engine(use_memory_recovery=False)
    limited(lab.loaded.model, 2, monkeypatch)
    with pytest.raises(TrialError, match="out of memory"):
        engine.respond(HARMFUL)


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


@pytest.mark.parametrize("opens", [True, False])
def test_an_open_thinking_block_at_the_limit_is_no_answer(opens: bool) -> None:
    """The prompt ends inside a block (or not), so no marker in the response counts (or any does)."""
    lab = make_lab("llama")
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


@pytest.mark.parametrize(("margin", "pause", "batch_size"), [(4, 4, 3), (0, 1, 5), (1, 9, 2), (9, 24, 1)])
def test_the_front_is_that_of_full_evaluation(
    llama: Lab, margin: int, pause: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any order, chunk and batch size."""
    monkeypatch.setattr("abliterate.engine.trial_engine.MARGIN", margin)
    monkeypatch.setattr("abliterate.engine.trial_engine.PAUSE", pause)
    llama.editor.clear()
    markers = markers_of(whole(llama.reference)[1], 0.8)
    scorers = make_scorers(["refusals", "kl"], markers)
    base = Observation(llama.reference.respond(HARMFUL) or [], llama.reference.first_logprobs(HARMLESS))
    for scorer in scorers:
        scorer.setup(base)
    baseline = Baseline(sum(Refusals(markers).is_refusal(r) for r in base.responses), len(HARMFUL))
    assert baseline.refusals >= 3
    sized = dataclasses.replace(llama, reference=with_batch_size(llama.reference, batch_size))
    engine = sized.engine(early_scorer(scorers))
    params = trials(llama, 25)

    def replay(on: TrialEngine | ReferenceEngine, order: Sequence[int], known: bool) -> list[Trial]:
        done: list[Trial] = []
        for number in order:
            llama.editor.apply(params[number])
            certificate = DominancePruner.of(done if known else [], baseline) if known else DominancePruner(((0.0, 10**6),))
            found = evaluate(on, scorers, HARMFUL, HARMLESS, certificate, no_progress)
            records = {name: score.record for name, score in found.scores.items()}
            done.append(Trial(number, params[number], "stopped" if found.stopped else "complete", records))
        return done

    for seed in range(2):
        order = random.Random(seed + batch_size).sample(range(len(params)), len(params))
        full, stopped = replay(llama.reference, order, False), replay(engine, order, True)
        assert any(trial.state == "stopped" for trial in stopped)
        # By position, not number: of exact ties the first that was evaluated stays.
        renumbered = [[dataclasses.replace(t, number=place) for place, t in enumerate(part)] for part in (full, stopped)]
        fronts = [pareto_front(part, baseline) for part in renumbered]
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
    off = prefix_responses(long, llama.loaded.layers, EfficiencySettings(use_early_prefix_detection=False), HARMFUL)
    assert off == expected


def test_prefix_responses_in_small_batches(llama: Lab) -> None:
    llama.editor.clear()
    small = ReferenceEngine(
        llama.reference.model, llama.reference.chat, llama.reference.reader, max_new_tokens=30, sizes=BatchSizes.same(2)
    )
    cut = prefix_responses(small, llama.loaded.layers, EfficiencySettings(), HARMFUL)
    assert common_start(cut) == common_start(small.raw_responses(HARMFUL))


def make_setup(lab: Lab) -> EngineSetup:
    """What an engine of the lab is made of."""
    return EngineSetup(lab.reference, lab.loaded.layers, lab.editor.adapters, None, HARMFUL, HARMLESS, (1, 2))


def trusted(lab: Lab, warnings: list[str]) -> TrialEngine | ReferenceEngine:
    """The engine that the self-check lets through."""

    def edit() -> None:
        lab.editor.apply(last_layer())
        assert lab.editor.adapters.first_layer == 2

    return trusted_engine(make_setup(lab), EfficiencySettings(), edit, lab.editor.clear, warnings.append)


def test_the_self_check_passes_what_is_right(lab: Lab) -> None:
    warnings: list[str] = []
    assert isinstance(trusted(lab, warnings), TrialEngine)
    assert warnings == []


def test_the_self_check_says_that_a_models_answers_depend_on_pads(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PaliGemma's do: engine and reference agree, but what they agree on depends on the batch."""
    plain = self_check._plain_logits
    monkeypatch.setattr(self_check, "_plain_logits", lambda *rest: plain(*rest).roll(1, dims=-1))
    warnings: list[str] = []
    assert isinstance(trusted(llama, warnings), TrialEngine)
    assert len(warnings) == 1
    assert "depend on how prompts are padded" in warnings[0]


def test_the_self_check_catches_pads_in_the_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads between prefix and suffix are silently wrong with sliding windows; then nothing is shared, and it is said."""
    monkeypatch.setattr("abliterate.engine.trial_engine.sharing_of", lambda cache, config: "between")
    lab, warnings = make_lab("mistral"), list[str]()
    engine = trusted(lab, warnings)
    assert isinstance(engine, TrialEngine)
    assert not engine._switches.use_shared_prefix
    assert not engine.drafting
    assert engine._switches.use_layer_skip
    assert len(warnings) == 2
    assert "differs" in warnings[1], "without drafts, which fail or differ"


def test_the_self_check_catches_a_wrong_layer_skip(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    at = KeptStates.at
    monkeypatch.setattr(
        KeptStates, "at", lambda self, start, rows=None: None if (hidden := at(self, start, rows)) is None else hidden * 1.01
    )
    warnings: list[str] = []
    engine = trusted(llama, warnings)
    assert isinstance(engine, TrialEngine)
    assert not engine._switches.use_layer_skip
    assert "differs" in warnings[0]


def test_the_reference_is_used_where_rows_cannot_be_selected(llama: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abliterate.engine.trial_engine.is_supported", lambda cache: False)
    warnings: list[str] = []
    assert trusted(llama, warnings) is llama.reference
    assert "reference" in warnings[-1]
    with pytest.raises(Unsupported):
        TrialEngine(llama.reference, llama.loaded.layers, NoEdit(), EfficiencySettings(), None)


def test_the_self_check_measures(llama: Lab) -> None:
    engine = llama.engine()
    llama.editor.apply(make_params(1))
    verdict = check(engine, make_setup(llama))
    assert verdict.ok
    assert verdict.difference < 1e-4


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
