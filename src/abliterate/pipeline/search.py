"""Search for the best edits: ask for parameters, apply the edit, evaluate, report to the sampler, until the budget is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from optuna.storages import InMemoryStorage

from abliterate.directions import Directions
from abliterate.edits import edit_method, needs_inputs
from abliterate.errors import AbliterateError, InputError
from abliterate.objectives import check_searchable
from abliterate.pipeline import stages
from abliterate.pipeline.module_inputs import with_inputs
from abliterate.pipeline.refine import Refinement
from abliterate.pipeline.seeds import seed_trials, seed_values
from abliterate.pipeline.workbench import Workbench
from abliterate.report import draw, plots
from abliterate.report.data import Material
from abliterate.report.tables import SearchRecord
from abliterate.search.front import no_front, pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.search.selection import SelectionRule, parse_rule
from abliterate.search.storage import POLL
from abliterate.search.study import STUDY_NAME, Study
from abliterate.types import Baseline, Params, RefinedParams, Trial


class Search:
    """The trials of a study on a workbench. Iterating gives every trial once, and runs the remaining trials.

    `front` and `pick` run the remaining trials first; `trials` and `front_so_far` hold the finished trials, also during the
    search. Other workers may share the study: trials that they finish count, and trials that they abandon are repeated.
    """

    def __init__(
        self, bench: Workbench, study: Study, baseline: Baseline, budget: int, rule: SelectionRule | None = None
    ) -> None:
        self.bench = bench
        self.study = study
        self.baseline = baseline
        self.budget = budget
        self.trials: tuple[Trial, ...] = study.trials()
        search = bench.settings.search
        self._parse = partial(parse_rule, auto_max_kl=search.select_max_kl, objectives=bench.objectives)
        self._rule = rule or self._parse(search.select)
        self._directions = bench.editor.directions
        self._running = False

    def __iter__(self) -> Iterator[Trial]:
        given: set[int] = set()
        for _ in [()] if self._is_over else self.rounds():
            for trial in self.trials:
                if trial.number not in given:
                    given.add(trial.number)
                    yield trial

    @property
    def front_so_far(self) -> Sequence[Trial]:
        """The Pareto-optimal trials among the finished trials."""
        return pareto_front(self.trials, self.baseline, self.bench.objectives)

    @property
    def front(self) -> Sequence[Trial]:
        """The Pareto-optimal trials of the whole search."""
        self.finish()
        return self.front_so_far

    def finish(self) -> None:
        """Run the remaining trials."""
        if not self._is_over:
            for _ in self.rounds():
                pass

    def pick(self, rule: str | SelectionRule = "", choose: Callable[[Sequence[Trial], Trial], Trial] | None = None) -> Trial:
        """The trial of the front that a rule selects (docs/settings.md, `--select`), or that `choose` prefers to it.

        Raises:
            InputError: the rule can't be read or no trial meets it. AbliterateError: no trial beats the base model.
        """
        front = self.front
        self.bench.prepare(self._directions)  # another search may have changed them, and the trial is exported next
        if not front:
            raise AbliterateError(no_front(self.baseline, self.bench.objectives))
        if isinstance(rule, str):
            rule = self._parse(rule) if rule else self._rule
        return choose(front, rule(front)) if choose else rule(front)

    def plot(self, selected: Trial | None = None) -> str:
        """The finished trials and their front as an SVG picture, the report's own; `selected` is marked in it.

        Raises:
            AbliterateError: no trial has been scored yet, or nothing can be drawn here.
        """
        front = tuple(trial.number for trial in self.front_so_far)
        number = None if selected is None else selected.number
        material = Material.of_search(SearchRecord(self.trials, front, number, self.baseline, tuple(self.bench.objectives)))
        plot = plots.front(material)
        if plot is None:
            raise AbliterateError("No trial has been scored yet, so there is no front to plot; iterate over the search first.")
        try:
            return draw.svg({plot.name: plot.spec})[0][plot.name]
        except draw.Undrawable as error:
            raise AbliterateError(str(error)) from error

    def measure(self, params: Params) -> Trial:
        """Measure any parameters in full, as trials are measured, without reporting them to the sampler."""
        self.bench.prepare(self._directions)
        return stages.evaluate(self.bench, len(self.trials), params, DominancePruner.never(self.bench.objectives))

    def rounds(self, watch: Callable[[], None] = lambda: None) -> Iterator[Sequence[Trial]]:
        """Run the remaining trials; each round gives the newly finished trials, and none in the first round.

        A round ends before the next trial begins, so a caller can save its trials. `watch` is called before each trial.

        Raises:
            AbliterateError: the search is running already, or its last trials all failed.
        """
        if self._running:
            raise AbliterateError("The search is running; ask it for front_so_far or trials until it has finished.")
        self._running = True
        try:
            yield from self._rounds(watch)
        finally:
            self._running = False

    def refine(self) -> Iterator[Sequence[Trial]]:
        """Run the remaining trials, and refine the front by gradient; gives the new trials after each refined one."""
        self.finish()
        self.bench.prepare(self._directions)  # another search may have changed them
        for _ in Refinement(self.bench, self.study, self.trials, self._slots):
            before = {trial.number for trial in self.trials}
            self.trials = self.study.trials()
            yield self._report(before)

    def _rounds(self, watch: Callable[[], None]) -> Iterator[Sequence[Trial]]:
        context, study, limit = self.bench.context, self.study, self.bench.settings.search.max_consecutive_failures
        with context.stage("search", f"{self.budget} trials"):
            before = {trial.number for trial in study.trials()}
            if before:
                context.reporter.note(f"{len(before)} trials are kept from before", resumed=len(before))
            seen: set[int] | None = None
            while True:
                self.trials = study.trials()
                numbers = {trial.number for trial in self.trials}
                if numbers != seen:
                    yield self._report(before if seen is None else seen)
                    seen = numbers
                # Trials of earlier sessions don't count here, because the cause of their failure may have been removed.
                stages.check_failures([trial for trial in self.trials if trial.number not in before], limit)
                if self._is_over:
                    return
                context.check()
                watch()
                study.fail_silent()
                self._one_trial()

    @property
    def _is_over(self) -> bool:
        """Whether the budget is used; refined trials don't count."""
        return len(self._searched) >= self.budget

    @property
    def _searched(self) -> list[Trial]:
        """The trials that the search has made, without refined ones."""
        return [trial for trial in self.trials if not isinstance(trial.params, RefinedParams)]

    @property
    def _slots(self) -> int:
        """The number below which the budget's trials lie; that of a continued run passes over those of refined trials."""
        refined = sorted(trial.number for trial in self.trials if isinstance(trial.params, RefinedParams))
        slots = self.budget
        for number in refined:
            slots += number < slots
        return slots

    def _report(self, known: set[int]) -> Sequence[Trial]:
        """Show the finished trials that are not `known`, and return them."""
        front, reporter = self.front_so_far, self.bench.context.reporter
        new = [trial for trial in self.trials if trial.number not in known]
        for trial in new:
            reporter.trial(trial, max(self._slots, len(self.trials)), trial in front, self._rule.preview(front))
        return new

    def _one_trial(self) -> None:
        """Ask for parameters, evaluate, report; or wait a moment while other workers finish the last trials."""
        asked = self.study.ask(self._slots)
        if asked is None:
            time.sleep(POLL)
            return
        try:
            self.bench.prepare(self._directions)
            # The sampler learns where a trial was stopped, so refined trials, of which it knows nothing, must stop none.
            pruner = DominancePruner.of(self._searched, self.baseline, self.bench.objectives)
            with self.study.at_work(asked):
                trial = stages.evaluate(self.bench, asked.number, asked.params, pruner)
        except BaseException:
            self.study.give_up(asked)
            raise
        if not self.study.tell(asked, trial, self.baseline.prompts):
            self.bench.context.reporter.warn(
                f"Trial {asked.number} sent no heartbeat for so long that another worker has taken it over."
            )


