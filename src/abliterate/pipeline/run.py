"""A whole run, in the paper's order: load, calibrate, residuals, directions, baseline, search, pick, export.

Each stage takes and returns values and leaves a named artifact in the run directory.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import RunResult
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError
from abliterate.export import check_output
from abliterate.files import write_atomically
from abliterate.model.devices import choose_device
from abliterate.model.editor import Editor
from abliterate.pipeline import local_workers, report_data, stages, workers
from abliterate.pipeline.batch_size import Tuned
from abliterate.pipeline.cache_keys import study_identity
from abliterate.pipeline.context import Context, make_store, read_prompts
from abliterate.pipeline.export import Picked, export, keep_recipe, prepare, push_export
from abliterate.pipeline.heldout import evaluate_trial, read_heldout
from abliterate.pipeline.preflight import check_model, check_names
from abliterate.pipeline.workbench import Workbench, load_and_calibrate, tune_only
from abliterate.prompts.sets import Heldout, PromptSets
from abliterate.report.page import write_report
from abliterate.report.tables import summary
from abliterate.search.front import no_front, pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.search.selection import SelectionRule, parse_rule
from abliterate.search.storage import POLL
from abliterate.search.study import STUDY_NAME, Study, open_study
from abliterate.settings.schema import Settings
from abliterate.settings.sources import dump_settings
from abliterate.types import Baseline, Reporter, Trial

Choose = Callable[[Sequence[Trial], Trial, Baseline], Trial]


def run(
    settings: Settings,
    reporter: Reporter,
    directory: RunDirectory,
    *,
    resume: bool = False,
    restart: bool = False,
    gpus: int = 1,
    choose: Choose | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """A whole run, new, continued (`resume`) or begun anew (`restart`); returns the content of `result.json`.

    `gpus`: devices of this machine to search on at once, each in a process of its own.

    Raises:
        InputError, AbliterateError: with the sentence a person sees. Interrupted: from `check`; trials are kept.
    """
    with directory.locked():
        return _run(settings, reporter, directory, resume, restart, gpus, choose, check)


def _run(
    settings: Settings,
    reporter: Reporter,
    directory: RunDirectory,
    resume: bool,
    restart: bool,
    gpus: int,
    choose: Choose | None,
    check: Callable[[], None],
) -> dict[str, Any]:
    rule = check_names(settings)
    devices = local_workers.devices_of(gpus, choose_device(settings.device))
    directory.check(resume=resume, restart=restart)
    if settings.export.kind != "none" and not restart:
        check_output(directory.export)
    result = RunResult(directory, reporter)
    if resume:
        result.go_on()
    context = Context(settings, reporter, result, make_store(settings, reporter), check)
    check_model(settings)  # before prompts are fetched: the likeliest mistake is the model's name
    prompts = read_prompts(context)
    held = read_heldout(context, prompts.all_sets())
    directory.prepare(resume=resume, restart=restart)  # no earlier: a mistyped option must not move an old run aside
    bench = load_and_calibrate(context, prompts)
    study = claim_study(context, bench, prompts, directory)  # before anything of an older run is overwritten
    write_atomically(directory.settings, dump_settings(settings))

    kept = report_data.samples(prompts)
    harmful, harmless = stages.residuals(context, bench, prompts, kept)
    directions = stages.directions(context, harmful, harmless, directory.directions)
    report_data.geometry(context, prompts, kept, (harmful, harmless), directions, directory.geometry)
    del harmful, harmless, kept
    editor = stages.make_editor(context, bench, directions)
    bench = stages.trial_engine(context, bench, editor, prompts)
    baseline = stages.baseline(context, bench, prompts)

    workers.publish(context, bench, study, baseline, prompts, directory.directions)
    with local_workers.local_workers(directory, devices, settings.search.storage, reporter.warn) as look:
        search(context, bench, editor, study, baseline, prompts, rule, look)
    selected, picked = pick(context, bench, editor, baseline, prompts, rule, choose, held)
    report_data.answers(context, bench, editor, prompts, selected.params, directory.answers)
    # One model at a time: the export reads the weights anew.
    del bench, editor
    gc.collect()
    if picked:
        export(context, picked, prompts, directory.export)
    keep_recipe(context, directory, exported=picked is not None)
    with result.stage("report"):
        write_report(directory, result.record)
    result.save()
    if picked and settings.export.push:  # last: a failed upload costs nothing else
        push_export(context, directory.export)
        write_report(directory, result.record)
    reporter.finish(result.record, str(directory.path), summary(result.record, str(directory.path)))
    return result.record


def claim_study(context: Context, bench: Workbench, prompts: PromptSets, directory: RunDirectory) -> Study:
    """The run's study, new or continued; refused where the options given would change what its trials mean."""
    settings = context.settings
    space = stages.search_space(settings, bench)
    url = settings.search.storage
    name = directory.study_name() if url else STUDY_NAME
    study = open_study(url, directory.journal, space, settings.seed, name)
    identity = study_identity(settings, bench.loaded, bench.calibration.response_prefix, prompts.all_sets(), bench.objectives)
    known = len(context.result.record["trials"])
    study.claim(identity, begun=known > 0)
    lost = known - len(study.trials())
    if lost > 0:
        context.reporter.warn(f"The study lacks {lost} of the {known} trials that result.json lists; they are made again.")
    context.result.record |= {"identity": identity, "startup_trials": study.n_startup}
    study.fail_interrupted()
    return study


