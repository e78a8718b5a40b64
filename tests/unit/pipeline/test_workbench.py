"""The workbench: what is measured as the base model is the base model, bit for bit, whatever happened before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.errors import AbliterateError
from abliterate.model import edit_hooks
from abliterate.pipeline import stages
from abliterate.pipeline.workbench import Workbench, load
from abliterate.search.pruner import DominancePruner
from abliterate.types import Baseline, Kernel, Prompt, TrialParams
from support.models import logits_of
from support.runs import Recorder, Untouched, quick_settings

Files = dict[str, str]
QUESTIONS = ["Show me a quick way to snatch the candle.", "Name a color."]


@pytest.fixture(scope="module")
def bench(prompt_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """A workbench that is ready for edits. Every test leaves it as the base model."""
    over = {"response": {"max_new_tokens": 12, "detect_prefix": False}}
    settings = quick_settings(prompt_files, tmp_path_factory.mktemp("cache"), **over)
    with load(settings, Recorder()) as bench:
        stages.find_directions(bench)
        yield bench


@pytest.fixture
def params(bench: Workbench) -> TrialParams:
    """An edit that is far from the base model: its answers are others, too."""
    kernel = Kernel(max_coeff=1.5, position=5.0, min_coeff=1.0, distance=4.0)
    return TrialParams("per layer", 5.0, dict.fromkeys(bench.space.components, kernel))


@pytest.fixture(autouse=True)
def _base_before_and_after(request: pytest.FixtureRequest) -> Iterator[None]:
    """The logits before and after each test are those of the base model, bit for bit, and no hook is left."""
    if "bench" not in request.fixturenames:
        yield
        return
    bench = request.getfixturevalue("bench")
    untouched: Untouched = request.getfixturevalue("untouched")
    expected = logits_of(untouched.model)
    assert torch.equal(logits_of(bench.loaded.model), expected)
    yield
    assert torch.equal(logits_of(bench.loaded.model), expected)
    assert hooks(bench) == []
    assert not bench.editor.hooks.active


def hooks(bench: Workbench) -> list[str]:
    """The modules with a hook of any kind before or after their forward."""
    modules = bench.loaded.model.named_modules()
    return [name for name, module in modules if module._forward_hooks or module._forward_pre_hooks]


def edited_logits(bench: Workbench, params: TrialParams) -> Tensor:
    """The logits under an edit."""
    with bench.edited(params):
        return logits_of(bench.loaded.model)


MEASURES: dict[str, Callable[[Workbench], Any]] = {
    "respond": lambda bench: bench.respond(QUESTIONS),
    "residuals": stages.residuals,
    "baseline": stages.baseline,
    "calibrate": lambda bench: bench.calibrate(bench.prompts),
}


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_measures_the_base_under_an_edit(
    measure: str, bench: Workbench, params: TrialParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.context.store, "get", lambda *args, **kwargs: None)  # a cache must not hide it
    bench.editor.apply(params)
    try:
        with pytest.raises(RuntimeError, match="an edit is on the model that is to be measured as the base"):
            MEASURES[measure](bench)
    finally:
        bench.editor.suspend()
    with bench.base():
        pass


def test_the_base_can_be_measured_once_the_edit_is_off(bench: Workbench, params: TrialParams) -> None:
    for off in (bench.editor.suspend, bench.editor.clear):
        bench.editor.apply(params)
        with pytest.raises(RuntimeError, match="an edit is on"), bench.base():
            pass
        off()
        with bench.base():
            assert not bench.editor.hooks.active


@pytest.mark.parametrize("outer", ["base", "edited"])
@pytest.mark.parametrize("inner", ["base", "edited"])
def test_one_measurement_at_a_time(outer: str, inner: str, bench: Workbench, params: TrialParams) -> None:
    enter = {"base": bench.base, "edited": lambda: bench.edited(params)}
    with enter[outer]():
        seen = logits_of(bench.loaded.model)
        with pytest.raises(RuntimeError, match=f"measured as {inner} while it is measured as {outer}"), enter[inner]():
            pass
        assert torch.equal(logits_of(bench.loaded.model), seen)  # the refused one has changed nothing
    with enter[inner]():
        pass


@pytest.mark.parametrize(
    "error", [None, ValueError("no"), KeyboardInterrupt(), torch.OutOfMemoryError("CUDA out of memory")], ids=repr
)
def test_leaving_an_edit_gives_the_base_back(
    error: BaseException | None, bench: Workbench, params: TrialParams, untouched: Untouched
) -> None:
    def measure() -> None:
        with bench.edited(params):
            assert not torch.equal(logits_of(bench.loaded.model), logits_of(untouched.model))
            assert len(hooks(bench)) == len(bench.editor.plan(params)) > 0
            if error is not None:
                raise error

    if error is None:
        measure()
    else:
        with pytest.raises(type(error)):
            measure()
    assert torch.equal(logits_of(bench.loaded.model), logits_of(untouched.model))
    assert hooks(bench) == []


def test_an_edit_that_fails_half_way_is_taken_off(
    bench: Workbench, params: TrialParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out while the edit is put on the model, after a few modules."""
    written: list[int] = []
    write = edit_hooks._ModuleEdit.write

    def full(self: Any, *args: Any) -> None:
        written.append(1)
        if len(written) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(self, *args)

    bench.editor.clear()
    monkeypatch.setattr(edit_hooks._ModuleEdit, "write", full)
    with pytest.raises(torch.OutOfMemoryError), bench.edited(params):
        raise AssertionError("it is not on")
    assert len(written) == 3
    assert hooks(bench) == []
    monkeypatch.undo()
    again = edited_logits(bench, params)  # nor is anything of it taken for whole
    bench.editor.clear()
    assert torch.equal(edited_logits(bench, params), again)


