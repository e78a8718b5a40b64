"""Any trial of a run as a model: what `abliterate export` does, while the run goes on or after it.

Edits are computed from the base's weight files, one matrix at a time, and the export is checked against their definition: no
prompts, no accelerator, and the model isn't loaded. Nothing is written to the run directory but the export; a run at work
there goes on undisturbed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from abliterate.artifacts.result import RunResult
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.edits import Factors, SvdMemo, edit_method
from abliterate.errors import AbliterateError, InputError
from abliterate.export import EXPORTERS, ExportJob, check_output
from abliterate.export.base_weights import Matrices, damage_of, stored_dtype
from abliterate.export.check_behaviour import Verification
from abliterate.export.check_weights import Definition, by_definition, by_factors, check_weights
from abliterate.export.push import check_push
from abliterate.model import loader
from abliterate.model.architectures import known_architecture
from abliterate.model.checkpoint import dense_load, load_weights
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.memory import unless_full
from abliterate.objectives import objectives_from_result
from abliterate.pipeline import stages
from abliterate.pipeline.cache_keys import study_identity
from abliterate.pipeline.context import Context, make_store, read_prompts
from abliterate.pipeline.export import Picked, approximation_of, card, conclude, pinned, prepare, push_export, verify, write
from abliterate.pipeline.workbench import load_and_calibrate
from abliterate.prompts.sets import PromptSets
from abliterate.report.tables import summary
from abliterate.search.study import changed_parts
from abliterate.settings.schema import LoadSettings, Settings
from abliterate.settings.untrusted import without_own_scorers
from abliterate.types import Baseline, Reporter, Trial

# Of the run in its result, which loading the model here overwrites.
_OF_RUN = ("model", "prompts", "environment", "batch_sizes", "response_prefix", "rendering")


@dataclass(frozen=True)
class StoredEdits:
    """A trial's edits of the base's stored matrices: as factors, by definition, and what an approximation loses."""

    factors: Mapping[str, Factors]
    definitions: Mapping[str, Definition]
    approximation: Mapping[str, float]


def export_trial(
    settings: Settings, reporter: Reporter, directory: RunDirectory, number: int, final: Path, *, scores: bool = False
) -> dict[str, Any]:
    """Export one finished trial of a run to `final`; returns `result.json` as it would be if the run had chosen that.

    `scores`: also run the trial and the reloaded export on the run's evaluation prompts, and compare them.

    Raises:
        InputError: `final` is somebody else's, or the model, or with `scores` anything that trials depend on, has changed.
    """
    check_output(final)
    check_push(settings.export)
    result = RunResult(None, reporter)  # the run's own process may be writing to its result.json
    result.record |= copy.deepcopy(directory.read_result()) | {"selected": number, "timings": {}}
    try:
        trial = _trial(result.record, number, directory)
        baseline = Baseline.from_record(result.record["baseline"])
        dtype, _, _ = (result.record["model"][name] for name in ("dtype", "fingerprint", "revision"))
        settings = _as_trials_ran(settings, dtype)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(directory, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    context = Context(settings, reporter, result, make_store(settings, reporter), lambda: None)
    directions = stages.read_directions(directory.directions, result.record)
    source, base = open_base(context, number)
    if {target.component for target in base.targets.values()} - set(trial.params.kernels):
        raise _damaged(directory, f"trial {number} lacks a kernel")
    edits = edits_of(context, base, directions, trial)
    job = job_of(context, source, base, edits, baseline, trial)
    expected = _expected(context, directions, baseline, trial) if scores else None
    write_and_check(context, job, base, edits, trial, baseline.prompts, final, expected)
    push_export(context, final)
    reporter.finish(result.record, str(final.parent), summary(result.record, str(final.parent)))
    if result.record["export"]["verified"] is False:
        raise AbliterateError(f"The export in {final} is not what the trial was; see its README.md, and don't use it.")
    return result.record


def write_and_check(
    context: Context,
    job: ExportJob,
    base: Matrices,
    edits: StoredEdits,
    trial: Trial,
    n_harmful: int,
    final: Path,
    expected: tuple[PromptSets, Picked] | None,
) -> None:
    """The export, compared with the edits' definition and, if `expected` is given, with what the trial did on the prompts."""
    base.release()  # exporters read it anew
    write(context, job, final, trial, edits.approximation, "weight files")
    if not context.settings.export.verify and expected is None:
        return
    # A model that can't be read file by file is in memory twice here; the export is good whether or not that fits.
    verdict = unless_full(lambda: check(context, job, edits, final), torch.device("cpu"))
    if expected is not None:
        prompts, picked = expected
        scored = verify(context, replace(picked, job=job), prompts, final)
        verdict = _both(verdict, scored) if verdict is not None else scored
    if verdict is None:
        context.reporter.warn(
            f"The export was written but not checked, because memory doesn't hold it beside the base; free some and repeat "
            f"abliterate export, or look at {final.name} before using it."
        )
    else:
        conclude(context, final, trial, n_harmful, verdict)


def _as_trials_ran(settings: Settings, dtype: str) -> Settings:
    """With `scores`, in the trials' dtype whatever device this is: the export is compared with them."""
    load = LoadSettings.model_validate(settings.load.model_dump() | {"dtypes": [dtype]})
    return settings.model_copy(update={"load": load})


