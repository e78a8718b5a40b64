"""Export a trial to disk, reload the export, and compare it with the trial (step 9 of a run, and `abliterate.export`)."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from abliterate import ranks
from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import ExportRecord, PromptSetRecord, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.edits import Factors, SvdMemo, edit_method, is_learned, is_low_rank, reading_method
from abliterate.edits.svd import relative_error
from abliterate.errors import AbliterateError, InputError, TrialError
from abliterate.export import (
    EXPORTERS,
    Exporter,
    ExportJob,
    check_kind,
    check_output,
    checked,
    finished_folder,
    leave_record,
    model_card,
    stores_weights,
)
from abliterate.export.base_card import front_matter
from abliterate.export.base_weights import stored_dtype
from abliterate.export.card import recipe
from abliterate.export.check_behaviour import (
    Expected,
    ModuleProbe,
    Precision,
    Verification,
    compare,
    module_outputs,
    probe_inputs,
    storage_rounding,
)
from abliterate.export.push import push
from abliterate.export.recipe import NO_EXPORT, RECIPE, Origin, export_record, mark_verified, recipe_record
from abliterate.files import write_atomically, write_json
from abliterate.model import loader
from abliterate.model.architectures import Target
from abliterate.model.devices import choose_device
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor, RefinedDirections
from abliterate.model.memory import unless_full
from abliterate.model.quantized import checkpoint_quantization
from abliterate.model.weights import dense_weight
from abliterate.objectives import UNANSWERED, other_names
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import chat_of, make_engine
from abliterate.pipeline.preflight import adapter_method, check_export
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.sets import PromptSets, prompt_sources
from abliterate.report.tables import heldout_fault
from abliterate.scorers import Scorer
from abliterate.scorers.kl import kl_divergence
from abliterate.settings.schema import EditSettings, LoadSettings, Settings
from abliterate.types import BatchSizes, Params, RefinedParams, Trial


@dataclass(frozen=True)
class Picked:
    """The selected trial's export job and the outputs that the export must reproduce; both outlive the loaded model.

    `approximation` is the error of the svd representation, for `result.json`; it is empty for exact edits. The fields `scorers`
    to `quantization` say how the trial was measured.
    """

    job: ExportJob
    approximation: Mapping[str, float]
    expected: Expected
    scorers: tuple[Scorer, ...]
    prompts: PromptSets
    sizes: BatchSizes
    response_prefix: str
    dtype: torch.dtype
    quantization: str

    @property
    def trial(self) -> Trial:
        """The trial that the export is made from."""
        return self.expected.trial


def prepare(bench: Workbench, settings: Settings, result: Result, trial: Trial) -> Picked:
    """Collect everything that an export of `trial` needs once the model is gone; the model card is made from `result`."""
    loaded = bench.loaded
    factors = {name: edit.to("cpu") for name, edit in bench.editor.factors(trial.params).items()}

    def weight_of(target: Target) -> Tensor:
        return dense_weight(target.module)

    directions = (bench.editor.directions, bench.refined.directions)
    approximation = approximation_of(settings.edit, *directions, loaded.targets, weight_of, trial.params, factors)
    job = ExportJob(
        source=loaded.info.source,
        fingerprint=loaded.info.fingerprint,
        load=pinned(settings.load, loaded.info.source, loaded.info.revision),
        export=settings.export,
        architecture=loaded.architecture,
        tokenizer=loaded.tokenizer,
        factors=factors,
        base_model=loaded.info.id,
        card=card(settings, result, loaded.info.source, trial, approximation),
        refined=refined_file(bench.refined, trial),
    )
    if ranks.size() > 1:  # no device holds the whole model, so the export's files are checked instead of its outputs
        expected = Expected(trial, torch.empty(0), torch.empty(0), 0.0, {})
    else:
        expected = _expect(bench, settings.export.kind, job, trial)
    measured = (bench.scorers, bench.prompts, bench.sizes, bench.response_prefix)
    return Picked(job, approximation, expected, *measured, getattr(torch, loaded.info.dtype), loaded.info.quantization)


def refined_file(store: RefinedStore, trial: Trial) -> bytes:
    """The file of a refined trial's directions; empty for other trials."""
    return store.content(trial.params) if isinstance(trial.params, RefinedParams) else b""


def pinned(load: LoadSettings, source: str, revision: str) -> LoadSettings:
    """`load` at the commit that the run loaded, since the Hub's `main` may have moved; a directory has no commit."""
    return load if Path(source).is_dir() or not revision else load.model_copy(update={"revision": revision})


