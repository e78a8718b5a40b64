"""`abliterate reproduce`: a trial made again from its recipe, without a search, and compared with what the recipe says of it.

Owns the order of the stages, and the checks of model and prompts before anything is computed from them. What a recipe may ask
of this machine is `pipeline/reproduce/recipe_settings.py`'s, the verdict `pipeline/reproduce/compare.py`'s.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from abliterate.artifacts.result import RunResult
from abliterate.directions import Directions
from abliterate.edits import Factors
from abliterate.errors import AbliterateError, InputError
from abliterate.export import check_output
from abliterate.export.recipe import RECIPE, Recipe, read_recipe
from abliterate.files import safe_name
from abliterate.pipeline import export_trial as pipeline_export_trial
from abliterate.pipeline import stages
from abliterate.pipeline.cache_keys import OBJECTIVES, SCORERS, study_identity
from abliterate.pipeline.context import Context, make_store, read_prompts
from abliterate.pipeline.export import Picked, export, prepare
from abliterate.pipeline.preflight import check_model, check_names
from abliterate.pipeline.reproduce.compare import Comparison, compare
from abliterate.pipeline.reproduce.recipe_settings import left_scorers, settings_of
from abliterate.pipeline.workbench import Workbench, load_and_calibrate
from abliterate.prompts.sets import PromptSets
from abliterate.report.tables import summary
from abliterate.search.pruner import DominancePruner
from abliterate.search.study import changed_parts
from abliterate.types import Baseline, Objective, Reporter, Trial, TrialParams

# Parts of an identity that may differ by machine or version: what they change, scores and hashes tell.
_LOOSE = {"model", "attention implementation"}


def reproduce(
    path: Path,
    own: Mapping[str, Any],
    reporter: Reporter,
    *,
    kind: str = "",
    out: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Make a recipe's trial again and compare; returns `result.json` as of a run of that trial, and `reproduction`.

    `own`: options of this machine (model, device, cache, prompt files, consent to the model's code). `kind`: another export
    than the recipe's, whose files then can't be compared. `out`: where the export goes.

    Raises:
        InputError: the recipe, or what it is to be made from, isn't what it should be. AbliterateError: what came out differs.
    """
    recipe = read_recipe(path)
    settings = settings_of(recipe, own, kind)
    check_names(settings)
    final = out or Path(f"{safe_name(recipe.model.id)}-reproduced")
    if settings.export.kind != "none":
        _check_place(final, path)
    context = Context(settings, reporter, RunResult(None, reporter), make_store(settings, reporter), check)
    check_model(settings)
    prompts = read_prompts(context)
    _check_prompts(recipe, context)
    sizes = recipe.batch_sizes.model_dump() if recipe.batch_sizes else None
    bench = _checked(recipe, context, load_and_calibrate(context, prompts, recipe.response_prefix, sizes), prompts)

    directions = stages.directions(context, *stages.residuals(context, bench, prompts), None)
    editor = stages.make_editor(context, bench, directions)
    bench = stages.trial_engine(context, bench, editor, prompts)
    baseline = stages.baseline(context, bench, prompts)
    with context.result.stage("trial", str(recipe.trial.number)):
        never = DominancePruner.never()  # its scores are wanted, whatever they are
        trial = stages.evaluate(context, bench, editor, recipe.trial.number, params_of(recipe), prompts, never)
    if trial.state == "failed":
        raise AbliterateError(f"The recipe's trial failed here ({trial.reason}); try another --device.")
    _record(context, baseline, bench.objectives, trial)
    picked = prepare(context, bench, editor, baseline, prompts, trial)
    del bench, editor
    gc.collect()
    factors = picked.job.factors
    if settings.export.kind != "none":
        factors = _export(recipe, context, directions, baseline, picked, prompts, final)
    found = compare(recipe, context.result.record, picked, factors, final)
    return _conclude(context, found, final)


def params_of(recipe: Recipe) -> TrialParams:
    """The trial's parameters."""
    return TrialParams.from_record(recipe.trial.params.model_dump())


def _check_place(final: Path, path: Path) -> None:
    """InputError where the export would replace what the recipe lies in, or what is nobody's export."""
    folder = path if path.is_dir() else path.parent
    if final.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InputError(f"The folder {final} holds the recipe itself ({RECIPE}); choose another --out.")
    check_output(final)


def _check_prompts(recipe: Recipe, context: Context) -> None:
    """InputError naming every set that isn't the recipe's."""
    found = context.result.record["prompts"]
    wrong = [
        f"{name} ({found[name]['count']} in {found[name]['source']!r}, the recipe's were {stated.count} in {stated.source!r})"
        for name, stated in recipe.prompts.items()
        if name in found and found[name]["digest"] != stated.digest
    ]
    if wrong:
        options = " and ".join(f"--{one.split()[0].replace('_', '-')}" for one in wrong)
        raise InputError(
            f"These prompts aren't the recipe's: {'; '.join(wrong)}; give the same texts in the same order with {options}."
        )


