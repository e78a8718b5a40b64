"""Refinement as a stage of a run: what it leaves, what it never sees, and how it goes on after an interruption."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from abliterate.artifacts.cache import ArtifactStore
from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, Interrupted
from abliterate.evaluation.likelihood import AskedBase
from abliterate.evaluation.teacher_forced import fed_tokens
from abliterate.pipeline import lesson, refine, stages
from abliterate.pipeline.passes import passes_of
from abliterate.pipeline.workbench import load
from abliterate.refine.betas import Tried, next_descent
from abliterate.refine.descent import Descent, Pass
from abliterate.settings.schema import Settings
from abliterate.types import Kernel, Prompt, RefinedParams, Trial, TrialParams
from support.cli import Invoke
from support.runs import Recorder, copy_run, lean_runs, outcomes, quick_settings, run_in

pytestmark = pytest.mark.usefixtures("lean")
Files = dict[str, str]
Refined = tuple[Path, dict[str, Any], Settings, Recorder]


def settings_of(prompt_files: Files, cache: Path, **over: Any) -> Settings:
    """A run without trials of its own: 6 steps at each of two weights."""
    options = {"enabled": True, "steps": 6, "betas": [0.5, 3.0], "batch": 4, "tokens": 6, "prompts": 14, **over}
    search = {"trials": 0, "startup_trials": 0}
    few = {"response": {"max_new_tokens": 12}, "export": {"kind": "none"}}
    return quick_settings(prompt_files, cache, refine=options, search=search, **few)


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """Few steps are looked at after four instead of ten, and teachers are compared by few answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "LOOK", 4)
        patch.setattr(lesson, "COMPARED", 8)
        yield