def approximation_of(
    settings: EditSettings,
    directions: Directions,
    refined: RefinedDirections,
    targets: Collection[Target],
    weight_of: Callable[[Target], Tensor],
    params: Params,
    factors: Mapping[str, Factors],
) -> dict[str, float]:
    """The mean and the largest ‖ΔW − BA‖ / ‖ΔW‖ over the edited modules; empty if their edits are exact.

    They are in the svd representation, too, where a mode scales neither rows nor columns, so they aren't computed again.
    """
    method = edit_method(settings.mode)
    used = [reading_method(method) if target.reads else method for target in targets if target.name in factors]
    if settings.representation == "exact" or all(map(is_low_rank, used)):
        return {}
    exact_settings = settings.model_copy(update={"representation": "exact"})
    errors = []
    for target in targets:
        if target.name in factors:
            exact = editor_of(target, exact_settings, directions, refined, weight_of)
            delta = exact.factors(params)[target.name].to("cpu").delta(weight_of(target).float().cpu())
            errors.append(relative_error(delta, factors[target.name]))
    return {"mean": sum(errors) / len(errors), "max": max(errors)}


def editor_of(
    target: Target,
    settings: EditSettings,
    directions: Directions,
    refined: RefinedDirections,
    weight_of: Callable[[Target], Tensor],
) -> Editor:
    """An editor of one module, because the tensors that it prepares are large, and end with it."""
    return Editor((target,), directions, settings, EditHooks(()), SvdMemo(0), weight_of=weight_of, refined=refined)


def card(settings: Settings, result: Result, source: str, trial: Trial, approximation: Mapping[str, float]) -> str:
    """The model card, made from the facts in `result`; nothing is measured for it."""
    record, baseline, model = result.to_record(), result.baseline, result.model
    assert baseline is not None
    assert model is not None
    heldout = result.heldout or {}
    of_trial = heldout.get("trial") == trial.number and heldout_fault(heldout) is None
    harmless = result.prompts.get("harmless_eval")
    facts = {
        "base": model.id,
        "on_hub": not Path(source).is_dir(),
        "quantized": checkpoint_quantization(model.quantization),
        "dense": stores_weights(settings.export.kind),
        "base_card": front_matter(source, pinned(settings.load, source, model.revision)),
        "adapter": adapter_method(settings),
        "revision": model.revision,
        "n_harmful": baseline.prompts,
        "n_harmless": harmless.count if harmless else None,
        "before": baseline.refusals,
        "after": trial.refusals,
        "kl": trial.scores["kl"],
        "objectives": result.objectives_or_default(),
        "before_values": baseline.values,
        "before_kinds": baseline.unanswered,
        "kinds": trial.scores.get(UNANSWERED),
        "values": {name: trial.values[name] for name in other_names(trial.values)},
        "mode": settings.edit.mode,
        "learned": is_learned(edit_method(settings.edit.mode)),
        "readers": settings.load.readers,
        "representation": settings.edit.representation,
        "approximation": approximation,
        "method": settings.directions.method,
        "number": trial.number,
        "seed": settings.seed,
        "params": trial.params,
        "heldout": heldout if of_trial else None,
        "recipe": recipe(settings, record, settings.export.kind, trial.number),
    }
    return model_card(facts)


def _expect(bench: Workbench, kind: str, job: ExportJob, trial: Trial) -> Expected:
    """The outputs that the export of `job`, made from `trial`, must reproduce."""
    model, dtype = bench.loaded.model, getattr(torch, bench.loaded.info.dtype)
    # The plain engine measures both the trial and the export, so the verdict doesn't depend on the trial engine.
    engine, other = bench.plain, make_engine(bench.context, model, bench.chat, bench.sizes.halved())
    inputs = probe_inputs(job.factors)
    with bench.edited(trial.params):
        sets = (bench.prompts.harmless_eval, bench.prompts.harmful_eval)
        harmless, harmful = (engine.first_logprobs(prompts).cpu() for prompts in sets)
        noise = float(kl_divergence(harmless, other.first_logprobs(bench.prompts.harmless_eval).cpu()).mean())
        edited = module_outputs(model, inputs, dtype)
    with bench.base():
        base = module_outputs(model, inputs, dtype)
    stored = stored_dtype_of(kind, job)
    weights = {target.name: target.module for target in bench.loaded.targets}
    rounding = partial(storage_rounding, is_base=bool(checkpoint_quantization(bench.loaded.info.quantization)))
    probes = {
        name: ModuleProbe(x, base[name], edited[name], rounding(dense_weight(weights[name]), job.factors[name], x, stored))
        for name, x in inputs.items()
    }
    return Expected(trial, harmless, harmful, noise, probes)