def _checked(recipe: Recipe, context: Context, bench: Workbench, prompts: PromptSets) -> Workbench:
    """The bench, named as in the recipe; InputError where its trials would mean something else than the recipe's."""
    info, stated = bench.loaded.info, recipe.model
    if info.fingerprint != stated.fingerprint:
        if info.fingerprint.startswith("hub:") == stated.on_hub:
            raise InputError(
                f"The model {info.id} isn't the recipe's {stated.id!r}: its files have the fingerprint {info.fingerprint}, the "
                f"recipe's {stated.fingerprint!r}; give the same files with --model."
            )
        context.reporter.warn(
            "One of the recipe's model and the one given is the Hub's, the other a directory; whether they are the same, only "
            "scores and hashes can tell."
        )
    if info.quantization != stated.quantization:
        context.reporter.warn(f"The weights are {info.quantization} here, in the recipe {stated.quantization!r}.")
    if recipe.rendering not in (None, context.result.record["rendering"]):
        context.reporter.warn(
            "The chat template writes prompts otherwise than for the recipe, today's date for example; scores and bytes may "
            "differ because of that."
        )
    prefix = bench.calibration.response_prefix
    identity = study_identity(context.settings, bench.loaded, prefix, prompts.all_sets(), bench.objectives)
    changed = changed_parts(recipe.identity, identity) if recipe.identity else []
    if set(changed) & _LOOSE - {"model"}:
        context.reporter.warn("The attention implementation is another one than the recipe's.")
    loose = _LOOSE
    if left := left_scorers(recipe):
        loose = {*_LOOSE, OBJECTIVES, SCORERS}
        context.reporter.warn(
            f"The recipe's author had scorers in files, or judges ({', '.join(map(repr, left))}); they aren't run here, and "
            "markers aren't compared: refusals and KL tell whether the trial is the same."
        )
    wrong = [name for name in changed if name not in loose]
    if wrong:
        raise InputError(
            f"The recipe was made with another {', '.join(wrong)}; give the files it was made with, or install the versions "
            "that its environment names."
        )
    lacking = {target.component for target in bench.loaded.targets} - set(recipe.trial.params.kernels)
    if lacking:
        raise InputError(f"The recipe has no parameters for {', '.join(sorted(lacking))}; it is of another model or damaged.")
    # As the recipe names it: a directory has another name on each machine, and adapters say what they are for.
    context.result.record |= {"identity": identity, "startup_trials": recipe.startup_trials}
    context.result.record["model"] |= {"id": stated.id, "revision": stated.revision}
    named = replace(info, id=stated.id, revision=stated.revision)
    return replace(bench, loaded=replace(bench.loaded, info=named))


def _record(context: Context, baseline: Baseline, objectives: Sequence[Objective], trial: Trial) -> None:
    """The trial as the one trial of a run, for the card, the new recipe and the summary."""
    context.result.trials([trial], [trial], baseline, objectives)
    context.result.record["selected"] = trial.number


def _export(
    recipe: Recipe,
    context: Context,
    directions: Directions,
    baseline: Baseline,
    picked: Picked,
    prompts: PromptSets,
    final: Path,
) -> Mapping[str, Factors]:
    """The way the recipe's export was made: by factors of the loaded model, or of the stored weights. Returns these."""
    if recipe.export.origin == "trial":
        export(context, picked, prompts, final)
        return picked.job.factors
    trial = picked.expected.trial
    source, base = pipeline_export_trial.open_base(context, trial.number)
    edits = pipeline_export_trial.edits_of(context, base, directions, trial)
    job = pipeline_export_trial.job_of(context, source, base, edits, baseline, trial)
    pipeline_export_trial.write_and_check(context, job, base, edits, trial, baseline.prompts, final, (prompts, picked))
    return edits.factors


def _conclude(context: Context, found: Comparison, final: Path) -> dict[str, Any]:
    """Say what came of it; AbliterateError where it isn't the recipe's model."""
    reporter, record = context.reporter, context.result.record
    record["reproduction"] = found.to_record()
    for line in found.lines():
        reporter.note(line)
    if found.outcome == "equivalent":
        reporter.warn(found.sentence())
    elif found.outcome == "identical":
        reporter.note(found.sentence())
    reporter.finish(record, str(final.parent), summary(record, str(final.parent)))
    if found.outcome == "different":
        raise AbliterateError(found.sentence())
    return record