@pytest.fixture(scope="module")
def refined(prompt_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Refined:
    """A run that has only refined trials."""
    folder = tmp_path_factory.mktemp("refined")
    settings = settings_of(prompt_files, folder / "cache")
    with lean_runs():
        result, recorder = run_in(folder / "run", settings)
    return folder / "run", result, settings, recorder


@pytest.fixture
def warm(refined: Refined, tmp_path: Path) -> Path:
    """A cache with what that run has found before its descents: everything but these takes most of a short run's time."""
    _, _, settings, _ = refined
    shutil.copytree(str(settings.cache_dir), tmp_path / "warm", ignore=shutil.ignore_patterns("descent"))
    return tmp_path / "warm"


@pytest.fixture
def unlearned(warm: Path) -> Path:
    """That cache without the answers to learn from."""
    shutil.rmtree(warm / "lesson")
    return warm


def trials_of(path: Path) -> list[Trial]:
    return list(Result.read(RunDirectory(path)).trials)


def test_every_weight_gives_a_trial_that_the_front_treats_like_others(refined: Refined) -> None:
    path, result, _, recorder = refined
    trials = trials_of(path)
    assert [trial.number for trial in trials] == [0, 1]
    assert [trial.params.facts["beta"] for trial in trials if isinstance(trial.params, RefinedParams)] == [0.5, 3.0]
    assert {"lesson", "refine"} <= set(recorder.stages)
    assert result["selected"] in result["front"]
    assert trials[0].refusals < result["baseline"]["refusals"], "six steps remove refusals"
    assert 0 < trials[0].kl < 0.2


@pytest.mark.slow
def test_several_directions_are_searched_learned_and_exported(prompt_files: Files, warm: Path, tmp_path: Path) -> None:
    """An adapter of k-means directions, whose refinement goes on from there as of one direction."""
    refine_options = {"enabled": True, "steps": 3, "betas": [1.0], "batch": 6, "tokens": 6}
    options = {
        "directions": {"method": "kmeans", "count": 2},
        "export": {"kind": "adapter"},
        "efficiency": {"max_residuals_mb": 0},
    }
    search = {"trials": 1, "startup_trials": 1, "select": "trial:1"}
    settings = quick_settings(prompt_files, warm, refine=refine_options, search=search, **options)
    result, recorder = run_in(tmp_path / "run", settings)
    assert any("kmeans needs all residuals at once" in note for note in recorder.notes)
    suggested, learned = (trial.params for trial in trials_of(tmp_path / "run"))
    assert isinstance(suggested, TrialParams)
    assert suggested.extra.keys() == {"weight.1", "weight.2"}
    assert isinstance(learned, RefinedParams)
    assert learned.directions == suggested.directions == 2
    assert all(0.5 < cosine < 0.99999 for cosine in learned.facts["cosine"].values())
    stored = RefinedStore(RunDirectory(tmp_path / "run").refined).directions(learned)
    weights = torch.stack([rows.norm(dim=1) for rows in stored.values()])
    assert weights.shape == (len(learned.coeffs), 2)
    assert weights.std() > 1e-4, "weights are learned, too"
    assert (result["selected"], result["export"]["verified"]) == (1, True)
    assert (result["export"]["method"], result["export"]["rank"]) == ("dora", 2)


def test_facts_say_how_it_was_found(refined: Refined) -> None:
    path, result, settings, _ = refined
    first, second = (trial.params for trial in trials_of(path))
    assert isinstance(first, RefinedParams)
    assert isinstance(second, RefinedParams)
    assert (first.facts["steps"], second.facts["steps"]) == (6, 12), "the second goes on from the first"
    assert first.facts["start"] == "teachers"
    for name in ("harmful", "harmless"):
        assert first.facts["prompts"][name]["digest"] == result["prompts"][name]["digest"]
    assert first.facts["tokens"] < second.facts["tokens"]
    stored = RefinedStore(RunDirectory(path).refined).directions(first)
    assert stored.keys() == first.coeffs.keys() == first.facts["cosine"].keys()
    assert all(0.5 < cosine < 0.99999 for cosine in first.facts["cosine"].values()), "directions turned, but not away"
    assert len(set(first.coeffs.values())) == len(first.coeffs)
    assert settings.seed == first.facts["seed"]


def test_refusals_are_counted_as_it_is_and_under_a_weaker_edit(
    prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = refine.refusals, list[tuple[RefinedParams, int]]()

    def counted(bench: Any, params: Any, prompts: Any) -> int:
        asked.append((params, real(bench, params, prompts)))
        return asked[-1][1]

    monkeypatch.setattr(refine, "refusals", counted)
    run_in(tmp_path / "run", settings_of(prompt_files, warm, betas=[1.0], steps=3, margin=0.4))
    (trial,) = trials_of(tmp_path / "run")
    (same, refused), (weaker, refused_weaker) = asked
    assert isinstance(trial.params, RefinedParams)
    assert same.coeffs == trial.params.coeffs
    assert weaker.coeffs == pytest.approx({name: 0.6 * coeff for name, coeff in trial.params.coeffs.items()})
    assert same.sha256 == weaker.sha256 == trial.params.sha256
    validation = trial.params.facts["validation"]
    assert validation["refused"] == pytest.approx(refused / validation["prompts"])
    assert validation["weaker"] == pytest.approx(refused_weaker / validation["prompts"])
    assert validation["margin"] == 0.4


def test_evaluation_prompts_are_never_fed(
    prompt_files: Files, unlearned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []
    real = Pass._run

    def watched(self: Pass, factors: Any, rows: Any, work: Any) -> Any:
        seen.extend(tuple(row.prompt) for row in (*rows.harmful, *rows.harmless))
        return real(self, factors, rows, work)

    monkeypatch.setattr(Pass, "_run", watched)
    asked: list[str] = []
    real_answers = lesson._responses

    def answered(bench: Any, params: Any, prompts: Any, *options: Any, **more: Any) -> Any:
        asked.extend(prompt.text for prompt in prompts)
        return real_answers(bench, params, prompts, *options, **more)

    monkeypatch.setattr(lesson, "_responses", answered)
    real_logprobs, real_lesson = AskedBase.logprobs, refine.prepare_lesson
    shown: list[str] = []

    def judged(self: AskedBase, prompts: Sequence[Prompt], answers: Any) -> Any:
        shown.extend(prompt.text for prompt in prompts)
        return real_logprobs(self, prompts, answers)

    def prepared(bench: Any, teachers: Any) -> Any:
        with monkeypatch.context() as patch:  # trials show the base their evaluation prompts, a lesson doesn't
            patch.setattr(AskedBase, "logprobs", judged)
            return real_lesson(bench, teachers)

    monkeypatch.setattr(refine, "prepare_lesson", prepared)
    ids: dict[str, set[tuple[int, ...]]] = {}
    real_one = refine.Refinement._one_trial

    def one(self: Any, *args: Any) -> Trial:
        prompts = self._bench.prompts
        ids["training"] = {tuple(self._bench.chat.token_ids(prompt)) for prompt in (*prompts.harmful, *prompts.harmless)}
        ids["texts"] = {prompt.text for prompt in (*prompts.harmful, *prompts.harmless)}  # type: ignore[assignment]
        return real_one(self, *args)

    monkeypatch.setattr(refine.Refinement, "_one_trial", one)
    run_in(tmp_path / "run", settings_of(prompt_files, unlearned, steps=2, betas=[1.0]))
    whole = {row for row in seen if len(row) > 4}  # the probe feeds four tokens
    assert whole
    assert whole <= ids["training"]
    assert asked
    assert shown
    assert {*asked, *shown} <= ids["texts"]  # type: ignore[comparison-overlap]


def test_an_interrupted_refinement_equals_an_uninterrupted_one(
    refined: Refined, prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted after the state of four steps was kept, and continued by new objects."""
    _, whole, _, _ = refined
    settings = settings_of(prompt_files, warm)
    taken: list[int] = []
    real = Descent.step

    def step(self: Descent, beta: float, rate: float) -> Any:
        if len(taken) == 5:
            taken.append(-1)
            raise Interrupted
        taken.append(self.steps)
        return real(self, beta, rate)

    monkeypatch.setattr(Descent, "step", step)
    with pytest.raises(Interrupted):
        run_in(tmp_path / "run", settings)
    assert taken == [*range(5), -1]
    result, _ = run_in(tmp_path / "run", settings, resume=True)
    assert taken[6:] == [4, 5, *range(6)], "the fifth step is repeated, the four before it are not"
    assert outcomes(result) == outcomes(whole)
    again, recorder = run_in(tmp_path / "run", settings, resume=True)
    assert outcomes(again) == outcomes(whole)
    assert len(taken) == 14, "finished weights are not computed again"
    assert not recorder.warnings


@pytest.mark.slow
def test_a_descent_takes_over_the_moments_of_the_one_it_goes_on_from(
    prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So do a run that ended after its first descent and is continued, and a run whose cache has none."""
    others = [shutil.copytree(warm, tmp_path / name) for name in ("through", "anew")]  # before there are moments in it
    ended = settings_of(prompt_files, warm, betas=[1.0], steps=3)
    longer = ended.model_copy(update={"refine": ended.refine.model_copy(update={"betas": (1.0, 2.0)})})
    run_in(tmp_path / "run", ended)
    continued, recorder = run_in(tmp_path / "run", longer, resume=True)
    assert not any("Adam begins anew" in text for text in recorder.notes)
    get = ArtifactStore.get
    with monkeypatch.context() as patch:  # nothing of a descent comes from the cache

        def without(store: ArtifactStore, kind: str, *given: Any, **options: Any) -> Any:
            return None if kind == "descent" else get(store, kind, *given, **options)

        patch.setattr(ArtifactStore, "get", without)
        through, _ = run_in(tmp_path / "run-through", longer.model_copy(update={"cache_dir": str(others[0])}))
    assert outcomes(continued) == outcomes(through)
    monkeypatch.setattr(Descent, "load_moments", lambda *given: None)
    anew, _ = run_in(tmp_path / "run-anew", longer.model_copy(update={"cache_dir": str(others[1])}))
    assert outcomes(anew)[0] == outcomes(through)[0]
    assert outcomes(anew)[1] != outcomes(through)[1]


def test_a_finished_refinement_goes_on_if_more_is_asked(refined: Refined, prompt_files: Files, tmp_path: Path) -> None:
    path, _, settings, _ = refined
    copy_run(path, tmp_path / "run")
    again, recorder = run_in(tmp_path / "run", settings, resume=True)
    assert "lesson" not in recorder.stages, "nothing is left to learn"
    more = settings.model_copy(update={"refine": settings.refine.model_copy(update={"betas": (0.5, 3.0, 1.0), "steps": 2})})
    longer, recorder = run_in(tmp_path / "run", more, resume=True)
    assert recorder.stages.count("refine") == 1
    assert any("finished descents stay as they are; refine.steps act" in note for note in recorder.notes)
    assert outcomes(longer)[:2] == outcomes(again)
    assert trials_of(tmp_path / "run")[2].params.facts["beta"] == 1.0  # type: ignore[union-attr]


def test_a_trial_whose_measurement_failed_is_measured_again(
    prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descent is done; only memory or a judge was missing."""
    settings = settings_of(prompt_files, warm, betas=[0.5])
    with monkeypatch.context() as patch:
        lost = Trial(0, TrialParams("global", 1.0, {}), "failed", {}, reason="out of memory")
        patch.setattr(
            refine.stages, "evaluate", lambda bench, number, params, pruner: replace(lost, number=number, params=params)
        )
        with pytest.raises(AbliterateError, match="No trial leaves fewer"):
            run_in(tmp_path / "run", settings)
    for _ in range(2):
        _, recorder = run_in(tmp_path / "run", settings, resume=True)
    assert "refine" not in recorder.stages, "once is enough"
    first, second = trials_of(tmp_path / "run")
    assert (first.state, second.state, first.number, second.number) == ("failed", "complete", 0, 1)
    assert first.params == second.params


def test_a_refined_run_goes_on_searching_if_more_is_asked(refined: Refined, tmp_path: Path) -> None:
    """All new trials are made, and what refinement has found neither stops them nor counts among them."""
    path, _, settings, _ = refined
    copy_run(path, tmp_path / "run")
    more = settings.model_copy(update={"search": settings.search.model_copy(update={"trials": 2})})
    _, recorder = run_in(tmp_path / "run", more, resume=True)
    assert recorder.totals[-2:] == [4, 4], "their numbers pass over those of refined trials"
    trials = {trial.number: trial for trial in trials_of(tmp_path / "run")}
    assert [isinstance(trials[number].params, RefinedParams) for number in sorted(trials)] == [True, True, False, False]
    assert trials[2].state == "complete"


def tried_of(facts: dict[str, Any]) -> Tried:
    """What the course knows of a finished descent."""
    return Tried(facts["beta"], facts["validation"]["refused"], facts["validation"]["weaker"])


def test_auto_finds_its_weights_and_goes_on_with_more_descents(prompt_files: Files, warm: Path, tmp_path: Path) -> None:
    """A course that is continued goes on from the point before its end."""
    settings = settings_of(prompt_files, warm, betas="auto", descents=2, steps=2)
    run_in(tmp_path / "run", settings)
    first, second = (trial.params.facts for trial in trials_of(tmp_path / "run"))  # type: ignore[union-attr]
    limit = settings.refine.max_refused
    assert second["beta"] == next_descent([tried_of(first)], first["beta"], limit, is_last=True).beta
    assert (first["ends"], second["ends"]) == (False, True)
    more = settings.model_copy(update={"refine": settings.refine.model_copy(update={"descents": 4})})
    run_in(tmp_path / "run", more, resume=True)
    facts = [trial.params.facts for trial in trials_of(tmp_path / "run")]  # type: ignore[union-attr]
    assert [one["stage"] for one in facts] == [0, 1, 2, 3]
    assert [one["ends"] for one in facts] == [False, True, False, True]
    assert facts[2]["beta"] == next_descent([tried_of(first)], first["beta"], limit).beta
    course = [tried_of(first), tried_of(facts[2])]
    assert facts[3]["beta"] == next_descent(course, first["beta"], limit, is_last=True).beta


def test_a_margin_that_was_not_asked_for_counts_as_none(refined: Refined) -> None:
    path, _, _, _ = refined
    trial = trials_of(path)[0]
    assert isinstance(trial.params, RefinedParams)
    point, validation = refine._Point(0.5, trial.params), trial.params.facts["validation"]
    assert point.tried(validation["margin"]).weaker == validation["weaker"]
    assert point.tried(validation["margin"] + 0.1).weaker == 1.0
    old = {name: value for name, value in validation.items() if name not in ("weaker", "margin")}
    older = replace(trial.params, facts={**trial.params.facts, "validation": old})
    assert refine._Point(0.5, older).tried(0.0) == Tried(0.5, validation["refused"], 1.0)


@pytest.mark.parametrize("learn", ["directions", pytest.param("strengths", marks=pytest.mark.slow)])
def test_a_kept_state_of_another_beginning_is_no_use(
    prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: str
) -> None:
    """A run is interrupted in its second descent; another run then comes to that weight from another first one."""
    real, seen = Descent.step, list[int]()

    def settings(*betas: float) -> Settings:
        return settings_of(prompt_files, warm, betas=list(betas), steps=3, learn=learn)

    def step(self: Descent, beta: float, rate: float) -> Any:
        if beta == 3.0 and self.steps == 2 and 2 not in seen:
            seen.append(2)
            raise Interrupted
        return real(self, beta, rate)

    monkeypatch.setattr(refine, "LOOK", 1)
    run_in(tmp_path / "other", settings(1.0))
    monkeypatch.setattr(Descent, "step", step)
    with pytest.raises(Interrupted):
        run_in(tmp_path / "first", settings(0.5, 3.0))
    seen.clear()
    monkeypatch.setattr(Descent, "step", lambda self, *given: seen.append(self.steps) or real(self, *given))
    run_in(tmp_path / "other", settings(1.0, 3.0), resume=True)
    assert seen == [0, 1, 2]


def test_a_listed_weight_that_was_not_refined_is_refined(prompt_files: Files, warm: Path, tmp_path: Path) -> None:
    settings = settings_of(prompt_files, warm, betas=[1.0], steps=1)
    run_in(tmp_path / "run", settings)
    other = settings.model_copy(update={"refine": settings.refine.model_copy(update={"betas": (2.0,)})})
    for _ in range(2):
        run_in(tmp_path / "run", other, resume=True)
        assert [trial.params.facts["beta"] for trial in trials_of(tmp_path / "run")] == [1.0, 2.0]  # type: ignore[union-attr]


@pytest.mark.parametrize(("thinking", "tokens", "length"), [("keep", 8, 100), ("skip", 8, 48), ("skip", 60, 100)])
def test_models_that_may_think_answer_in_full(thinking: str, tokens: int, length: int) -> None:
    asked: list[Any] = []
    engine = SimpleNamespace(respond=lambda prompts, limit, length: asked.append(length) or [])
    settings = Settings(response={"thinking": thinking}, refine={"tokens": tokens})  # type: ignore[arg-type]
    bench = SimpleNamespace(engine=engine, settings=settings, edited=lambda params: contextlib.nullcontext())
    lesson._responses(bench, None, [])  # type: ignore[arg-type]
    assert asked == [length]


def test_strengths_alone_leave_the_directions(prompt_files: Files, warm: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "run", settings_of(prompt_files, warm, steps=2, betas=[1.0], learn="strengths"))
    (trial,) = trials_of(tmp_path / "run")
    assert isinstance(trial.params, RefinedParams)
    assert all(cosine == pytest.approx(1, abs=1e-6) for cosine in trial.params.facts["cosine"].values())
    assert len({round(coeff, 6) for coeff in trial.params.coeffs.values()}) > 2


@pytest.mark.parametrize(("mode", "pace", "margin"), [("full", 1.0, 0.15), ("least-squares", 3.0, 0.4)])
def test_strengths_and_margins_are_in_proportion_to_the_methods_own(
    prompt_files: Files, warm: Path, tmp_path: Path, mode: str, pace: float, margin: float
) -> None:
    settings = settings_of(prompt_files, warm, steps=1, betas=[1.0], learn="strengths")
    edit = settings.edit.model_copy(update={"mode": mode, "capture_prompts": 8, "capture_tokens": 4})
    run_in(tmp_path / "run", settings.model_copy(update={"edit": edit}))
    (trial,) = trials_of(tmp_path / "run")
    assert isinstance(trial.params, RefinedParams)
    coeffs, start = trial.params.coeffs.values(), pace * 6 / len(trial.params.coeffs)
    # Adam's first step has one size for all.
    assert all(abs(coeff - start) == pytest.approx(0.2 * start, rel=1e-3) for coeff in coeffs)
    assert trial.params.facts["validation"]["margin"] == margin


def test_layers_without_a_backward_pass_are_a_sentence(
    prompt_files: Files, warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_backward(self: Pass, *args: Any) -> None:
        raise NotImplementedError("derivative for packed::mm is not implemented")

    monkeypatch.setattr(Pass, "gradients", no_backward)
    settings = settings_of(prompt_files, warm)
    search = settings.search.model_copy(update={"trials": 2})
    result, recorder = run_in(tmp_path / "run", settings.model_copy(update={"search": search}))
    assert [trial["number"] for trial in result["trials"]] == [0, 1]
    assert any("no backward pass (derivative for packed::mm is not implemented)" in text for text in recorder.warnings)


def test_losses_that_are_not_finite_end_it_and_keep_the_front(
    prompt_files: Files, unlearned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Pass.loss
    # The first two are those of the lesson, and the third is the look at the end of the first descent.
    count = iter(range(100))

    def loss(self: Pass, factors: Any, rows: Any) -> Any:
        found = real(self, factors, rows)
        return replace(found, first=float("nan")) if next(count) > 2 else found

    monkeypatch.setattr(Pass, "loss", loss)
    result, recorder = run_in(tmp_path / "run", settings_of(prompt_files, unlearned, steps=2))
    assert len(result["trials"]) == 1
    assert any("Refinement ends here (the loss of refinement is not finite)" in text for text in recorder.warnings)


def test_too_few_answers_are_a_sentence(
    prompt_files: Files, unlearned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lesson, "_FEWEST", 1000)
    settings = settings_of(prompt_files, unlearned)
    search = settings.search.model_copy(update={"trials": 2})
    settings = settings.model_copy(update={"search": search})
    result, recorder = run_in(tmp_path / "run", settings)
    assert len(result["trials"]) == 2
    assert any("no edited model answers more than" in text for text in recorder.warnings)
    monkeypatch.setattr(lesson, "_made", lambda *given: pytest.fail("what couldn't be learned is remembered"))
    _, again = run_in(tmp_path / "run", settings, resume=True)
    assert any("no edited model answers more than" in text for text in again.warnings)


def test_harmless_prompts_that_the_model_refuses_are_left_out(
    prompt_files: Files, unlearned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model isn't held to refusals; and a model that answers too little can't be refined."""
    lessons: list[lesson.Lesson] = []
    real = refine.prepare_lesson

    def prepared(*given: Any) -> Any:
        lessons.append(real(*given))  # type: ignore[arg-type]
        return lessons[-1]

    monkeypatch.setattr(refine, "prepare_lesson", prepared)
    harmful, harmless = (Path(prompt_files[name]).read_text(encoding="utf-8").splitlines() for name in ("harmful", "harmless"))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([*harmless[:10], *harmful[:5]]), encoding="utf-8")
    files = prompt_files | {"harmless": str(mixed)}
    settings = settings_of(files, unlearned, steps=1, betas=[1.0], prompts=15)
    longer = settings.response.model_copy(update={"max_new_tokens": 20})  # so that all refusals are seen
    _, recorder = run_in(tmp_path / "run", settings.model_copy(update={"response": longer}))
    assert any("5 harmless prompts are left out" in text for text in recorder.notes)
    kept = lessons[0]
    assert len(kept.training.harmless) + len(kept.validation.harmless) == 10
    monkeypatch.setattr(lesson, "_own_answers", lambda *given: [])
    settings = settings_of(prompt_files, unlearned)
    search = settings.search.model_copy(update={"trials": 2})
    result, recorder = run_in(tmp_path / "other", settings.model_copy(update={"search": search}))
    assert len(result["trials"]) == 2
    assert any("the unedited model answers only 0 harmless training prompts" in text for text in recorder.warnings)


@pytest.mark.slow
def test_the_best_teacher_is_found_without_all_of_its_rivals_answers(
    prompt_files: Files, unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rivals that refuse too much are stopped early; the choice is that of asking all of them everything."""
    with load(settings_of(prompt_files, unlearned, tokens=4), Recorder()) as bench:
        stages.find_directions(bench)
        bench.asked().yardstick()
        kernels = {name: Kernel(0.0, 1.0, 0.0, 1.0) for name in bench.space.components}
        nothing = TrialParams("global", 1.0, kernels)
        teachers = [("teachers", nothing), *lesson.teachers_of(bench, [])]
        asked = bench.prompts.harmful[-lesson.COMPARED :]
        counts = []
        for _, params in teachers:
            responses = lesson._responses(bench, params, asked)
            counts.append(lesson._kinds(bench, asked, responses or ()).count("answered"))
        assert counts[0] < max(counts)
        found: list[Any] = []
        real = lesson._responses
        monkeypatch.setattr(lesson, "_responses", lambda *given, **options: found.append(real(*given, **options)) or found[-1])
        for some, expected in ((teachers, counts), (teachers[::-1], counts[::-1])):
            assert lesson._best(bench, some) is some[expected.index(max(expected))]
        assert None in found, "a rival was stopped"
        made = lesson.prepare_lesson(bench, teachers)
        assert made is not None
        assert made.start == "teachers"
        again = lesson.prepare_lesson(bench, [(number, params) for number, (_, params) in enumerate(teachers)])
        assert again is not None
        assert (again.start, again.teacher) == (counts.index(max(counts)), made.teacher), "its number may differ in another run"
        unseen = replace(made, validation=replace(made.validation, harmful=[]))
        monkeypatch.setattr(lesson, "_made", lambda *given: unseen)
        assert lesson.prepare_lesson(bench, teachers[:2]) is None


def test_no_refine(prompt_files: Files, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option turns refinement off, whatever the environment says. The model decides the edit mode."""
    monkeypatch.setenv("ABLITERATE_REFINE__ENABLED", "true")
    given = ["run", "demo", "-n", "1", "--no-refine", "--out", str(tmp_path / "run"), "--export", "none", "--batch-size", "12"]
    options = [item for name, path in prompt_files.items() for item in (f"--{name.replace('_', '-')}", path)]
    options += ["--set", "edit.mode=auto"]
    done = invoke(*given, *options, "--set", "response.max_new_tokens=8", "--set", "evaluation.heldout=false")
    assert "== search" in done.out + done.err
    assert "== prepare edits: least-squares" in done.out + done.err
    assert "== refine" not in done.out + done.err
    nothing = invoke("run", "demo", "-n", "0", "--no-refine", "--out", str(tmp_path / "none"))
    assert (nothing.code, "without refinement finds nothing" in nothing.err) == (2, True)


def test_passes_share_prompts_and_the_unedited_model_is_asked_once(
    prompt_files: Files, unlearned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every step of two descents; the scorers' questions to the unedited model share prompts, too."""
    real, seen = Pass.gradients, list[tuple[bool, int]]()
    asked: list[bool] = []

    def gradients(self: Pass, factors: Any, rows: Any, beta: float) -> Any:
        before = self.tokens
        found = real(self, factors, rows, beta)
        assert self.tokens - before == 3 * fed_tokens([*rows.harmful, *rows.harmless], share=True)
        seen.append((self.share, len(self.base_logits)))
        return found

    def judged(self: AskedBase, prompts: Sequence[Prompt], answers: Any) -> Any:
        asked.append(self.model.share)
        return real_logprobs(self, prompts, answers)

    real_logprobs = AskedBase.logprobs
    monkeypatch.setattr(Pass, "gradients", gradients)
    monkeypatch.setattr(AskedBase, "logprobs", judged)
    monkeypatch.setattr(Pass, "probe", lambda *given: None)
    settings = settings_of(prompt_files, unlearned, betas=[1.0, 2.0], steps=2)
    run_in(tmp_path / "run", settings)
    assert len(seen) == 4
    assert {share for share, _ in seen} == {True}
    assert len({count for _, count in seen}) == 1
    assert seen[0][1] > 1
    assert asked
    assert all(asked)


def test_memory_decides_whether_layers_keep_their_activations(
    prompt_files: Files, unlearned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.pipeline import passes

    with load(settings_of(prompt_files, unlearned), Recorder()) as bench:
        stages.find_directions(bench)
        monkeypatch.setattr(passes, "usable_on_all", lambda devices, device: 1 << 40)
        plenty = passes_of(bench)
        monkeypatch.setattr(passes, "usable_on_all", lambda devices, device: 1 << 20)
        scarce = passes_of(bench)
    assert not plenty.checkpointing
    assert scarce.checkpointing
    assert torch.device("cpu") == plenty.device
