"""What refinement learns from: the answers of a teacher, an edited model, and the unedited model's own answers.

A teacher's answers count as `unanswered` counts them. They cost as much as a few trials, so they are kept in the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import TeacherForced
from abliterate.pipeline.passes import passes_of
from abliterate.pipeline.workbench import Workbench
from abliterate.refine.betas import first_beta
from abliterate.refine.loss import Rows
from abliterate.refine.teachers import best_trials, plain_ablations
from abliterate.scorers import Observation, Response
from abliterate.scorers.refusals import Refusals
from abliterate.scorers.unanswered import Unanswered
from abliterate.types import Params, Prompt, Trial

# Training prompts on which possible teachers are compared, and the fewest answers that are worth learning from.
_COMPARED, _FEWEST = 16, 8


@dataclass(frozen=True)
class Lesson:
    """Training and validation rows, and the harmful validation prompts, of which the first `n_asked` training prompts are.

    `start` names the teacher: a trial's number, or "teachers" for a plain ablation. `first_beta` is the weight to begin with.
    """

    training: Rows
    validation: Rows
    n_asked: int
    start: int | str
    first_beta: float

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Lesson:
        """The inverse of `to_record`."""
        rows = {
            name: Rows(*([TeacherForced(**row) for row in record[name][kind]] for kind in ("harmful", "harmless")))
            for name in ("training", "validation")
        }
        return Lesson(**{**record, **rows})


def prepare_lesson(bench: Workbench, trials: Sequence[Trial]) -> Lesson | None:
    """The lesson of the best teacher among `trials`, or without trials among plain ablations; None if none answers enough."""
    key = lesson_key(bench, trials)
    stored = bench.context.store.get("lesson", key, remember=False)
    if stored is not None:
        return Lesson.from_record(json.loads(from_bytes(stored["record"])))
    lesson = _made(bench, *_teacher(bench, trials))
    if lesson is not None:
        label = f"{bench.loaded.info.id}: {len(lesson.training.harmful)} answers"
        bench.context.store.put("lesson", key, {"record": to_bytes(json.dumps(lesson.to_record()))}, label, remember=False)
    return lesson


def lesson_key(bench: Workbench, trials: Sequence[Trial]) -> dict[str, Any]:
    """Everything that a lesson depends on."""
    settings = bench.settings.refine.model_dump(include={"prompts", "tokens", "validation"})
    return {"study": bench.identity(), "settings": settings, "teachers": [asdict(p) for _, p in _candidates(bench, trials)]}


def answers(bench: Workbench, params: Params, prompts: Sequence[Prompt]) -> tuple[list[Response], list[str]]:
    """An edited model's responses and their kinds, whether or not `unanswered` is an objective of the search."""
    with bench.edited(params):
        responses = bench.engine.respond(prompts)
    assert responses is not None  # only a limit can stop it
    scorer = next((scorer for scorer in bench.scorers if isinstance(scorer, Unanswered)), None)
    scorer = scorer or Unanswered(next(scorer for scorer in bench.scorers if isinstance(scorer, Refusals)))
    return responses, list(scorer.kinds(Observation(responses, torch.empty(0), prompts, bench.asked())))


def _candidates(bench: Workbench, trials: Sequence[Trial]) -> list[tuple[int | str, Params]]:
    best = best_trials(trials)
    if best:
        return [(trial.number, trial.params) for trial in best]
    return [("teachers", params) for params in plain_ablations(bench.space.n_layers, bench.space.components)]


def _teacher(bench: Workbench, trials: Sequence[Trial]) -> tuple[int | str, Params]:
    """The candidate that answers most of some training prompts."""
    candidates, counts = _candidates(bench, trials), list[int]()
    for _, params in candidates:
        bench.context.check()
        _, kinds = answers(bench, params, bench.prompts.harmful[-_COMPARED:])
        counts.append(kinds.count("answered"))
        bench.context.reporter.progress(len(counts), len(candidates), "teachers")
    return candidates[counts.index(max(counts))]


def _made(bench: Workbench, start: int | str, teacher: Params) -> Lesson | None:
    settings = bench.settings.refine
    harmful, harmless = bench.prompts.harmful[: settings.prompts], bench.prompts.harmless[: settings.prompts]
    responses, kinds = answers(bench, teacher, harmful)
    targets = [
        TeacherForced(bench.chat.token_ids(prompt), response.ids[: settings.tokens]) if kind == "answered" else None
        for prompt, response, kind in zip(harmful, responses, kinds, strict=True)
    ]
    n_asked = max(1, round(settings.validation * len(harmful)))
    answered = [row for row in targets[n_asked:] if row is not None]
    if len(answered) < _FEWEST:
        bench.context.reporter.warn(
            f"The front isn't refined, because no edited model answers more than {len(answered)} of {len(targets) - n_asked} "
            "harmful training prompts; try more trials with -n."
        )
        return None
    own = _own_answers(bench, harmless)
    n_held = max(1, round(settings.validation * len(own)))
    whose = f"trial {start}" if isinstance(start, int) else "a plain ablation"
    bench.context.reporter.note(f"{len(answered)} answers of {whose} to learn from")
    validation = Rows([row for row in targets[:n_asked] if row is not None], own[:n_held])
    return Lesson(Rows(answered, own[n_held:]), validation, n_asked, start, _first_beta(bench, teacher, validation))


def _first_beta(bench: Workbench, teacher: Params, validation: Rows) -> float:
    passes, factors = passes_of(bench), bench.editor.factors(teacher)
    with bench.learning():
        before, after = passes.loss({}, validation), passes.loss(factors, validation)
    return first_beta(before.target - after.target, after.first + after.along)


def _own_answers(bench: Workbench, prompts: Sequence[Prompt]) -> list[TeacherForced]:
    """The prompts with the first tokens of the unedited model's greedy answers."""
    batches = Batches(bench.sizes.decode, bench.loaded.device, row_bytes=bench.sizes.row_bytes[2])

    def work(batch: Sequence[Prompt]) -> list[TeacherForced]:
        bench.context.check()
        ids = bench.plain.generate_ids(batch, bench.settings.refine.tokens)
        return [TeacherForced(bench.chat.token_ids(prompt), tuple(row)) for prompt, row in zip(batch, ids, strict=True)]

    with bench.base():
        return batches.run(prompts, work)