def search(
    context: Context,
    bench: Workbench,
    editor: Editor,
    study: Study,
    baseline: Baseline,
    prompts: PromptSets,
    rule: SelectionRule,
    look: Callable[[], None] = lambda: None,
) -> None:
    """Ask → apply edit → evaluate → tell, until the budget of trials is used; resumes where a study was left.

    Other workers may be at the same study: what they finish counts, and what they leave is done again. `look`: after those
    that the run itself started.
    """
    settings, result = context.settings, context.result
    with result.stage("search", f"{settings.search.trials} trials"):
        kept = {trial.number for trial in study.trials()}
        if kept:
            context.reporter.note(f"{len(kept)} trials are kept from before", resumed=len(kept))
        seen: set[int] | None = None
        while True:
            trials = study.trials()
            front = pareto_front(trials, baseline, bench.objectives)
            if {trial.number for trial in trials} != seen:
                for trial in trials:
                    if trial.number not in (kept if seen is None else seen):
                        context.reporter.trial(trial, settings.search.trials, trial in front, rule.preview(front))
                seen = {trial.number for trial in trials}
                record_search(context, bench, editor, trials, front, baseline)
            # Not those kept from before: what made them fail may have been mended.
            new = [trial for trial in trials if trial.number not in kept]
            stages.check_failures(new, settings.search.max_consecutive_failures)
            if len(trials) >= settings.search.trials:
                return
            context.check()
            look()
            study.fail_silent()
            asked = study.ask(settings.search.trials)
            if asked is None:  # others are at the last ones
                time.sleep(POLL)
                continue
            try:
                certificate = DominancePruner.of(trials, baseline, bench.objectives)
                with study.at_work(asked):
                    trial = stages.evaluate(context, bench, editor, asked.number, asked.params, prompts, certificate)
            except BaseException:
                study.give_up(asked)
                raise
            if not study.tell(asked, trial, baseline.prompts):
                context.reporter.warn(f"Trial {asked.number} gave no sign of life for so long that another worker has it.")


def record_search(
    context: Context, bench: Workbench, editor: Editor, trials: Sequence[Trial], front: Sequence[Trial], baseline: Baseline
) -> None:
    """Trials, front and caches so far, in `result.json`."""
    result = context.result
    result.trials(trials, front, baseline, bench.objectives)
    result.caches(
        residuals=context.store.counts("residuals"),
        svd={"hits": editor.memo.hits, "misses": editor.memo.misses},
        adapters={"hits": editor.adapters.hits, "misses": editor.adapters.misses},
    )
    result.save()


def pick(
    context: Context,
    bench: Workbench,
    editor: Editor,
    baseline: Baseline,
    prompts: PromptSets,
    rule: SelectionRule,
    choose: Choose | None,
    held: Heldout | None,
) -> tuple[Trial, Picked | None]:
    """One trial from the front, by the rule or by a person offered the rule's choice; None beside it: nothing is exported.

    It is measured on held-out prompts first: the export's card says what came of it.
    """
    result = context.result
    trials = [Trial.from_record(record) for record in result.record["trials"]]
    front = pareto_front(trials, baseline, bench.objectives)
    if not front:
        raise AbliterateError(no_front(baseline, bench.objectives))
    selected = choose(front, rule(front), baseline) if choose else rule(front)
    result.record["selected"] = selected.number
    result.save()
    evaluate_trial(context, bench, editor, baseline, selected, held)
    if context.settings.export.kind == "none":
        return selected, None
    with result.stage("pick", f"trial {selected.number}"):
        return selected, prepare(context, bench, editor, baseline, prompts, selected)


def tune(settings: Settings, reporter: Reporter) -> tuple[Tuned, ...]:
    """Measure batch sizes for the settings' model and prompts, without a run."""
    context = Context(settings, reporter, RunResult(None, reporter), make_store(settings, reporter), lambda: None)
    check_model(settings, editing=False)
    prompts = read_prompts(context)
    return tune_only(context, prompts)


def work(
    run_directory: Path | None,
    url: str,
    name: str,
    own: Mapping[str, Any],
    reporter: Reporter,
    *,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Work at a run's study, told by its directory or by storage and name, until its budget is used; returns its trials.

    `own`: this worker's options (device, model, cache), which win over the run's.
    """
    place = workers.place_of(run_directory, url, name)
    setup, directions = workers.wait_for_setup(*place, reporter, check)
    with workers.settings_of(setup, own) as settings:
        context = Context(settings, reporter, RunResult(None, reporter), make_store(settings, reporter), check)
        bench, editor, study = workers.join(place, setup, directions, context)
        rule = parse_rule(settings.search.select, settings.search.select_max_kl, bench.objectives)
        search(context, bench, editor, study, setup.baseline, setup.prompts, rule)
        return len(study.trials())