@pytest.mark.parametrize(("fails", "state"), [(1, "complete"), (2, "failed")])
def test_a_trial_out_of_memory_gives_the_base_back(
    fails: int, state: str, bench: Workbench, params: TrialParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a trial: it is tried once more, and then failed."""
    calls: list[int] = []
    observe = type(bench.engine).first_logprobs

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = observe(self, *args, **kwargs)
        calls.append(1)
        if len(calls) <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    baseline = stages.baseline(bench)
    monkeypatch.setattr(type(bench.engine), "first_logprobs", full)
    trial = stages.evaluate(bench, 0, params, DominancePruner.of((), baseline, bench.objectives))
    assert len(calls) == 2
    assert trial.state == state
    assert hooks(bench) == []


def test_the_same_edit_again_is_not_written_again(bench: Workbench, params: TrialParams) -> None:
    first = edited_logits(bench, params)
    edits, modules = bench.editor.hooks, len(bench.editor.plan(params))
    hits, misses = edits.hits, edits.misses
    assert torch.equal(edited_logits(bench, params), first)
    assert (edits.hits - hits, edits.misses - misses) == (modules, 0)
    with bench.base():  # a measurement of the base in between costs nothing either
        logits_of(bench.loaded.model)
    assert torch.equal(edited_logits(bench, params), first)
    assert (edits.hits - hits, edits.misses - misses) == (2 * modules, 0)


def test_responses_are_those_of_the_model_as_it_is(bench: Workbench, params: TrialParams, untouched: Untouched) -> None:
    expected = untouched.answers(QUESTIONS, bench.settings, bench.response_prefix)
    system = bench.settings.prompts.system
    assert bench.respond(QUESTIONS) == expected
    with bench.edited(params):
        edited = bench.respond(QUESTIONS)
        assert edited == bench.respond([Prompt(text, system) for text in QUESTIONS])
    assert edited != expected
    with bench.base():
        assert bench.respond(QUESTIONS) == expected
    assert bench.respond([]) == []


def test_the_baseline_is_that_of_plain_generate(
    bench: Workbench, params: TrialParams, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an edit as before it, and not only because it is cached."""
    prompts = bench.prompts.harmful_eval
    answers = untouched.answers([prompt.text for prompt in prompts], bench.settings, bench.response_prefix)
    markers: Any = bench.scorers[0]
    edited_logits(bench, params)
    monkeypatch.setattr(bench.context.store, "get", lambda *args, **kwargs: None)
    found = stages.baseline(bench)
    refused = sum(markers.is_refusal(stages.Response(text)) for text in answers)
    assert refused == len(prompts)  # so no answer is left to be judged
    kinds = {"count": refused, "refused": refused, "broken": 0, "off_topic": 0, "answered": 0}
    assert found == Baseline(refused, len(prompts), {}, kinds)


def test_closing_frees_the_model(prompt_files: Files, tmp_path: Path) -> None:
    """While the workbench, its search and its results are still held; also when an exception ends it."""
    over = {"response": {"max_new_tokens": 4, "detect_prefix": False, "prefix_prompts": 1}}
    settings = quick_settings(prompt_files, tmp_path, **over)

    def used(alive: list[weakref.ref[Any]], error: Exception | None = None) -> Workbench:
        bench = load(settings, Recorder())
        alive += [weakref.ref(bench.loaded.model), weakref.ref(bench.loaded.model.get_output_embeddings().weight)]
        with bench:
            directions = stages.find_directions(bench)
            alive.append(weakref.ref(bench.editor))
            assert directions is bench.directions
            with bench.edited(bench.space.upper_half()):
                bench.respond(["Hello."])
                if error is not None:
                    raise error
        return bench

    alive: list[weakref.ref[Any]] = []
    bench = used(alive)
    assert [ref() for ref in alive] == [None] * 3
    assert bench.directions is None
    alive.clear()
    with pytest.raises(ValueError, match="stop"):
        used(alive, ValueError("stop"))
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_edits_cannot_be_changed_while_the_model_is_measured(bench: Workbench, params: TrialParams) -> None:
    """Otherwise the old hooks would stay on, and nobody would know of them."""
    before = logits_of(bench.loaded.model)
    assert bench.directions is not None
    other = type(bench.directions)(bench.directions.vectors.flip(0).contiguous())
    with bench.edited(params):
        for change in (bench.prepare, bench.make_edits, lambda directions: bench.calibrate(bench.prompts)):
            with pytest.raises(RuntimeError, match="measured as edited"):
                change(other)
    assert torch.equal(logits_of(bench.loaded.model), before)


def test_a_preparation_that_was_interrupted_begins_anew(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the engine of other hooks, layers that are edited would be skipped."""
    from abliterate.pipeline import workbench

    directions, engine = bench.directions, bench.engine
    assert directions is not None
    assert engine is not bench.plain
    other = type(directions)(directions.vectors.clone())

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workbench, "trusted_engine", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.prepare(other)
    assert bench.engine is bench.plain
    bench.prepare(other)
    assert bench.engine is not bench.plain
    bench.prepare(directions)


def test_misuse_is_one_sentence(prompt_files: Files, tmp_path: Path, params: TrialParams) -> None:
    settings = quick_settings(prompt_files, tmp_path / "cache", response={"max_new_tokens": 4, "detect_prefix": False})
    bench = load(settings, Recorder())
    with bench, pytest.raises(AbliterateError, match="no directions yet"), bench.edited(params):
        pass
    for use in (lambda: bench.respond(["Hi"]), lambda: bench.loaded, lambda: stages.residuals(bench)):
        with pytest.raises(AbliterateError, match=r"closed.*load the model again"):
            use()
