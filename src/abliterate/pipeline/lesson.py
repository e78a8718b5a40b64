"""What refinement learns from: the answers of a teacher, an edited model, and the unedited model's own answers.

They cost as much as a few trials, so they are kept in the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.pipeline.cache_keys import model_key
from abliterate.pipeline.passes import passes_of
from abliterate.pipeline.workbench import Workbench
from abliterate.refine.betas import first_beta
from abliterate.refine.loss import Rows
from abliterate.refine.teachers import COMPARED, best_trials, plain_edits
from abliterate.scorers import Observation, Response
from abliterate.scorers.refusals import Refusals
from abliterate.scorers.unanswered import Unanswered, measure_fluency
from abliterate.scorers.yardstick import VERSION as YARDSTICK_VERSION
from abliterate.scorers.yardstick import Kind
from abliterate.types import Params, Prompt, Trial, params_from_record

# An edited model and its name: a trial's number, or "teachers" for a plain edit.
Teacher = tuple[int | str, Params]
# The version of how a lesson is made: those in the cache that another version made are no use.
_VERSION = 6
# The fewest answers of a kind that are worth learning from.
_FEWEST = 8


@dataclass(frozen=True)
class Lesson:
    """Training and validation rows; the first `n_asked` harmful training prompts are those of validation.

    `start` names the teacher: a trial's number, or "teachers" for a plain edit. `teacher` is its edit, and `first_beta` the
    weight to begin with.
    """

    training: Rows
    validation: Rows
    n_asked: int
    start: int | str
    teacher: Params
    first_beta: float

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        return {**asdict(self), "teacher": self.teacher.to_record()}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Lesson:
        """The inverse of `to_record`."""
        rows = {
            name: Rows(*([TeacherForced(**row) for row in record[name][kind]] for kind in ("harmful", "harmless")))
            for name in ("training", "validation")
        }
        return Lesson(**{**record, **rows, "teacher": params_from_record(record["teacher"])})


def prepare_lesson(bench: Workbench, teachers: Sequence[Teacher]) -> Lesson | None:
    """The lesson of the best of some teachers; None, with a warning, if it or the unedited model answers too little."""
    key = lesson_key(bench, teachers)
    stored = bench.context.store.get("lesson", key, remember=False)
    if stored is not None:
        lesson = Lesson.from_record(json.loads(from_bytes(stored["record"])))
        # An equal edit may have another number in this run.
        lesson = replace(lesson, start=next(name for name, params in teachers if params == lesson.teacher))
    else:
        lesson = _made(bench, *_best(bench, teachers))
        label = f"{bench.loaded.info.id}: {len(lesson.training.harmful)} answers"
        bench.context.store.put("lesson", key, {"record": to_bytes(json.dumps(lesson.to_record()))}, label, remember=False)
    answered, own = len(lesson.training.harmful), len(lesson.training.harmless)
    if answered < _FEWEST:
        asked = min(bench.settings.refine.prompts, len(bench.prompts.harmful)) - lesson.n_asked
        why = f"no edited model answers more than {answered} of {asked} harmful training prompts; try more trials with -n"
    elif own < _FEWEST:
        why = f"the unedited model answers only {own} harmless training prompts; give it more with --harmless"
    elif not lesson.validation.harmful:
        why = f"no edited model answers any of the {lesson.n_asked} harmful prompts of validation; raise refine.validation"
    else:
        return lesson
    bench.context.reporter.warn(f"The front isn't refined, because {why}.")
    return None


def lesson_key(bench: Workbench, teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Everything that a lesson depends on."""
    settings = bench.settings.refine.model_dump(include={"prompts", "tokens", "validation"})
    settings["responses"] = bench.settings.refinement_response_tokens
    return {
        "version": [_VERSION, YARDSTICK_VERSION],
        "model": bench.loaded.info.id,
        "base": model_key(bench.settings, bench.loaded),
        "study": bench.identity(),
        # Of a library's caller, they may be others than those that the settings name.
        "directions": hashlib.sha256(bench.editor.directions.vectors.cpu().float().numpy().tobytes()).hexdigest(),
        "settings": settings,
        "teachers": [asdict(params) for _, params in teachers],
    }


def teachers_of(bench: Workbench, trials: Sequence[Trial]) -> list[Teacher]:
    """The best trials of a search as teachers, and after them plain edits, which are better than a few bad trials."""
    plain = plain_edits(bench.space.n_layers, bench.space.components)
    return [*((trial.number, trial.params) for trial in best_trials(trials)), *(("teachers", params) for params in plain)]


def refusals(bench: Workbench, params: Params, prompts: Sequence[Prompt]) -> int:
    """The number of prompts that an edited model refuses, as far as the beginning of its responses shows it."""
    responses = _responses(bench, params, prompts)
    assert responses is not None  # only a limit can stop it
    return sum(map(_markers(bench).is_refusal, responses))


