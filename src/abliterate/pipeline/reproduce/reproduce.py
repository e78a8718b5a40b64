"""Repeat a trial from its recipe, without a search, and compare it with the recipe's values (`abliterate reproduce`).

This module has the order of the stages, and checks model and prompts before they are used. `recipe_settings.py` limits what a
recipe may ask of this machine, and `compare.py` decides the verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result
from abliterate.directions import Directions
from abliterate.edits import Factors
from abliterate.errors import AbliterateError, InputError
from abliterate.export import check_output
from abliterate.export.recipe import RECIPE, Recipe, read_recipe
from abliterate.files import safe_name
from abliterate.pipeline import export_trial, stages
from abliterate.pipeline.cache_keys import OBJECTIVES_PART, SCORERS_PART
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.export import Picked, export_and_verify, prepare, prompt_records
from abliterate.pipeline.preflight import check_model, check_names
from abliterate.pipeline.reproduce.compare import Comparison, compare
from abliterate.pipeline.reproduce.recipe_settings import left_scorers, settings_of
from abliterate.pipeline.workbench import Workbench, load_calibrated, rename_model
from abliterate.report.ending import summary
from abliterate.search.pruner import DominancePruner
from abliterate.search.study import changed_parts
from abliterate.types import Params, RefinedParams, Reporter, params_from_record

# Parts of an identity that may differ by machine or version; scores and hashes show whether they matter.
_LOOSE = {"model", "attention implementation"}


def reproduce(
    path: Path,
    own: Mapping[str, Any],
    reporter: Reporter,
    *,
    kind: str = "",
    out: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> Result:
    """Repeat a recipe's trial and compare; returns the result, as of a run of that trial, with its `reproduction`.

    `own` holds options of this machine (model, device, cache, prompt files, consent to the model's code). `kind` replaces the
    recipe's kind of export, whose files then can't be compared. `out` is the folder of the export.

    Raises:
        InputError: the recipe is invalid, or the model or prompts aren't the recipe's. AbliterateError: the trial differs.
    """
    recipe = read_recipe(path)
    settings = settings_of(recipe, own, kind)
    check_names(settings)
    final = out or Path(f"{safe_name(recipe.model.id)}-reproduced")
    if settings.export.kind != "none":
        _check_folder(final, path, settings.model)
    context = Context.of(settings, reporter, check)
    check_model(settings)
    prompts = read_prompts(context)
    result = Result(prompts=prompt_records(settings, prompts))
    _check_prompts(recipe, result)
    sizes = recipe.batch_sizes.model_dump()
    with load_calibrated(context, prompts, recipe.response_prefix, sizes) as bench:
        context, settings = bench.context, bench.settings
        _check_bench(recipe, bench, result)
        params = params_of(recipe)
        if isinstance(params, RefinedParams):
            bench.refined.add(params, recipe.refined_file)
        directions, refined = stages.find_directions(bench, recipe.answers or None), bench.refined
        baseline = stages.baseline(bench)
        with context.stage("trial", str(recipe.trial.number)):
            never = DominancePruner.never()  # the scores are compared, so the trial mustn't be stopped
            trial = stages.evaluate(bench, recipe.trial.number, params, never)
        if trial.state == "failed":
            raise AbliterateError(f"The recipe's trial failed here ({trial.reason}); try another --device.")
        # The card, the new recipe and the summary need the result of a run; this run has one trial.
        result.searched([trial], [trial], baseline, bench.objectives)
        result.update(selected=trial.number, directions=stages.directions_record(directions))
        picked = prepare(bench, settings, result, trial)
    factors = picked.job.factors
    if settings.export.kind != "none":
        factors = _export(recipe, context, result, directions, refined, picked, final)
    comparison = compare(recipe, result, picked, factors, final)
    return _conclude(context, result, comparison, final)


def params_of(recipe: Recipe) -> Params:
    """The parameters of the recipe's trial."""
    return params_from_record(recipe.trial.params.model_dump())


def _check_folder(final: Path, path: Path, model: str) -> None:
    """Raise InputError if the export would replace the recipe's own folder, the model, or anything but an export."""
    folder = path if path.is_dir() else path.parent
    if final.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InputError(f"The folder {final} holds the recipe itself ({RECIPE}); choose another --out.")
    check_output(final, model)


def _check_prompts(recipe: Recipe, result: Result) -> None:
    """Raise InputError with every prompt set that isn't the recipe's."""
    sets = result.prompts
    wrong = [
        f"{name} ({sets[name].count} in {sets[name].source!r}, the recipe's were {stated.count} in {stated.source!r})"
        for name, stated in recipe.prompts.items()
        if name in sets and sets[name].digest != stated.digest
    ]
    if wrong:
        options = " and ".join(f"--{fault.split()[0].replace('_', '-')}" for fault in wrong)
        raise InputError(
            f"These prompts aren't the recipe's: {'; '.join(wrong)}; give the same texts in the same order with {options}."
        )


def _check_bench(recipe: Recipe, bench: Workbench, result: Result) -> None:
    """Name the model as the recipe does; InputError if its trials would differ in meaning from the recipe's."""
    info, stated, context = bench.loaded.info, recipe.model, bench.context
    if info.fingerprint != stated.fingerprint:
        if info.fingerprint.startswith("hub:") == stated.on_hub:
            raise InputError(
                f"The model {info.id} isn't the recipe's {stated.id!r}: its files have the fingerprint {info.fingerprint}, the "
                f"recipe's {stated.fingerprint!r}; give the same files with --model."
            )
        context.reporter.warn(
            "Of the recipe's model and the given model, one is on the Hub, the other is a directory; only scores and hashes "
            "can show whether they are the same."
        )
    if info.quantization != stated.quantization:
        context.reporter.warn(f"The weights are {info.quantization} here, in the recipe {stated.quantization!r}.")
    if recipe.rendering != bench.record()["rendering"]:
        context.reporter.warn(
            "The chat template renders prompts differently than for the recipe, for example with today's date, so scores and "
            "bytes may differ."
        )
    identity = bench.identity()
    changed = changed_parts(recipe.identity, identity)
    if set(changed) & _LOOSE - {"model"}:
        context.reporter.warn("The attention implementation differs from the recipe's.")
    loose = _LOOSE
    if left := left_scorers(recipe):
        loose = {*_LOOSE, OBJECTIVES_PART, SCORERS_PART}
        context.reporter.warn(
            f"The recipe names custom scorers, scorers of plugins, or judges ({', '.join(map(repr, left))}); they aren't run "
            "here, and markers aren't compared, so refusals and KL show whether the trial is the same."
        )
    wrong = [name for name in changed if name not in loose]
    if wrong:
        raise InputError(
            f"The recipe was made with another {', '.join(wrong)}; give the files it was made with, or install the versions "
            "that its environment names."
        )
    if fault := bench.fault(params_of(recipe)):
        raise InputError(f"The recipe's trial {fault}; the recipe is of another model, or damaged.")
    # An adapter names its base, and a directory of this machine would mean nothing to others.
    rename_model(bench, stated.id, stated.revision)
    result.update(**bench.record(), identity=identity, startup_trials=recipe.startup_trials)


def _export(
    recipe: Recipe,
    context: Context,
    result: Result,
    directions: Directions,
    refined: RefinedStore,
    picked: Picked,
    final: Path,
) -> Mapping[str, Factors]:
    """Export as the recipe's export was made, with factors of the loaded model or of the stored weights; returns them."""
    if recipe.export.origin == "trial":
        *_, result.export = export_and_verify(context, picked, result, final)
        return picked.job.factors
    source, base = export_trial.open_base(context, result, picked.trial.number)
    edits = export_trial.edits_of(context, base, directions, refined, picked.trial)
    job = export_trial.job_of(context.settings, result, source, base, edits, picked.trial)
    export_trial.write_and_check(context, result, job, base, edits, picked.trial, final, picked)
    return edits.factors


def _conclude(context: Context, result: Result, comparison: Comparison, final: Path) -> Result:
    """Report the comparison; AbliterateError if the model isn't the recipe's."""
    reporter = context.reporter
    result.update(reproduction=comparison.to_record(), timings=context.clock.timings, memory=context.clock.memory)
    for line in comparison.lines():
        reporter.note(line)
    if comparison.outcome == "equivalent":
        reporter.warn(comparison.sentence())
    elif comparison.outcome == "identical":
        reporter.note(comparison.sentence())
    where = str(final.parent)
    reporter.finish(result.with_checksum(), where, summary(result, where))
    if comparison.outcome == "different":
        raise AbliterateError(comparison.sentence())
    return result