def write(
    context: Context,
    job: ExportJob,
    result: Result,
    final: Path,
    trial: Trial,
    approximation: Mapping[str, float],
    origin: Origin = "trial",
) -> ExportRecord:
    """Write the export and its recipe under the export's final name; returns the export's record.

    `result` describes the run for the recipe. `origin` says how the job's factors were computed.
    """
    exporter = EXPORTERS[context.settings.export.kind]
    with (
        context.stage("export", exporter.kind, at_once=True),
        finished_folder(final, job.key(exporter.kind), context.reporter.warn) as folder,
    ):
        facts = dict(exporter.write(job, folder))
        entry = export_record(exporter.kind, origin, folder, job.factors)
        write_json(folder / RECIPE, recipe_record(context.settings, result.to_record(), trial, entry, job.refined))
    if approximation:
        facts["approximation_error"] = dict(approximation)
    record = ExportRecord(
        **{"kind": exporter.kind, "trial": trial.number, "path": final.name, "verified": None, "pushed": None} | facts
    )
    leave_record(final, record.model_dump(exclude_unset=True))
    return record


def verify(context: Context, picked: Picked, final: Path) -> Verification | None:
    """Reload the export and compare its outputs with the trial's; None if the device's memory doesn't hold it, being dense."""
    device = choose_device(context.settings.device)
    with context.stage("verify"):
        try:
            return unless_full(lambda: _verify(context, EXPORTERS[context.settings.export.kind], picked, final, device), device)
        except TrialError as error:  # above all NaN logits, a fault that verification is there to find
            return Verification(False, {"ok": False, "checks": {}, "reason": str(error)})


def concluded(record: ExportRecord, verdict: Verification) -> ExportRecord:
    """The record with the verdict."""
    return record.model_copy(update={"verified": verdict.ok, "verification": verdict.record})


def conclude(context: Context, record: ExportRecord, final: Path, trial: Trial, n_harmful: int, verdict: Verification) -> None:
    """Write the verdict, which `record` has, to the export's card, recipe and own record. A failure is a warning."""
    leave_record(final, record.model_dump(exclude_unset=True))
    readme = final / "README.md"
    if readme.exists():  # an exporter of a plugin may write none
        write_atomically(readme, readme.read_text(encoding="utf-8") + checked(verdict.record, trial, n_harmful))
    mark_verified(final, verdict.ok)
    if not verdict.ok:
        failed = [name for name, passed in verdict.record["checks"].items() if not passed]
        context.reporter.warn(
            f"The export reloaded from disk differs from the trial by more than rounding explains "
            f"({', '.join(failed) or verdict.record['reason']}); see {final.name}/README.md before using it."
        )


def export_and_verify(context: Context, picked: Picked, result: Result, final: Path) -> Iterator[ExportRecord]:
    """Write the export and, unless switched off, verify it from disk; yields its record after each of the two steps.

    The verdict is yielded before the export's own files get it, so that a caller can save it first.
    """
    trial = picked.trial
    record = write(context, picked.job, result, final, trial, picked.approximation)
    yield record
    if context.settings.export.verify:
        verdict = verify(context, picked, final)
        if verdict is None:
            context.reporter.warn(
                f"The export was written but not checked, because the memory of {choose_device(context.settings.device)} "
                "doesn't hold it; abliterate export with this run and trial checks its weights file by file."
            )
            return
        record = concluded(record, verdict)
        yield record
        conclude(context, record, final, trial, len(picked.prompts.harmful_eval), verdict)