def open_base(context: Context, number: int) -> tuple[str, Matrices]:
    """Where the run's model is, and its matrices; InputError where that is another model than the run's."""
    settings, run = context.settings, context.result.record["model"]
    source = loader.resolve_source(settings.model)
    load = pinned(settings.load, source, run["revision"])
    with context.result.stage("read the base", loader.public_name(settings.model)):
        config = loader.load_config(source, load)
        if loader.fingerprint(source, config) != run["fingerprint"]:
            damage = damage_of(source)
            if damage:
                raise InputError(f"The files of the model in {settings.model} aren't whole: {damage}; put them back.")
            raise _changed(number, "model")
        model_type = config.get_text_config().model_type
        architecture = known_architecture(model_type, load.decoder_layers, load.components)
        if architecture is None:  # what its layers do is seen with their weights only
            architecture = loader.architecture_of(
                load_weights(source, dense_load(load), config, stored_dtype(config), None), load
            )
        base = Matrices(source, load, architecture)
    if base.reason:
        context.reporter.note(f"the model is loaded as a whole, because {base.reason}", reason=base.reason)
    return source, base


def edits_of(context: Context, base: Matrices, directions: Directions, trial: Trial) -> StoredEdits:
    """What the trial does to each matrix. Of a quantized run, too, it is computed from the full-precision weights."""
    settings = context.settings.edit
    method = edit_method(settings.mode)
    factors: dict[str, Factors] = {}
    definitions: dict[str, Definition] = {}
    with context.result.stage("edits", f"{settings.mode} ({settings.representation})"):
        for index, target in enumerate(base.targets.values()):
            # An editor for each: what one prepares for a module is dropped before the next is read.
            editor = Editor((target,), directions, settings, EditHooks(()), SvdMemo(0), weight_of=base.of)
            for name, place, coeff in editor.plan(trial.params).values():
                factors[name] = editor.factors(trial.params)[name]
                v = directions.blend(place).of(directions.by_layer().double())
                # An approximation can only be compared with itself; how far it is from the edit is `lost`. Of fused
                # experts, only what is exact is ever decomposed.
                exact = settings.representation == "exact" or factors[name].a.ndim == 3
                definitions[name] = by_definition(method, v, coeff) if exact else by_factors(factors[name])
            context.reporter.progress(index + 1, len(base.targets), "modules")
        lost = approximation_of(settings, directions, base.targets.values(), base.of, trial.params, factors)
    return StoredEdits(factors, definitions, lost)


def check(context: Context, job: ExportJob, edits: StoredEdits, final: Path) -> Verification:
    """Read every exported matrix back, and compare it with what its edit is by definition."""

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "modules")

    with context.result.stage("check weights"):
        base = Matrices(job.source, job.load, job.architecture)
        reread = EXPORTERS[context.settings.export.kind].reread(final, job, base)
        return check_weights(base, reread, edits.definitions, progress)


def _trial(record: Mapping[str, Any], number: int, directory: RunDirectory) -> Trial:
    """The trial of that number; InputError where it hasn't finished, failed, or was stopped."""
    found = {one["number"]: Trial.from_record(one) for one in record["trials"]}.get(number)
    if found is not None and found.state == "stopped":
        raise InputError(
            f"Trial {number} was stopped because another one is no worse in any objective; choose one that abliterate trials "
            f"{directory.path} shows as complete."
        )
    if found is None or found.state != "complete":
        raise InputError(f"The run in {directory.path} has no finished trial {number}; see abliterate trials {directory.path}.")
    return found


def job_of(context: Context, source: str, base: Matrices, edits: StoredEdits, baseline: Baseline, trial: Trial) -> ExportJob:
    """What an exporter is given of a trial's edits of the stored matrices."""
    run, settings = context.result.record["model"], context.settings
    return ExportJob(
        source=source,
        fingerprint=run["fingerprint"],
        load=base.load,
        export=settings.export,
        architecture=base.architecture,
        tokenizer=loader.load_tokenizer(source, base.load),
        factors=edits.factors,
        base_model=run["id"],
        card=card(context, source, baseline, trial, edits.approximation),
    )


def _expected(context: Context, directions: Directions, baseline: Baseline, trial: Trial) -> tuple[PromptSets, Picked]:
    """The trial again, in memory and on the prompts, for the export to be compared with."""
    record = context.result.record
    of_run = copy.deepcopy({name: record[name] for name in _OF_RUN if name in record})
    prompts = read_prompts(context)
    run = context.settings
    # Refusals and KL are compared, so scorers in files, which may come from anybody, needn't run; what they are still counts.
    context = replace(context, settings=without_own_scorers(run))
    bench = load_and_calibrate(context, prompts)
    prefix = bench.calibration.response_prefix
    try:
        identity = study_identity(run, bench.loaded, prefix, prompts.all_sets(), objectives_from_result(record))
    except OSError as error:  # such a file has gone
        raise _changed(trial.number, "set of scorers") from error
    changed = changed_parts(record.get("identity", identity), identity)
    if changed:
        raise _changed(trial.number, ", ".join(changed))
    editor = stages.make_editor(context, bench, directions)
    stages.baseline(context, bench, prompts)  # scorers are relative to it
    picked = prepare(context, bench, editor, baseline, prompts, trial)
    del bench, editor
    gc.collect()
    record |= of_run
    return prompts, picked


def _damaged(directory: RunDirectory, what: str) -> InputError:
    return InputError(f"The file {directory.result} is damaged ({what}); abliterate run --resume rebuilds it.")


def _changed(number: int, what: str) -> InputError:
    return InputError(
        f"Trial {number} can't be exported with another {what} than its run's: it would be another trial; put back what was "
        "changed, or make a new run."
    )


def _both(weights: Verification, scores: Verification) -> Verification:
    """One record of two checks."""
    ok = weights.ok and scores.ok
    checks = {**weights.record["checks"], **scores.record["checks"]}
    return Verification(ok, {**weights.record, **scores.record, "ok": ok, "checks": checks})
