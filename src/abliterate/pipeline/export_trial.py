"""Export any complete trial of a finished or running run (`abliterate export RUN --trial N`).

The edits are computed from the base's weight files, one matrix at a time, and the export is checked against their definition;
this needs no prompts, no accelerator and no loaded model. Only the export is written to the run directory, so a run that is
in progress there continues undisturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import ExportRecord, Result, damaged
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.edits import Factors, edit_method, is_learned
from abliterate.errors import AbliterateError, InputError
from abliterate.export import EXPORTERS, ExportJob, check_kind, check_output
from abliterate.export.base_weights import Matrices, damage_of, stored_dtype
from abliterate.export.check_behaviour import Verification
from abliterate.export.check_weights import Definition, by_definition, by_definition_of_reading, by_factors, check_weights
from abliterate.export.gguf import GgufMatrices
from abliterate.model import loader
from abliterate.model.architectures import Architecture, Target
from abliterate.model.checkpoint import dense_load, empty_model, load_weights
from abliterate.model.editor import EditKey, Editor
from abliterate.model.hub import check_push
from abliterate.model.memory import unless_full
from abliterate.pipeline import stages
from abliterate.pipeline.cache_keys import TOKENIZER_PART, tokenizer_identity
from abliterate.pipeline.context import Context, StageClock, read_prompts
from abliterate.pipeline.export import (
    Picked,
    approximation_of,
    card,
    conclude,
    concluded,
    editor_of,
    pinned,
    prepare,
    push_export,
    refined_file,
    verify,
    write,
)
from abliterate.pipeline.preflight import mode_refusal
from abliterate.pipeline.workbench import Workbench, load_calibrated
from abliterate.report.ending import summary
from abliterate.search.study import changed_parts
from abliterate.settings.schema import EditSettings, LoadSettings, Settings
from abliterate.settings.untrusted import without_own_scorers
from abliterate.types import Params, Reporter, Trial

# Fields of `Result` that every run with a finished trial has recorded, and that its export or recipe repeats.
_NEEDED = ("model", "baseline", "directions", "identity", "startup_trials", "batch_sizes", "response_prefix", "rendering")


@dataclass(frozen=True)
class StoredEdits:
    """A trial's edits of the base's stored matrices: factors, definitions, and the error of an approximation.

    `refined` is the file of a refined trial's directions.
    """

    factors: Mapping[str, Factors]
    definitions: Mapping[str, Definition]
    approximation: Mapping[str, float]
    refined: bytes = b""


@dataclass(frozen=True)
class StoredTrial:
    """One complete trial of a run, read from the run's directory; `result` is the result as if the run had selected it."""

    context: Context
    directory: RunDirectory
    result: Result
    trial: Trial
    directions: Directions
    refined: RefinedStore

    @staticmethod
    def read(settings: Settings, reporter: Reporter, directory: RunDirectory, number: int) -> StoredTrial:
        """Read trial `number`. InputError: there is no such complete trial, or the run's files are damaged."""
        # The result is copied and never written back, because the run's own process may be writing its result.json.
        result = Result.read(directory).model_copy(update={"selected": number, "timings": {}})
        trial = result.trial(number, directory.path)
        lacking = [name for name in _NEEDED if getattr(result, name) is None]
        if result.model is None or lacking:
            raise damaged(directory, f"it lacks {', '.join(lacking)}")
        try:
            settings = _as_trials_ran(settings, result.model.dtype)
        except ValidationError as error:
            raise damaged(directory, f"it has the dtype {result.model.dtype!r}") from error
        context = replace(Context.of(settings, reporter), clock=StageClock(result))
        directions, refined = stages.read_directions(directory.directions, result), RefinedStore(directory.refined)
        refined.check(trial.params)
        return StoredTrial(context, directory, result, trial, directions, refined)

    def check(self, targets: Mapping[str, Target]) -> None:
        """InputError if the trial's parameters aren't for these modules."""
        components = {target.component for target in targets.values()}
        if fault := self.trial.params.fault(self.directions.n_layers, components, targets):
            raise damaged(self.directory, f"trial {self.trial.number} {fault}")


def export_trial(
    settings: Settings, reporter: Reporter, directory: RunDirectory, number: int, final: Path, *, scores: bool = False
) -> Result:
    """Export one complete trial of a run to `final`; returns the run's result as it would be if it had selected that trial.

    `scores`: also run the trial and the reloaded export on the run's evaluation prompts, and compare them.

    Raises:
        InputError: `final` isn't an export of this tool, or the model, or with `scores` anything that trials depend on, has
            changed. AbliterateError: the export differs from the trial.
    """
    check_kind(settings.export.kind)
    if settings.export.kind == "adapter" and (reason := mode_refusal(settings)):
        raise InputError(f"An adapter can't hold this trial's edits ({reason}); choose --kind merged.")
    check_output(final, settings.model)
    check_push(settings.export)
    stored = StoredTrial.read(settings, reporter, directory, number)
    context, result, trial = stored.context, stored.result, stored.trial
    source, base = open_base(context, result, number)
    stored.check(base.targets)
    edits = edits_of(context, base, stored.directions, stored.refined, trial)
    job = job_of(context.settings, result, source, base, edits, trial)
    expected = _expected(context, result, stored.directions, stored.refined, trial) if scores else None
    write_and_check(context, result, job, base, edits, trial, final, expected)
    result.export = push_export(context, result.export, final)
    report_end(context, result, final)
    if result.export.verified is False:
        raise AbliterateError(f"The export in {final} differs from the trial; see its README.md, and don't use it.")
    return result


