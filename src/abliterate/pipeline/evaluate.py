"""Compare any candidate with its base on held-out prompts, and on tasks of lm-eval if given (`abliterate evaluate`).

A candidate is a whole model, an adapter on the base, or a trial of a run. An adapter and a trial share the base's weights, so
only a whole model needs memory for both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result, damaged, no_complete_trial
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.artifacts.runs import no_run
from abliterate.errors import AbliterateError, InputError, TrialError, first_line
from abliterate.evaluation.lm_eval import Ready, Tasks, check_tasks, run_tasks
from abliterate.evaluation.teacher_forced import ModelView
from abliterate.files import expanded
from abliterate.model import loader
from abliterate.model.devices import choose_device
from abliterate.model.model_files import is_adapter
from abliterate.model.peft import check_adapter, with_adapter
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.export import pinned
from abliterate.pipeline.from_settings import scorers_of
from abliterate.pipeline.heldout import against_search, measured, read_heldout, views
from abliterate.pipeline.lengths import named_sets
from abliterate.pipeline.preflight import check_model
from abliterate.pipeline.workbench import Workbench, open_workbench
from abliterate.prompts.sets import Heldout, PromptSets, prompt_sources
from abliterate.settings.schema import Settings
from abliterate.types import Prompt, Reporter, Trial

Kind = Literal["model", "adapter", "trial"]


@dataclass(frozen=True)
class Candidate:
    """The candidate: a directory or Hub id, or a run's directory and a trial number (None: the selected trial)."""

    kind: Kind
    source: str
    number: int | None = None

    @property
    def name(self) -> str:
        """The candidate's name in results, without a path of this machine."""
        name = loader.public_name(self.source) if self.kind != "trial" else Path(self.source).resolve().name
        return name if self.number is None else f"{name}:{self.number}"


def parse_candidate(text: str) -> Candidate:
    """The candidate that `text` names: a model directory or id, an adapter directory, RUN or RUN:N.

    Raises:
        InputError: `text` names none of these.
    """
    path = expanded(text)
    head, _, tail = text.rpartition(":")
    if head and tail.isdecimal() and not os.path.exists(path):  # os.path.exists is False for a name that is too long
        run = expanded(head)
        if not _is_run(run):
            raise no_run(run)
        return Candidate("trial", str(run), int(tail))
    if _is_run(path):
        return Candidate("trial", str(path))
    if is_adapter(path):
        return Candidate("adapter", str(path))
    loader.resolve_source(text)  # its error sentences explain what a path may be
    return Candidate("model", text)


def evaluate(
    settings: Settings,
    reporter: Reporter,
    candidate: Candidate,
    tasks: Tasks,
    *,
    check: Callable[[], None] = lambda: None,
    show: Callable[[Mapping[str, Any]], None] = lambda heldout: None,
) -> dict[str, Any]:
    """Measure both, and return {base, candidate, heldout, benchmarks, error}.

    `heldout` is as in a run's `result.json`; `error` is the failure of the benchmarks, or "". `show` is given `heldout` before
    the benchmarks begin, which may take hours.

    Raises:
        InputError: prompts, models or the run don't fit together. AbliterateError: the candidate's numbers are not finite.
    """
    scorers_of(settings, heldout=True)
    choose_device(settings.device)
    run = Result.read(RunDirectory(Path(candidate.source))) if candidate.kind == "trial" else None
    trial = _trial_of(run, candidate) if run else None
    if run:
        settings = _at_revision(settings, run)
    if trial:
        _refined(candidate).check(trial.params)
    context = Context.of(settings, reporter, check)
    check_model(settings, editing=False)
    _check_candidate(settings, candidate)
    ready = check_tasks(tasks)
    prompts = _search_prompts(context, required=trial is not None)
    held = read_heldout(context, tuple(prompts.by_name().values()) if prompts else (), required=True)
    assert held is not None
    sets = named_sets(prompts, held.sets)
    bench = open_workbench(context, sets=sets)  # nothing is edited for good, so coverage isn't checked
    names = {"base": bench.loaded.info.id, "candidate": candidate.name}
    bench.calibrate(prompts or _stand_in(held))
    try:
        with bench, _views(bench, candidate, run, trial, sets) as (base, edited):
            with context.stage("held-out", f"{len(held.sets.harmful)} + {len(held.sets.harmless)} prompts"):
                figures = measured(bench, base, edited, held)
            heldout: dict[str, Any] = {"trial": None, **figures, "search": None, "optimism": None}
            if trial is not None:
                assert run is not None
                assert run.baseline is not None
                heldout |= {"trial": trial.number, **against_search(figures, trial, run.baseline)}
            show(heldout)
            benchmarks, failure = _benchmarks(bench, base, edited, ready)
    except (TrialError, torch.OutOfMemoryError) as error:
        raise AbliterateError(
            f"The candidate can't be measured ({first_line(error)}); try a smaller --batch-size or --dtype."
        ) from error
    return {**names, "heldout": heldout, "benchmarks": benchmarks, "error": failure}