def search(bench: Workbench, directions: Directions, trials: int | None = None) -> Search:
    """A new search in memory for the best edits along `directions`, which runs while it is iterated over.

    `trials` is the budget, by default the budget of the settings. Only a run (`abliterate.run`) survives a crash.

    Raises:
        AbliterateError: the model refuses none of the prompts, so there is nothing to search for.
        InputError: the run of `search.seed_from` can't be used, or `search.prior` has no residuals to go by.
    """
    check_searchable(bench.objectives)
    if not directions.inputs and needs_inputs(edit_method(bench.settings.edit.mode)):  # a caller's own
        directions = with_inputs(bench, directions)
    bench.prepare(directions)
    space = bench.space
    if trials is not None:
        space = replace(space, settings=space.settings.model_copy(update={"trials": trials}))
    study = Study(InMemoryStorage(), STUDY_NAME, space, bench.settings.seed)
    if space.settings.seed_from:
        study.begin(seeds=seed_values(space, bench.settings.edit.mode, seed_trials(space.settings)))
    if space.settings.prior == "silhouette":
        if not space.prior:
            raise InputError("The setting search.prior needs residuals; call find_directions before search, or leave it out.")
        study.begin(prior=space.prior)
    baseline = bench.baseline or stages.baseline(bench)
    bench.baseline = baseline
    return Search(bench, study, baseline, space.settings.trials)
