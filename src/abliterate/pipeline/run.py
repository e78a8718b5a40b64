"""Carry out a whole run, in the paper's order: load, calibrate, residuals, directions, baseline, search, refine, pick, export.

Each stage takes and returns values and leaves a named artifact in the run directory; only `_Run.save` writes `result.json`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from abliterate import ranks
from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import REPORT_STAGE, Result
from abliterate.artifacts.run_directory import RunDirectory, default_path, named_after
from abliterate.directions import Directions
from abliterate.edits import edit_method, needs_answers
from abliterate.errors import AbliterateError, InputError
from abliterate.export import check_output
from abliterate.files import read_toml, write_atomically
from abliterate.model.devices import choose_device
from abliterate.objectives import check_searchable
from abliterate.pipeline import report_data, stages
from abliterate.pipeline.context import Context, StageClock, make_store, read_prompts
from abliterate.pipeline.export import Picked, export_and_verify, prepare, prompt_records, push_export, write_recipe
from abliterate.pipeline.export_trial import StoredEdits, edits_on, export_and_check
from abliterate.pipeline.from_settings import objectives_of, scorers_of
from abliterate.pipeline.heldout import evaluate_trial, read_heldout
from abliterate.pipeline.local_workers import devices_of, local_workers, own_places
from abliterate.pipeline.module_inputs import Answers, with_inputs
from abliterate.pipeline.preflight import as_refinable, check_model, check_names, note_adapter, with_edit_mode
from abliterate.pipeline.requirements import note_time
from abliterate.pipeline.search import Search
from abliterate.pipeline.seeds import Seeds, check_continued, seed_trials, seed_values
from abliterate.pipeline.workbench import Workbench, load_calibrated
from abliterate.pipeline.workers import announced, publish, published, published_answers
from abliterate.prompts.sets import Heldout
from abliterate.report.ending import ending
from abliterate.report.page import write_report
from abliterate.scorers.yardstick import Yardstick
from abliterate.search.front import no_front
from abliterate.search.selection import SelectionRule
from abliterate.search.study import Study, check_database, open_study
from abliterate.settings import untrusted
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.settings.sources import dump_settings, load_settings
from abliterate.terminal.progress_bar import default_reporter
from abliterate.types import Baseline, Reporter, Trial


@dataclass(frozen=True)
class Candidates:
    """What a person chooses among: the run's trials so far, of which `front` and `proposed`, by the rule, are the best.

    `bench` has the model, and `directory` the run, so that a person can talk to a trial before.
    """

    bench: Workbench
    directory: RunDirectory
    trials: Sequence[Trial]
    front: Sequence[Trial]
    proposed: Trial
    baseline: Baseline


# A person's choice: the complete trial that is exported, or None if none is.
Choose = Callable[[Candidates], Trial | None]


def run(
    settings: Settings,
    reporter: Reporter | None = None,
    directory: RunDirectory | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
    gpus: int = 1,
    choose: Choose | None = None,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Carry out a run that is new, continued (`resume`) or begun anew (`restart`); returns the content of its `result.json`.

    `directory` is by default the directory that the settings name, or `runs/<model>-<time>`. `gpus` is the number of devices
    to search on, each in a process of its own. `check` is called at safe points and may raise `Interrupted`.

    Raises:
        InputError, AbliterateError: with the sentence that a person sees. Interrupted: by `check`; finished trials are kept.
    """
    directory = directory or RunDirectory(Path(settings.out) if settings.out else default_path(settings.model))
    reporter = reporter or default_reporter()
    try:
        with directory.locked():
            settings = with_edit_mode(settings, reporter.note)
            rule = check_names(settings)
            check_searchable(objectives_of(settings, scorers_of(settings)))
            settings = as_refinable(settings, reporter.note)
            devices = devices_of(gpus, choose_device(settings.device), settings.device)
            if devices and settings.load.device_map:
                raise InputError(
                    "With load.device_map the model lies on several devices, so --gpus has none left for further copies of it; "
                    "leave one of the two out."
                )
            directory.check(resume=resume, restart=restart)
            check_database(settings.search.storage)
            if settings.export.kind != "none" and not restart:
                check_output(directory.export, settings.model)
            seeds = cache(lambda: ranks.agree(lambda: seed_trials(settings.search)))
            if settings.search.seed_from and not ranks.agree(lambda: resume and directory.holds_run):
                seeds()  # before a model is loaded, and before the run that it names may be moved aside
            if resume:
                ranks.agree(lambda: check_continued(settings.search, directory))
                result, settings = ranks.agree(lambda: (Result.continued(directory), at_its_moment(settings, directory)))
            else:
                result = Result()
            context = Context(settings, reporter, make_store(settings, reporter), check, StageClock(result))
            return _Run(context, directory, result, rule, seeds).go(devices, choose, resume=resume, restart=restart)
    finally:
        directory.remove_if_empty()