def _benchmarks(
    bench: Workbench, base: ModelView, candidate: ModelView, ready: Ready | None
) -> tuple[list[dict[str, Any]], str]:
    """The rows of lm-eval's tasks, and the reason if they are missing, or ""."""
    if ready is None:
        return [], ""
    context = bench.context
    with context.stage("benchmarks", ", ".join(ready.names)):
        return run_tasks(base, candidate, bench.loaded.tokenizer, ready, context.reporter.warn, context.check)


def _at_revision(settings: Settings, run: Result) -> Settings:
    """The settings with the commit that the run loaded, if BASE is the run's model."""
    if run.model is None or loader.public_name(settings.model) != run.model.id:
        return settings
    load = pinned(settings.load, loader.resolve_source(settings.model), run.model.revision)
    return settings.model_copy(update={"load": load})


def _check_candidate(settings: Settings, candidate: Candidate) -> None:
    """Raise InputError before the base is loaded if the candidate's config shows that it can't be loaded."""
    if candidate.kind == "adapter":
        check_adapter(Path(candidate.source))
    elif candidate.kind == "model":
        check_model(_settings_of(settings, candidate), editing=False)


def _settings_of(settings: Settings, candidate: Candidate) -> Settings:
    """The settings with the candidate as the model; the base's revision doesn't apply to it."""
    load = settings.load.model_copy(update={"revision": ""})
    return settings.model_copy(update={"model": candidate.source, "load": load})


def _is_run(path: Path) -> bool:
    directory = RunDirectory(path)
    return directory.holds_run or os.path.isfile(directory.result)


def _trial_of(run: Result, candidate: Candidate) -> Trial:
    number = run.selected if candidate.number is None else candidate.number
    if number is None and not any(trial.state == "complete" for trial in run.trials):
        why = no_complete_trial(run, Path(candidate.source))
        raise InputError(f"The run in {candidate.source} has no trial to measure, because {why}.")
    if number is None:
        raise InputError(f"The run in {candidate.source} has chosen no trial yet; name a trial as {candidate.source}:N.")
    return run.trial(number, candidate.source)


def _refined(candidate: Candidate) -> RefinedStore:
    """The directions of refined trials in the candidate's run."""
    return RefinedStore(RunDirectory(Path(candidate.source)).refined)


def _search_prompts(context: Context, *, required: bool) -> PromptSets | None:
    """The prompt sets of directions and search; None, with a warning, if default sets can't be loaded and aren't `required`."""
    are_given = any(getattr(context.settings.prompts, name) for name in prompt_sources(context.settings))
    try:
        return read_prompts(context)
    except InputError as error:
        if required or are_given:
            raise
        context.reporter.warn(
            f"The held-out prompts aren't compared with those that directions and search use by default, which can't be "
            f"loaded: {error}"
        )
        return None


def _stand_in(held: Heldout) -> PromptSets:
    """The held-out prompts as prompt sets, for batch sizes and response prefix where no others can be loaded."""
    return PromptSets(*(2 * (held.sets.harmful, held.sets.harmless)))


@contextlib.contextmanager
def _views(
    bench: Workbench, candidate: Candidate, run: Result | None, trial: Trial | None, sets: Mapping[str, Sequence[Prompt]]
) -> Iterator[tuple[ModelView, ModelView]]:
    """The base and the candidate, ready to be measured during the `with` block."""
    context, settings, base = bench.context, bench.settings, ModelView(bench.plain, bench.base)
    if trial is not None:
        assert run is not None
        assert run.model is not None
        if bench.loaded.info.fingerprint != run.model.fingerprint:
            raise InputError(f"The run in {candidate.source} is of another model ({run.model.id}); give that model as BASE.")
        directory = RunDirectory(Path(candidate.source))
        if fault := bench.fault(trial.params):
            raise damaged(directory, f"trial {trial.number} {fault}")
        bench.refined = _refined(candidate)
        bench.make_edits(stages.read_directions(directory.directions, run))
        yield views(bench, trial)
        return
    if candidate.kind == "adapter":
        with context.stage("load the adapter", candidate.name):
            peft = with_adapter(bench.loaded.model, Path(candidate.source))
        yield replace(base, active=peft.disable_adapter), replace(base, active=contextlib.nullcontext)
        return
    with open_workbench(context.with_settings(_settings_of(settings, candidate)), sets=sets) as other:
        other.use(bench.sizes, bench.response_prefix)
        probe = Prompt("What is 1+1?", settings.prompts.system)
        sizes = [each.loaded.model.config.get_text_config().vocab_size for each in (bench, other)]
        if sizes[0] != sizes[1] or other.chat.token_ids(probe) != bench.chat.token_ids(probe):
            raise InputError(
                f"The model {candidate.name} reads prompts as other tokens than the base, so the two can't be compared token "
                "by token; give the base that it was made from."
            )
        yield base, ModelView(other.plain, other.base)