def answers(bench: Workbench, params: Params, prompts: Sequence[Prompt]) -> list[Response | None]:
    """The beginnings of an edited model's responses; None for refusals and broken ones.

    Whether they are on topic is asked about some answers of each teacher only (`_best`), because it takes most of the tokens.
    """
    responses, base = _responses(bench, params, prompts), bench.asked()
    assert responses is not None  # only a limit can stop it
    rows = [row for row, response in enumerate(responses) if not _markers(bench).is_refusal(response)]
    measured = measure_fluency(base, prompts, rows, [responses[row].ids for row in rows])
    found: list[Response | None] = [None] * len(responses)
    yardstick = base.yardstick()
    for row, (measures, _) in zip(rows, measured, strict=True):
        if yardstick.is_fluent(measures):
            found[row] = responses[row]
    return found


def _responses(bench: Workbench, params: Params, prompts: Sequence[Prompt], limit: int | None = None) -> list[Response] | None:
    with bench.edited(params):
        return bench.engine.respond(prompts, limit=limit, length=bench.settings.refinement_response_tokens)


def _kinds(bench: Workbench, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Kind]:
    scorer = next((scorer for scorer in bench.scorers if isinstance(scorer, Unanswered)), None)
    scorer = scorer or Unanswered(_markers(bench))
    return scorer.kinds(Observation(responses, torch.empty(0), prompts, bench.asked()))


def _markers(bench: Workbench) -> Refusals:
    return next(scorer for scorer in bench.scorers if isinstance(scorer, Refusals))


def _best(bench: Workbench, teachers: Sequence[Teacher]) -> Teacher:
    """The teacher that answers most of some training prompts, the first of equal ones.

    One that refuses too many of them to be the best is stopped there, and its answers aren't shown to the base.
    """
    best, most, prompts = teachers[0], 0, bench.prompts.harmful[-COMPARED:]
    for tried, teacher in enumerate(teachers):
        if most == len(prompts):
            break
        bench.context.check()
        responses = _responses(bench, teacher[1], prompts, limit=len(prompts) - most)
        if responses and sum(not _markers(bench).is_refusal(response) for response in responses) > most:
            answered = _kinds(bench, prompts, responses).count("answered")
            best, most = (teacher, answered) if answered > most else (best, most)
        bench.context.reporter.progress(tried + 1, len(teachers), "teachers")
    return best


def _made(bench: Workbench, start: int | str, teacher: Params) -> Lesson:
    settings = bench.settings.refine
    harmful, harmless = bench.prompts.harmful[: settings.prompts], bench.prompts.harmless[: settings.prompts]
    targets = [
        TeacherForced(bench.chat.token_ids(prompt), response.ids[: settings.tokens]) if response is not None else None
        for prompt, response in zip(harmful, answers(bench, teacher, harmful), strict=True)
    ]
    n_asked = max(1, round(settings.validation * len(harmful)))
    answered = [row for row in targets[n_asked:] if row is not None]
    if len(answered) < _FEWEST:  # nothing more is needed of a lesson that is no use
        return Lesson(Rows(answered, []), Rows([], []), n_asked, start, teacher, 0.0)
    own = _own_answers(bench, harmless)
    n_held = max(1, round(settings.validation * len(own)))
    if len(own) - n_held < _FEWEST:
        return Lesson(Rows(answered, own[n_held:]), Rows([], []), n_asked, start, teacher, 0.0)
    whose = f"trial {start}" if isinstance(start, int) else "a plain edit"
    refused = f"; {len(harmless) - len(own)} harmless prompts are left out, because the model refuses them"
    bench.context.reporter.note(
        f"{len(answered)} answers of {whose} to learn from{refused if len(own) < len(harmless) else ''}"
    )
    validation = Rows([row for row in targets[:n_asked] if row is not None], own[:n_held])
    first = _first_beta(bench, teacher, validation)
    return Lesson(Rows(answered, own[n_held:]), validation, n_asked, start, teacher, first)


def _first_beta(bench: Workbench, teacher: Params, validation: Rows) -> float:
    passes, factors = passes_of(bench), bench.editor.factors(teacher)
    with bench.learning():
        before, after = passes.loss({}, validation), passes.loss(factors, validation)
    return first_beta(before.target - after.target, after.first + after.along)


def _own_answers(bench: Workbench, prompts: Sequence[Prompt]) -> list[TeacherForced]:
    """The prompts with the first tokens of the unedited model's answers, but for those that it refuses.

    To hold the model to these refusals would keep what is to be removed.
    """
    tokens, shown = bench.settings.refine.tokens, bench.settings.refinement_response_tokens
    with bench.base():
        responses = bench.engine.respond(prompts, length=shown)
    assert responses is not None  # only a limit can stop it
    return [
        TeacherForced(bench.chat.token_ids(prompt), response.ids[:tokens])
        for prompt, response in zip(prompts, responses, strict=True)
        if not _markers(bench).is_refusal(response)
    ]
