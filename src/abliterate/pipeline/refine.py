"""Refine the front by gradient: learn a strength and a direction for every module from answers that an edited model gives.

Only training prompts are used. Every result is a trial like others: the engine measures it on the evaluation prompts, which
refinement has never seen (docs/design.md §5b).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from abliterate import ranks
from abliterate.artifacts.cache import from_bytes, key_digest, to_bytes
from abliterate.edits import EditMethod, edit_method, is_refinable
from abliterate.errors import AbliterateError, TrialError, first_line
from abliterate.model.memory import memory_errors, usable_memory
from abliterate.model.weights import dense_weight, device_and_dtype
from abliterate.pipeline import stages
from abliterate.pipeline.lesson import Lesson, lesson_key, prepare_lesson, refusals, teachers_of
from abliterate.pipeline.passes import passes_of
from abliterate.pipeline.preflight import unrefined
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.files import digest
from abliterate.refine.betas import Tried, next_descent
from abliterate.refine.descent import BASE_LOGITS_BYTES, LOOK, Descent, Pass, Rates
from abliterate.refine.parameters import Module, Parameters
from abliterate.search.pruner import DominancePruner
from abliterate.search.study import Study
from abliterate.settings.schema import RefineSettings
from abliterate.types import RefinedParams, Trial

# The strength at the start and Adam's peak step of it, to be divided by the number of modules and multiplied by a method's
# `pace`; and the peak step of directions, to be divided by √d_model, or for k directions a module by √(k · d_model). The
# strengths of fewer than _FEW modules are as if there were so many: in plain ablation one above 1 turns a direction round.
_START, _COEFF_STEP, _DIRECTION_STEP, _FEW = 6.0, 1.2, 0.2, 12
# By how much an edit is made weaker to see whether it keeps a margin for prompts of other kinds, if the method doesn't say.
_MARGIN = 0.15
# The settings that a descent depends on, which a continued run may change.
_ASKED = {"steps", "learn", "batch", "tokens", "prompts", "validation"}


@dataclass(frozen=True)
class _Point:
    """The end of a descent at `beta`."""

    beta: float
    params: RefinedParams

    def tried(self, margin: float) -> Tried:
        """Its weight and the shares it leaves refused; the weaker edit's share is 1 if it wasn't asked with this `margin`."""
        validation = self.params.facts["validation"]
        weaker = float(validation["weaker"]) if validation.get("margin", -1.0) >= margin else 1.0
        return Tried(self.beta, float(validation["refused"]), weaker)

    @property
    def ends(self) -> bool:
        """Whether it ended a course: one that is continued goes on from the point before."""
        return bool(self.params.facts.get("ends", False))


@dataclass(frozen=True)
class _Plan:
    """A descent of so many steps at `beta`, from the point `before`; None is the beginning. The last of a course `ends` it."""

    beta: float
    steps: int
    before: _Point | None
    ends: bool = False


class Refinement:
    """Refinement of a search's front on a workbench; iterating gives the refined trials, each one measured and stored.

    Trials that the study already has are not computed again.
    """

    def __init__(self, bench: Workbench, study: Study, trials: Sequence[Trial], budget: int) -> None:
        self._bench = bench
        self._study = study
        self._trials = list(trials)
        self._budget = budget
        self._settings: RefineSettings = bench.settings.refine
        own = getattr(edit_method(bench.settings.edit.mode), "margin", _MARGIN)
        self._margin = float(own if self._settings.margin == "auto" else self._settings.margin)
        self._lesson_key: dict[str, Any] = {}
        self._passes: Pass | None = None
        self._kept_moments: dict[str, dict[str, Tensor]] = {}  # of this process's descents, by `_identity` of their ends

    def __iter__(self) -> Iterator[Trial]:
        if not is_refinable(edit_method(self._bench.settings.edit.mode)):
            self._bench.context.reporter.note(unrefined(self._bench.settings))
            return
        try:
            with memory_errors():
                yield from self._refined()
        except (TrialError, torch.OutOfMemoryError) as error:  # out of memory even for one row, or losses that aren't finite
            reporter = self._bench.context.reporter
            reporter.warn(f"Refinement ends here ({first_line(error)}); the front so far stands.")

    def _refined(self) -> Iterator[Trial]:
        points: list[_Point] = []
        lesson: Lesson | None = None
        self._tell_changes()
        while len(points) < self._settings.n_descents:
            trial = self._known(len(points))
            if trial is not None and trial.state == "failed":
                trial = self._measured_again(trial)
            if trial is None:
                lesson = lesson or self._lesson()
                if lesson is None:
                    return
                trial = self._one_trial(lesson, self._next(lesson, points), len(points))
            assert isinstance(trial.params, RefinedParams)
            points.append(_Point(trial.params.facts["beta"], trial.params))
            yield trial

    def _tell_changes(self) -> None:
        """Note the settings that finished descents were made with other values of."""
        asked, changed = self._settings.model_dump(include=_ASKED), set[str]()
        for trial in self._trials:
            before = trial.params.facts.get("asked", {}) if isinstance(trial.params, RefinedParams) else {}
            if isinstance(before, dict):  # a study may come from anybody
                changed |= {f"refine.{name}" for name in before.keys() & asked.keys() if before[name] != asked[name]}
        if changed:
            self._bench.context.reporter.note(
                f"finished descents stay as they are; {', '.join(sorted(changed))} act on further ones (--restart begins anew)"
            )

    def _known(self, stage: int) -> Trial | None:
        """The trial of a finished descent, at the weight that is asked for; a failed one only if no other is there."""
        betas, failed = self._settings.betas, None
        for trial in self._trials:
            facts = trial.params.facts if isinstance(trial.params, RefinedParams) else {}
            if facts.get("stage") == stage and (betas == "auto" or betas[stage] == facts["beta"]):
                if trial.state != "failed":
                    return trial
                failed = failed or trial
        return failed

    def _measured_again(self, failed: Trial) -> Trial:
        """A finished descent whose measurement failed in an earlier session, for lack of memory perhaps, as a new trial."""
        bench = self._bench
        with bench.context.stage("refine", f"trial {failed.number} once more"):
            number = self._study.free_slot(self._budget)
            trial = stages.evaluate(bench, number, failed.params, DominancePruner.never(bench.objectives))
        self._add(trial)
        return trial

    def _lesson(self) -> Lesson | None:
        """What the descents learn from; None, with a warning, if there is nothing to learn or no way to."""
        bench, search = self._bench, [trial for trial in self._trials if not isinstance(trial.params, RefinedParams)]
        with bench.context.stage("lesson", "answers to learn from"):
            if not self._has_backward():
                return None
            teachers = teachers_of(bench, search)
            self._lesson_key = lesson_key(bench, teachers)
            return prepare_lesson(bench, teachers)

    def _has_backward(self) -> bool:
        """Whether every layer passes gradients on; some quantized layers don't, which is a warning."""
        passes, prompts = passes_of(self._bench), self._bench.prompts
        try:
            with self._bench.learning(), memory_errors():
                passes.probe(self._bench.chat.token_ids(prompts.harmless[0]), self._parameters(None)[0].factors())
        except torch.OutOfMemoryError as error:
            raise TrialError(first_line(error)) from error
        except (RuntimeError, NotImplementedError) as error:
            self._bench.context.reporter.warn(
                f"The front isn't refined, because this model's layers have no backward pass ({first_line(error)}); load it in "
                "bfloat16, without quantization, to refine it, or search longer, with -n 200."
            )
            return False
        return True

    def _next(self, lesson: Lesson, points: Sequence[_Point]) -> _Plan:
        """The next descent: at the next listed weight, or at the one that refusals ask for."""
        settings = self._settings
        if settings.betas != "auto":
            beta = settings.betas[len(points)]
            return _Plan(beta, settings.steps, _nearest(points, beta))
        course, is_last = [point for point in points if not point.ends], len(points) == settings.n_descents - 1
        tried = [point.tried(self._margin) for point in course]
        found = next_descent(tried, lesson.first_beta, settings.max_refused, is_last=is_last)
        before = None if found.after is None else course[found.after]
        return _Plan(found.beta, settings.steps, before, ends=is_last and bool(course))

    def _one_trial(self, lesson: Lesson, plan: _Plan, stage: int) -> Trial:
        """Descend at one β, and measure and store the result."""
        bench, started = self._bench, time.perf_counter()
        place = f"{stage + 1} of {self._settings.n_descents}"
        with bench.context.stage("refine", f"{place}: {plan.steps} steps, β = {plan.beta:.3g}"):
            number = self._study.free_slot(self._budget)
            params = self._descend(lesson, plan, stage, number)
            # In full: evaluation prompts don't show which trial keeps a margin, so one that others dominate may be wanted.
            trial = stages.evaluate(bench, number, params, DominancePruner.never(bench.objectives))
            trial = replace(trial, seconds=round(time.perf_counter() - started, 3))  # with the steps that led there
        self._add(trial)
        return trial

    def _add(self, trial: Trial) -> None:
        if not self._study.add(trial):
            raise AbliterateError("Another process has taken a refined trial's place in the study; continue with --resume.")
        self._trials.append(trial)

    def _descend(self, lesson: Lesson, plan: _Plan, stage: int, number: int) -> RefinedParams:
        """Descend from the plan's start; of the steps looked at, that with the least loss on validation rows counts.

        A descent that goes on from another one takes over its moments: they say how large and how noisy each gradient is, and
        take many steps to become right.
        """
        bench, settings, beta = self._bench, self._settings, plan.beta
        parameters, starts = self._parameters(plan.before)
        n, entries = parameters.directions.flatten(1).shape
        pace = _pace(parameters.method)
        rates = Rates(
            pace * _COEFF_STEP / max(n, _FEW), _DIRECTION_STEP / math.sqrt(entries) if settings.learn == "directions" else 0.0
        )
        passes = self._new_passes(lesson)
        descent = Descent(parameters, passes, lesson.training, rates, settings.batch, bench.settings.seed + 7919 * stage)
        begun = _identity(plan.before.params) if plan.before else ""
        part = {"stage": stage, "begun": begun, "beta": beta, "steps": plan.steps}
        part |= {"scales": [pace * _START, pace * _COEFF_STEP, _DIRECTION_STEP, _FEW]}
        part |= {"settings": settings.model_dump(include={"learn", "batch"})}
        kept = _Kept(bench, self._key(), part)
        best = kept.restore(descent)
        if best is None and plan.before:
            descent.load_moments(self._moments(begun))
        while descent.steps < plan.steps:
            with bench.learning():
                descent.step(beta, _rate(descent.steps / plan.steps))
                bench.context.reporter.progress(descent.steps, plan.steps, "steps")
                if descent.steps % LOOK and descent.steps < plan.steps:
                    continue
                loss = passes.loss(parameters.factors(), lesson.validation)
            if not math.isfinite(loss.total(beta)):
                raise TrialError("the loss of refinement is not finite")
            if best is None or loss.total(beta) < best.record["total"]:
                record = {"total": loss.total(beta), "target": loss.target, "first": loss.first, "along": loss.along}
                best = _Best(record, parameters.coeffs.clone(), parameters.directions.clone())
            kept.keep(descent, best)
        best = ranks.agree(lambda: best)  # the last bits of gradients may differ between ranks, and the file's hash must not
        assert best is not None
        params = self._stored(lesson, plan, stage, number, best, descent, starts)
        self._keep_moments(_identity(params), descent.moments())
        return params

    def _new_passes(self, lesson: Lesson) -> Pass:
        """Passes that have fed nothing yet. How they are made is decided once, since later less memory is free."""
        if self._passes is None:
            self._passes = passes_of(self._bench)
            most_bytes = min(BASE_LOGITS_BYTES, usable_memory(torch.device("cpu")) // 2)
            with self._bench.learning():
                self._passes.keep_base_logits([*lesson.validation.harmless, *lesson.training.harmless], most_bytes)
        return replace(self._passes, tokens=0)

    def _keep_moments(self, point: str, moments: dict[str, Tensor]) -> None:
        self._kept_moments[point] = moments
        key = self._moments_key(point)
        self._bench.context.store.put("descent", key, moments, f"{self._bench.loaded.info.id}: moments", remember=False)

    def _moments(self, point: str) -> Mapping[str, Tensor]:
        """Adam's moments at the end of the descent that led to the point with this `_identity`."""
        found = self._kept_moments.get(point) or self._bench.context.store.get(
            "descent", self._moments_key(point), remember=False
        )
        if not found:
            self._bench.context.reporter.note("the moments of the descent before aren't in the cache, so Adam begins anew")
        return found or {}

    def _moments_key(self, point: str) -> dict[str, Any]:
        return {**self._key(), "after": point}

    def _key(self) -> dict[str, Any]:
        """What all that is kept of this refinement has in its key."""
        return {"model": self._bench.loaded.info.id, "lesson": key_digest(self._lesson_key)}

    def _stored(
        self, lesson: Lesson, plan: _Plan, stage: int, number: int, best: _Best, descent: Descent, starts: Tensor
    ) -> RefinedParams:
        """The point as parameters of a trial, with the shares of validation prompts that it refuses, as it is and weaker."""
        bench, settings, before = self._bench, self._settings, plan.before
        names = [module.name for module in descent.parameters.modules]
        sets = {"harmful": bench.prompts.harmful, "harmless": bench.prompts.harmless}
        cosines = (best.directions * starts).flatten(1).sum(dim=1).clamp(-1, 1).tolist()
        facts = {
            "beta": plan.beta,
            "steps": descent.steps + (before.params.facts["steps"] if before else 0),
            "stage": stage,
            "ends": plan.ends,
            "learn": settings.learn,
            "asked": settings.model_dump(include=_ASKED),
            "seed": bench.settings.seed,
            "start": lesson.start,
            "prompts": {name: {"count": len(prompts), "digest": digest(prompts)} for name, prompts in sets.items()},
            "cosine": dict(zip(names, cosines, strict=True)),
            "tokens": descent.passes.tokens + (before.params.facts["tokens"] if before else 0),
        }
        if best.directions.ndim == 3:
            facts["directions"] = best.directions.shape[1]
        coeffs = dict(zip(names, best.coeffs.tolist(), strict=True))
        params = bench.refined.put(number, coeffs, dict(zip(names, best.directions, strict=True)), facts)
        weaker = replace(params, coeffs={name: (1 - self._margin) * coeff for name, coeff in params.coeffs.items()})
        asked = bench.prompts.harmful[: lesson.n_asked]
        shares = {name: refusals(bench, each, asked) / len(asked) for name, each in (("refused", params), ("weaker", weaker))}
        validation = {**best.record, **shares, "margin": self._margin, "prompts": len(asked)}
        return replace(params, facts={**params.facts, "validation": validation})

    def _parameters(self, before: _Point | None) -> tuple[Parameters, Tensor]:
        """θ at the start of a descent, and the directions that everything began with, (n, d_model) or (n, k, d_model).

        Everything begins at weak equal strengths along each layer's own directions, several of them with equal weights: from a
        teacher's edit, later words of harmless answers would move more (docs/decisions.md).
        """
        bench = self._bench
        given, method_of = bench.editor.directions, bench.editor.method_of
        table = given.vectors[1:].float().cpu()
        targets = [target for target in bench.loaded.targets if table[target.layer].any() and method_of(target) is not None]
        modules = [
            Module(target.name, target.layer, partial(_weight, target.module), method_of(target), target.reads)
            for target in targets
        ]
        starts = torch.stack([given.seen(table[target.layer], target.norm) for target in targets])
        found = starts.any(dim=-1).view(len(targets), -1).sum(dim=1)  # each module's number of directions that aren't zero
        starts = (starts.flatten(1) / found.sqrt()[:, None]).view_as(starts)
        method = edit_method(bench.settings.edit.mode)
        coeffs = torch.full((len(targets),), _pace(method) * _START / max(len(targets), _FEW))
        directions = starts.clone()
        if before is not None:
            stored = bench.refined.directions(before.params)
            coeffs = torch.tensor([before.params.coeffs[module.name] for module in modules])
            directions = torch.stack([stored[module.name] for module in modules]).clone()
        return Parameters(modules, method, coeffs, directions), starts


@dataclass(frozen=True)
class _Best:
    """θ of the step that the validation rows like best, and their losses."""

    record: dict[str, float]
    coeffs: Tensor
    directions: Tensor


@dataclass(frozen=True)
class _Kept:
    """The state of the descent at work, in the cache: a killed run continues at its last look and ends as if it had gone on.

    `key` names the refinement and `part` the descent, so that one entry serves all descents of a refinement.
    """

    bench: Workbench
    key: dict[str, Any]
    part: dict[str, Any]

    def keep(self, descent: Descent, best: _Best) -> None:
        record = {"part": self.part, "best": best.record, "tokens": descent.passes.tokens}
        tensors = {"best_coeffs": best.coeffs, "best_directions": best.directions, **descent.state()}
        label = f"{self.bench.loaded.info.id}: step {descent.steps}"
        everything = {**tensors, "record": to_bytes(json.dumps(record))}
        self.bench.context.store.put("descent", self.key, everything, label, remember=False)

    def restore(self, descent: Descent) -> _Best | None:
        """Continue `descent` where it was, if it was kept; returns its best step."""
        stored = self.bench.context.store.get("descent", self.key, remember=False)
        record = json.loads(from_bytes(stored["record"])) if stored else {}
        if not stored or record["part"] != self.part:
            return None
        descent.load_state(stored)
        descent.passes.tokens = record["tokens"]
        return _Best(record["best"], stored["best_coeffs"], stored["best_directions"])


def _identity(params: RefinedParams) -> str:
    """A hash of a point's θ; directions alone don't tell points apart where only strengths are learned."""
    return key_digest({"coeffs": dict(params.coeffs), "directions": params.sha256})


def _pace(method: EditMethod) -> float:
    """How many times larger a method's coeffs begin and move than plain ablation's."""
    return float(getattr(method, "pace", 1.0))


def _nearest(points: Sequence[_Point], beta: float) -> _Point | None:
    """The point from which a descent at `beta` starts: that of the largest smaller β; None to start from the beginning."""
    return max((point for point in points if point.beta < beta), key=lambda point: point.beta, default=None)


def _rate(done: float) -> float:
    """The share of the peak step sizes: a half cosine down to a tenth."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def _weight(module: torch.nn.Module) -> Tensor:
    """W, on the CPU where the device has no float64."""
    device, _ = device_and_dtype(module)
    return dense_weight(module).to("cpu" if device.type in ("mps", "meta") else device)