def at_its_moment(settings: Settings, directory: RunDirectory) -> Settings:
    """The settings with the moment at which the run in `directory` renders its prompts, if it has one and none is given."""
    if settings.load.template_now:
        return settings
    stored: Any = {}
    with contextlib.suppress(InputError):  # without its settings the run is compared by its identity
        stored = read_toml(directory.settings).get("load")
    now = stored.get("template_now", "") if isinstance(stored, dict) else ""
    try:
        load = LoadSettings.model_validate(settings.load.model_dump() | {"template_now": now})
    except ValidationError as error:
        raise InputError(
            f"The file {directory.settings} names no moment under load.template_now; correct it, or start over with --restart."
        ) from error
    return settings.model_copy(update={"load": load})


@dataclass
class _Run:
    """A run at work in its directory; `result` grows with every stage. `seeds` reads the trials of `search.seed_from`."""

    context: Context
    directory: RunDirectory
    result: Result
    rule: SelectionRule
    seeds: Callable[[], Seeds]

    def go(self, devices: Sequence[str], choose: Choose | None, *, resume: bool, restart: bool) -> Result:
        """Carry out the stages in their order."""
        context, directory, result = self.context, self.directory, self.result
        note_adapter(context)
        check_model(context.settings)  # before prompts are fetched, because the model's name is the likeliest mistake
        prompts = read_prompts(context)
        held = ranks.agree(lambda: read_heldout(context, tuple(prompts.by_name().values())))
        directory.prepare(resume=resume, restart=restart)  # not earlier: a mistyped option must not move an old run aside

        known, kept_out = ranks.agree(self._known_prefix), held.sets if held else None
        with load_calibrated(context, prompts, prefix=known, held=kept_out) as bench:  # steps 1 and 2 of docs/design.md §2
            context = self.context = bench.context  # its settings have the moment that the run keeps
            if not bench.time_told:
                note_time(context, bench.loaded, bench.chat, bench.prompts)
            bench.refined = RefinedStore(directory.refined)
            stages.check_prior(bench)  # here, because a run that is begun can't leave it out
            study = self._claim_study(bench)  # before any file of an older run is overwritten
            with announced(study):
                baseline = self._set_up(bench, study)  # 3 to 5
            search = self._search(bench, study, baseline, devices)  # 6
            self._refine(search)  # 7
            bench.renew_batch_sizes()
            selected, wanted = self._select(search, choose, held)  # 8
            picked, edits = self._prepare_export(bench, selected) if wanted else (None, None)
            if (answers := report_data.answers(bench, selected)) is not None:
                report_data.write_one_line(directory.answers, answers)

        # The workbench is closed by now, so memory holds one model at a time: the export reads the weights anew.
        ranks.leave()
        if not ranks.is_first():
            return result
        if picked:
            final = directory.export
            verified = export_and_verify(context, picked, result, final)
            for record in verified if edits is None else export_and_check(context, picked, edits, result, final):  # 9
                result.export = record
                self.save()
        write_recipe(context.settings, result, directory, exported=picked is not None)
        return self._end(exported=picked is not None, front_shown=choose is not None)

    def _set_up(self, bench: Workbench, study: Study) -> Baseline:
        """Prepare the workbench for trials, publish what workers need, and return the baseline."""
        result = self.result
        recovered = self._recovered(bench, study)
        if result.yardstick and result.trials:
            # Its bounds decide what the trials' counts mean, and those of a new one may differ by rounding.
            with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                bench.yardstick = Yardstick.from_record(result.yardstick)
        write_atomically(self.directory.settings, dump_settings(self.context.settings))
        directions = self._find_directions(bench, study, recovered)
        bench.prepare(directions)
        baseline = self._kept_baseline(stages.baseline(bench))
        result.yardstick = bench.yardstick.to_record() if bench.yardstick else None
        publish(bench, study, baseline, directions, result.identity or {})
        return baseline

    def save(self) -> None:
        """Write `result.json`, with the time of the current stage so far, which an interruption must not lose."""
        self.context.clock.count()
        self.result.update(timings=self.context.clock.timings, memory=self.context.clock.memory)
        self.result.write(self.directory)

    def _claim_study(self, bench: Workbench) -> Study:
        """The run's study, new or continued; InputError if the given options would change what its trials mean."""
        settings, directory, result = self.context.settings, self.directory, self.result
        url = settings.search.storage

        def opened() -> Study:
            name = directory.study_name(settings.model) if url else named_after(settings.model)
            # Ranks of one model must end together, at a safe point of them all.
            check = self.context.check if ranks.size() == 1 else lambda: None
            return open_study(url, directory.journal, bench.space, settings.seed, name, check=check)

        study = opened() if ranks.size() == 1 else cast(Study, ranks.Owned(Study, opened, alone=("at_work", "give_up")))
        identity = bench.identity()
        listed = len(result.trials)
        study.claim(identity, begun=listed > 0)
        if settings.search.seed_from and not study.has("seeds"):
            seeds = self.seeds()
            study.begin(seeds=seed_values(bench.space, settings.edit.mode, seeds))
            numbers = ", ".join(str(trial.number) for trial in seeds.trials)
            but = f", but for their largest coeffs, which mean something else in its edit mode, {seeds.mode}"
            self.context.reporter.note(
                f"the first trials repeat trials {numbers} of {settings.search.seed_from}"
                f"{'' if seeds.mode in ('', settings.edit.mode) else but}"
            )
        lost = listed - len(study.trials())
        if lost > 0:
            self.context.reporter.warn(
                f"The study lacks {lost} of the {listed} trials that result.json lists; the missing trials are repeated."
            )
        result.update(**bench.record(), prompts=prompt_records(settings, bench.prompts))
        result.update(identity=identity, startup_trials=study.n_startup)
        study.fail_interrupted()
        return study

    def _recovered(self, bench: Workbench, study: Study) -> Directions | None:
        """The directions of a continued run whose `result.json` is gone, from its study, as its workers have them.

        Baseline and yardstick, to which its trials are relative, come from there, too, into `result`.
        """
        trials = study.trials()
        found = published(study) if trials and self.result.baseline is None else None
        if found is None:
            return None
        setup, directions = found
        self.result.searched(trials, (), setup.baseline, bench.objectives)
        self.result.yardstick = None if setup.yardstick is None else dict(setup.yardstick)
        self.context.reporter.note("result.json is made again from the study, with its baseline and directions")
        return with_inputs(bench, directions, setup.answers)

    def _find_directions(self, bench: Workbench, study: Study, recovered: Directions | None) -> Directions:
        """Residuals and directions, with what the report shows of them, and the layer prior if a new study needs it."""
        context, directory = self.context, self.directory
        residuals = stages.residuals(bench)
        answers = self._kept_answers(study)
        known = recovered or self._kept_directions()
        directions = known or with_inputs(bench, stages.directions(context, residuals), answers)
        if answers and not directions.answers:  # of a run by a version whose result.json hadn't them
            directions = replace(directions, answers=answers)
        write_atomically(directory.directions, stages.directions_file(directions))
        self.result.directions = stages.directions_record(directions)
        report_data.write_one_line(directory.geometry, report_data.geometry(context, bench.prompts, residuals, directions))
        if not study.has("prior") and (prior := stages.layer_prior(context, residuals)):
            study.begin(prior=prior)
        return directions

    def _kept_directions(self) -> Directions | None:
        """The directions that a continued run has left: made on another device, others would change what its trials mean.

        Several ranks make them anew, because some of their machines don't have the run directory.
        """
        if ranks.size() > 1 or self.result.directions is None:
            return None
        with contextlib.suppress(InputError):  # a file that isn't the run's is replaced
            return stages.read_directions(self.directory.directions, self.result)
        return None

    def _kept_answers(self, study: Study) -> Answers | None:
        """The answers along which a continued run has captured inputs, by its `result.json` or as its workers have them."""
        record = ranks.agree(lambda: self.result.directions)
        if record is None or not needs_answers(edit_method(self.context.settings.edit.mode)):
            return None
        return record.answers or published_answers(study) or None

    def _kept_baseline(self, here: Baseline) -> Baseline:
        """The baseline of a continued run, to which its trials are relative; another device or library may give another one."""
        before = self.result.baseline
        if before is None or not self.result.trials:
            return here
        stages.warn_of_another_baseline(self.context, here, before, "In this session")
        return before

    def _known_prefix(self) -> str | None:
        """The response prefix that a continued run has found by the present settings; None: it is to be found."""
        response, prefix = self.context.settings.response, self.result.response_prefix
        if prefix is None or not self.result.trials or response.prefix:
            return None
        with contextlib.suppress(InputError):
            return prefix if load_settings(str(self.directory.settings)).response == response else None
        return None

    def _search(self, bench: Workbench, study: Study, baseline: Baseline, devices: Sequence[str]) -> Search:
        """The finished search; `result.json` is written after every trial, so that none is lost."""
        settings = self.context.settings.search
        search = Search(bench, study, baseline, settings.trials, self.rule)
        options = [*untrusted.to_share(self.context.settings), *own_places(self.context.settings)]
        with local_workers(self.directory, devices, settings.storage, self.context.reporter.warn, options) as watch:
            for _ in search.rounds(watch):
                self._save_search(search)
        return search

    def _refine(self, search: Search) -> None:
        """Add to the front what the gradient finds."""
        if self.context.settings.refine.enabled:
            for _ in search.refine():
                self._save_search(search)

    def _save_search(self, search: Search) -> None:
        self.result.searched(search.trials, search.front_so_far, search.baseline, search.bench.objectives)
        self.result.caches = search.bench.caches()
        self.save()

    def _select(self, search: Search, choose: Choose | None, held: Heldout | None) -> tuple[Trial, bool]:
        """The selected trial, and whether it is wanted as an export; the proposal is selected if no trial is.

        A wanted trial is measured on held-out prompts: the export's card shows these figures.
        """
        selected, wanted = self._proposed(search), True
        if choose is not None:
            given = Candidates(search.bench, self.directory, search.trials, search.front_so_far, selected, search.baseline)
            chosen = choose(given)
            selected, wanted = chosen or selected, chosen is not None
        self.result.update(selected=selected.number, heldout=None)
        self.save()
        self.result.heldout = evaluate_trial(search.bench, search.baseline, selected, held) if wanted else None
        if self.result.heldout is not None:
            self.save()
        return selected, wanted

    def _proposed(self, search: Search) -> Trial:
        """The trial that the rule picks; where no trial is better than the model itself, the report is written first."""
        if not search.front_so_far:
            self.save()
            write_report(self.directory, self.result, self.context.reporter.warn)
            more = self.directory.resuming("goes on with as many again", "-n", str(2 * max(1, search.budget)))
            raise AbliterateError(
                f"{no_front(search.baseline, search.bench.objectives)} The trials are kept ({len(search.trials)}), "
                f"{self.directory.report} shows them, and {more}."
            )
        return search.pick(self.rule)

    def _prepare_export(self, bench: Workbench, selected: Trial) -> tuple[Picked | None, StoredEdits | None]:
        """What the export of the selected trial needs once the model is gone; None if nothing is to be exported.

        And the edits that its files are checked against, if the model is sharded.
        """
        settings = self.context.settings
        if settings.export.kind == "none":
            return None, None
        with self.context.stage("pick", f"trial {selected.number}"):
            picked = prepare(bench, settings, self.result, selected)
            return picked, edits_on(bench, picked) if ranks.size() > 1 else None

    def _end(self, *, exported: bool, front_shown: bool) -> Result:
        """Write the report, and only then upload the export, so that a failed upload costs nothing else."""
        context, directory, result = self.context, self.directory, self.result
        with context.stage(REPORT_STAGE):
            write_report(directory, result, context.reporter.warn)
        self.save()
        if exported and context.settings.export.push:
            result.export = push_export(context, result.export, directory.export)
            self.save()
            write_report(directory, result)
        where = str(directory.path)
        context.reporter.finish(result.with_checksum(), where, ending(result, where, front_shown=front_shown))
        return result