def report_end(context: Context, result: Result, final: Path) -> None:
    """Report the export in `result` with its times and memory."""
    context.clock.count()
    result.update(timings=context.clock.timings, memory=context.clock.memory)
    where = str(final.parent)
    context.reporter.finish(result.with_checksum(), where, summary(result, where))


def write_and_check(
    context: Context,
    result: Result,
    job: ExportJob,
    base: Matrices,
    edits: StoredEdits,
    trial: Trial,
    final: Path,
    expected: Picked | None,
) -> None:
    """Write the export, and compare it with the edits' definition and, if `expected` is given, with the trial's outputs.

    `result.export` is set to the export's record.
    """
    base.release()  # exporters read the base anew
    result.export = write(context, job, result, final, trial, edits.approximation, "weight files")
    if not context.settings.export.verify and expected is None:
        return
    # A model that can't be read file by file is in memory twice here; running out of memory says nothing about the export.
    verdict = unless_full(lambda: check(context, job, edits, final), torch.device("cpu"))
    if expected is not None:
        scored = verify(context, replace(expected, job=job), final)
        if scored is None:
            context.reporter.warn("The export's scores weren't compared with the trial's, because memory doesn't hold it.")
        verdict = _both(verdict, scored) if verdict and scored else verdict or scored
    if verdict is None:
        context.reporter.warn(
            f"The export was written but not checked, because memory doesn't hold it beside the base; free some and repeat "
            f"abliterate export, or inspect {final.name} before using it."
        )
        return
    assert result.baseline is not None
    result.export = concluded(result.export, verdict)
    conclude(context, result.export, final, trial, result.baseline.prompts, verdict)


def _as_trials_ran(settings: Settings, dtype: str) -> Settings:
    """The settings in the trials' dtype, whatever the device here, because `scores` compares the export with the trials."""
    load = LoadSettings.model_validate(settings.load.model_dump() | {"dtypes": [dtype]})
    return settings.model_copy(update={"load": load})


def open_base(context: Context, result: Result, number: int) -> tuple[str, Matrices]:
    """The path or id of the run's model, and its matrices; InputError if the model isn't the run's any more."""
    with context.stage("read the base", loader.public_name(context.settings.model)):
        source, load, architecture = open_model(context.settings, result, number)
        base = Matrices(source, load, architecture)
    if base.reason:
        context.reporter.note(f"the model is loaded as a whole, because {base.reason}", reason=base.reason)
    return source, base


def open_model(settings: Settings, result: Result, number: int) -> tuple[str, LoadSettings, Architecture]:
    """The path or id of the run's model, how it is loaded, and its family; InputError if it isn't the run's any more."""
    model = result.model
    assert model is not None
    source = loader.resolve_source(settings.model)
    load = pinned(settings.load, source, model.revision)
    config = loader.load_config(source, load)
    if loader.fingerprint(source, config, load.revision) != model.fingerprint:
        damage = damage_of(source)
        if damage:
            raise InputError(f"The files of the model in {settings.model} aren't whole: {damage}; put them back.")
        raise _changed(number, "model")
    architecture = loader.known_architecture(config, load)
    if architecture is None:  # the structure of an unknown family is found by running its layers, which needs their weights
        architecture = loader.architecture_of(load_weights(source, dense_load(load), config, stored_dtype(config), None), load)
    elif load.separate_kinds or load.readers:
        architecture = loader.architecture_of(empty_model(config, load), load)
    return source, load, architecture


def edits_of(
    context: Context, base: Matrices | GgufMatrices, directions: Directions, refined: RefinedStore, trial: Trial
) -> StoredEdits:
    """The trial's edit of each matrix, computed from the full-precision weights even if the run was quantized."""
    settings = context.settings.edit
    factors: dict[str, Factors] = {}
    definitions: dict[str, Definition] = {}
    with context.stage("edits", f"{settings.mode} ({settings.representation})"):
        for index, target in enumerate(base.targets.values()):
            editor = editor_of(target, settings, directions, refined.directions, base.of)
            for name, key in editor.plan(trial.params).items():
                factors[name] = editor.factors(trial.params)[name]
                definitions[name] = _definition(editor, settings, trial.params, key, factors[name])
            context.reporter.progress(index + 1, len(base.targets), "modules")
        parts = (directions, refined.directions, base.targets.values(), base.of)
        error = approximation_of(settings, *parts, trial.params, factors)
    return StoredEdits(factors, definitions, error, refined_file(refined, trial))