def export(bench: Workbench, trial: Trial, out: str | Path, kind: str = "") -> ExportRecord:
    """Export a trial of the workbench's model to the folder `out`, and compare the reloaded export with the trial.

    `kind` is `merged` or `adapter`; by default the kind in the settings. The workbench keeps its model, so verifying the export
    needs memory for both.

    Raises:
        InputError: `out` holds files that aren't an export of this tool, the kind is unknown or can't hold the edits, or the
            trial wasn't measured in full.
    """
    final, settings = Path(out), bench.settings
    check_output(final, settings.model)
    kind = kind or (settings.export.kind if settings.export.kind != "none" else "merged")
    if kind == "none" or trial.state != "complete":
        raise InputError(
            f"Trial {trial.number} can't be exported as {kind!r}, being {trial.state}; choose a complete trial, and merged or "
            "adapter."
        )
    check_kind(kind)
    settings = settings.model_copy(update={"export": settings.export.model_copy(update={"kind": kind})})
    check_export(settings, bench.loaded.model.config, bench.loaded.targets)
    baseline = bench.baseline or stages.baseline(bench)
    result = Result(
        **bench.record(),
        prompts=prompt_records(settings, bench.prompts),
        identity=bench.identity(),
        startup_trials=settings.search.n_startup_trials,
        directions=stages.directions_record(bench.editor.directions),
    )
    result.searched([trial], [trial], baseline, bench.objectives)
    result.selected = trial.number
    picked = prepare(bench, settings, result, trial)
    *_, record = export_and_verify(bench.context.with_settings(settings), picked, result, final)
    return record


def prompt_records(settings: Settings, prompts: PromptSets) -> dict[str, PromptSetRecord]:
    """{set: source, count and digest} of the four prompt sets, for `result.json`."""
    return {name: PromptSetRecord.of(source, getattr(prompts, name)) for name, source in prompt_sources(settings).items()}


def write_recipe(settings: Settings, result: Result, directory: RunDirectory, *, exported: bool) -> None:
    """Write `recipe.json` in the run directory: the recipe of the run's export, or else of its selected trial."""
    if exported:
        write_atomically(directory.recipe, (directory.export / RECIPE).read_bytes())
        return
    selected = next(trial for trial in result.trials if trial.number == result.selected)
    refined = refined_file(RefinedStore(directory.refined), selected)
    write_json(directory.recipe, recipe_record(settings, result.to_record(), selected, NO_EXPORT, refined))


def push_export(context: Context, record: ExportRecord, final: Path) -> ExportRecord:
    """Upload the export if the settings name a repository and its verification didn't fail; returns the export's record.

    Raises:
        AbliterateError: the upload failed; everything else is finished and kept.
    """
    settings = context.settings.export
    if not settings.push:
        return record
    if record.verified is False or (record.verified is None and settings.verify):
        why = "its verification failed" if record.verified is False else "it could not be checked"
        raise AbliterateError(
            f"The export was not pushed to {settings.push}, because {why}; if you want it there all the "
            f"same: hf upload {settings.push} {shlex.quote(str(final))}."
        )
    with context.stage("push", settings.push, at_once=True):
        pushed = record.model_copy(update={"pushed": push(final, settings)})
    leave_record(final, pushed.model_dump(exclude_unset=True))
    return pushed


def _verify(context: Context, exporter: Exporter, picked: Picked, final: Path, device: torch.device) -> Verification:
    settings, prompts = context.settings, picked.prompts
    run_dtype = picked.dtype
    # A user of the export loads its tokenizer and template, too, so both are taken from the export.
    tokenizer = loader.load_tokenizer(str(final), settings.load.model_copy(update={"chat_template": "", "revision": ""}))
    model = exporter.load(final, picked.job, device, run_dtype)
    chat = chat_of(settings, tokenizer, device, picked.response_prefix)
    engine = make_engine(context, model, chat, picked.sizes)
    total = len(prompts.harmless_eval) + 2 * len(prompts.harmful_eval)

    def progress(done: int, before: int) -> None:
        context.reporter.progress(before + done, total, "prompts")

    harmful = engine.first_logprobs(prompts.harmful_eval, lambda done, _: progress(done, 0))
    before = len(prompts.harmful_eval)
    observed = engine.observe(prompts.harmful_eval, prompts.harmless_eval, lambda done, _: progress(done, before))
    outputs = module_outputs(model, {name: probe.x for name, probe in picked.expected.probes.items()}, run_dtype)
    precision = Precision(run_dtype, stored_dtype_of(exporter.kind, picked.job), picked.quantization)
    return compare(picked.expected, observed, harmful, outputs, picked.scorers, precision)


def stored_dtype_of(kind: str, job: ExportJob) -> torch.dtype:
    """The dtype that the export rounds edited weights to; an adapter stores factors in float32."""
    return stored_dtype(loader.load_config(job.source, job.load)) if stores_weights(kind) else torch.float32