def check(context: Context, job: ExportJob, edits: StoredEdits, final: Path) -> Verification:
    """Read every exported matrix back, and compare it with the definition of its edit."""

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "modules")

    with context.stage("check weights"):
        base = Matrices(job.source, job.load, job.architecture)
        reread = EXPORTERS[context.settings.export.kind].reread(final, job, base)
        return with_yardstick(context.settings, check_weights(base, reread, edits.definitions, progress))


def with_yardstick(settings: Settings, verdict: Verification) -> Verification:
    """The verdict with a record of what matrices were compared with, if it wasn't the edit's definition."""
    if not is_learned(edit_method(settings.edit.mode)):
        return verdict
    return replace(verdict, record={**verdict.record, "compared_with": "factors"})


def _definition(editor: Editor, settings: EditSettings, params: Params, key: EditKey, factors: Factors) -> Definition:
    """What the edit of one module is checked against.

    An approximation can only be compared with itself; its error is its distance from the exact edit. Fused experts have exact
    factors in every representation. An edit that an optimization finds has no definition but the factors it found.
    """
    exact = settings.representation == "exact" or factors.a.ndim == 3
    if exact and not is_learned(edit_method(settings.mode)):
        method, (vectors, coeffs) = editor.method(params, key), editor.vectors(params, key)
        if editor.reads(key):
            return by_definition_of_reading(vectors, coeffs, keeps_rows=method.keeps_columns)
        return by_definition(method, vectors, coeffs)
    return by_factors(factors)


def edits_on(bench: Workbench, picked: Picked) -> StoredEdits:
    """The edits of a picked trial on the workbench's model."""
    settings, editor, params, factors = bench.settings.edit, bench.editor, picked.trial.params, picked.job.factors
    definitions = {name: _definition(editor, settings, params, key, factors[name]) for name, key in editor.plan(params).items()}
    return StoredEdits(factors, definitions, picked.approximation, picked.job.refined)


def export_and_check(
    context: Context, picked: Picked, edits: StoredEdits, result: Result, final: Path
) -> Iterator[ExportRecord]:
    """Write the export and check its files matrix by matrix, where no device holds the whole model to run it.

    It yields the export's record after each of the two steps.
    """
    trial = picked.trial
    record = write(context, picked.job, result, final, trial, picked.approximation)
    yield record
    if not context.settings.export.verify:
        return
    verdict = unless_full(lambda: check(context, picked.job, edits, final), torch.device("cpu"))
    if verdict is None:
        context.reporter.warn("The export was written but not checked, because memory is short; abliterate export repeats it.")
        return
    record = concluded(record, verdict)
    yield record
    conclude(context, record, final, trial, len(picked.prompts.harmful_eval), verdict)


def job_of(settings: Settings, result: Result, source: str, base: Matrices, edits: StoredEdits, trial: Trial) -> ExportJob:
    """The export job for a trial's edits of the stored matrices."""
    assert result.model is not None
    tokenizer = loader.load_tokenizer(source, base.load)
    # The export holds the tokenizer's files and the settings' template, which a foreign settings.toml could take from anywhere.
    if (result.identity or {}).get(TOKENIZER_PART) != tokenizer_identity(tokenizer):
        raise _changed(trial.number, "tokenizer or chat template")
    return ExportJob(
        source=source,
        fingerprint=result.model.fingerprint,
        load=base.load,
        export=settings.export,
        architecture=base.architecture,
        tokenizer=tokenizer,
        factors=edits.factors,
        base_model=result.model.id,
        card=card(settings, result, source, trial, edits.approximation),
        refined=edits.refined,
    )


def _expected(context: Context, result: Result, directions: Directions, refined: RefinedStore, trial: Trial) -> Picked:
    """Repeat the trial on the prompts with the model in memory, so that the export can be compared with it."""
    prompts = read_prompts(context)
    run = context.settings
    # Only refusals and KL are compared, so custom scorers, which may be a stranger's code, don't run; the run's settings still
    # decide the identity.
    plain = context.with_settings(without_own_scorers(run))
    with load_calibrated(plain, prompts) as bench:
        try:
            identity = bench.identity(run, result.objectives_or_default())
        except OSError as error:  # the file of a custom scorer is gone
            raise _changed(trial.number, "set of scorers") from error
        changed = changed_parts(result.identity or identity, identity)
        if changed:
            raise _changed(trial.number, ", ".join(changed))
        bench.refined = refined
        bench.make_edits(directions)
        stages.baseline(bench)  # scorers are relative to it
        return prepare(bench, plain.settings, result, trial)


def _changed(number: int, part: str) -> InputError:
    return InputError(
        f"Trial {number} can't be exported with another {part} than its run's: it would be another trial; put back what was "
        "changed, or make a new run."
    )


def _both(weights: Verification, scores: Verification) -> Verification:
    """The verdicts of both checks in one record."""
    ok = weights.ok and scores.ok
    checks = {**weights.record["checks"], **scores.record["checks"]}
    return Verification(ok, {**weights.record, **scores.record, "ok": ok, "checks": checks})
