"""Stage 8: from a picked trial to an export on disk that was reloaded and compared with the trial."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import Directions
from abliterate.edits import Factors, SvdMemo
from abliterate.edits.svd import relative_error
from abliterate.errors import AbliterateError, TrialError
from abliterate.export import EXPORTERS, Exporter, ExportJob, checked, finished_folder, leave_record, model_card, stores_weights
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
from abliterate.model.editor import Editor
from abliterate.model.quantized import checkpoint_quantization
from abliterate.model.weights import dense_weight
from abliterate.objectives import objectives_from_result, other_names
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import chat_of, make_engine
from abliterate.pipeline.workbench import Calibration, Workbench
from abliterate.prompts.sets import PromptSets
from abliterate.scorers import Scorer
from abliterate.scorers.kl import kl_divergence
from abliterate.settings.schema import EditSettings, LoadSettings
from abliterate.types import Baseline, Trial, TrialParams


@dataclass(frozen=True)
class Picked:
    """What outlives the loaded model: the trial's export job, and what the export must reproduce.

    `approximation`: what the svd representation loses, for `result.json`; empty where edits are exact.
    """

    job: ExportJob
    approximation: Mapping[str, float]
    expected: Expected
    scorers: tuple[Scorer, ...]
    calibration: Calibration


def prepare(
    context: Context, bench: Workbench, editor: Editor, baseline: Baseline, prompts: PromptSets, trial: Trial
) -> Picked:
    """What an export of `trial` needs once the model is gone. Edits the model, and gives the base model back."""
    loaded, settings = bench.loaded, context.settings
    factors = {name: found.to("cpu") for name, found in editor.factors(trial.params).items()}

    def weight_of(target: Target) -> Tensor:
        return dense_weight(target.module)

    approximation = approximation_of(settings.edit, editor.directions, loaded.targets, weight_of, trial.params, factors)
    job = ExportJob(
        source=loaded.info.source,
        fingerprint=loaded.info.fingerprint,
        load=pinned(settings.load, loaded.info.source, loaded.info.revision),
        export=settings.export,
        architecture=loaded.architecture,
        tokenizer=loaded.tokenizer,
        factors=factors,
        base_model=loaded.info.id,
        card=card(context, loaded.info.source, baseline, trial, approximation),
    )
    expected = _expect(context, bench, editor, job, prompts, trial)
    return Picked(job, approximation, expected, bench.scorers, bench.calibration)


def pinned(load: LoadSettings, source: str, revision: str) -> LoadSettings:
    """At the commit that the run loaded: the Hub's `main` may have moved since. A directory has none."""
    return load if Path(source).is_dir() or not revision else load.model_copy(update={"revision": revision})


def approximation_of(
    settings: EditSettings,
    directions: Directions,
    targets: Iterable[Target],
    weight_of: Callable[[Target], Tensor],
    params: TrialParams,
    factors: Mapping[str, Factors],
) -> dict[str, float]:
    """Mean and largest ‖ΔW − BA‖ / ‖ΔW‖ over the edited modules, of the svd representation; else nothing."""
    if settings.representation == "exact" or not factors:
        return {}
    exact_settings = settings.model_copy(update={"representation": "exact"})
    errors = []
    for target in targets:
        if target.name in factors:
            # One module at a time: what an exact editor prepares is large.
            exact = Editor((target,), directions, exact_settings, EditHooks(()), SvdMemo(0), weight_of=weight_of)
            delta = exact.factors(params)[target.name].to("cpu").delta(weight_of(target).float().cpu())
            errors.append(relative_error(delta, factors[target.name]))
    return {"mean": sum(errors) / len(errors), "max": max(errors)}


def card(context: Context, source: str, baseline: Baseline, trial: Trial, approximation: Mapping[str, float]) -> str:
    """The model card, of what `context.result` says of the run; nothing is measured for it."""
    settings, record = context.settings, context.result.record
    heldout = record.get("heldout")
    facts = {
        "base": record["model"]["id"],
        "on_hub": not Path(source).is_dir(),
        "quantized": checkpoint_quantization(record["model"].get("quantization", "none")),
        "dense": stores_weights(settings.export.kind),
        "revision": record["model"]["revision"],
        "n_harmful": baseline.prompts,
        "n_harmless": record.get("prompts", {}).get("harmless_eval", {}).get("count"),
        "before": baseline.refusals,
        "after": trial.refusals,
        "kl": trial.scores["kl"],
        "objectives": objectives_from_result(record),
        "before_values": baseline.values,
        "values": {name: trial.values[name] for name in other_names(trial.values)},
        "mode": settings.edit.mode,
        "representation": settings.edit.representation,
        "approximation": approximation,
        "method": settings.directions.method,
        "number": trial.number,
        "seed": settings.seed,
        "params": trial.params.to_record(),
        "heldout": heldout if heldout and heldout["trial"] == trial.number else None,
        "recipe": recipe(settings, record, settings.export.kind, trial.number),
    }
    return model_card(facts)


def _expect(context: Context, bench: Workbench, editor: Editor, job: ExportJob, prompts: PromptSets, trial: Trial) -> Expected:
    """What the export of `job`, made from `trial`, must reproduce. Edits the model, and gives the base model back."""
    model, sizes, dtype = bench.loaded.model, bench.calibration.sizes, getattr(torch, bench.loaded.info.dtype)
    # The plain engine here and on the export: the verdict must not depend on how trials are made fast.
    engine, other = (make_engine(context, model, bench.chat, some) for some in (sizes, sizes.halved()))
    inputs = probe_inputs(job.factors)
    editor.apply(trial.params)
    harmless, harmful = (engine.first_logprobs(part).cpu() for part in (prompts.harmless_eval, prompts.harmful_eval))
    noise = float(kl_divergence(harmless, other.first_logprobs(prompts.harmless_eval).cpu()).mean())
    edited = module_outputs(model, inputs, dtype)
    editor.clear()
    base = module_outputs(model, inputs, dtype)
    stored = stored_dtype_of(context.settings.export.kind, job)
    weights = {target.name: target.module for target in bench.loaded.targets}
    rounding = partial(storage_rounding, is_base=bool(checkpoint_quantization(bench.loaded.info.quantization)))
    probes = {
        name: ModuleProbe(x, base[name], edited[name], rounding(dense_weight(weights[name]), job.factors[name], x, stored))
        for name, x in inputs.items()
    }
    return Expected(trial, harmless, harmful, noise, probes)


def export(context: Context, picked: Picked, prompts: PromptSets, final: Path) -> None:
    """Write the export and, unless switched off, verify it from disk; `result.json` and the card say what came of it."""
    trial = picked.expected.trial
    write(context, picked.job, final, trial, picked.approximation)
    if context.settings.export.verify:
        conclude(context, final, trial, len(prompts.harmful_eval), verify(context, picked, prompts, final))


def write(
    context: Context,
    job: ExportJob,
    final: Path,
    trial: Trial,
    approximation: Mapping[str, float],
    origin: Origin = "trial",
) -> dict[str, Any]:
    """The export under its final name, with its recipe, and what `result.json` says of it; returns the latter.

    `origin`: how the job's factors were computed.
    """
    exporter = EXPORTERS[context.settings.export.kind]
    with context.result.stage("export", exporter.kind), finished_folder(final, job.key(exporter.kind)) as folder:
        facts = dict(exporter.write(job, folder))
        made = export_record(exporter.kind, origin, folder, job.factors)
        write_json(folder / RECIPE, recipe_record(context.settings, context.result.record, trial, made))
    record = {"kind": exporter.kind, "trial": trial.number, "path": final.name, "verified": None, "pushed": None, **facts}
    if approximation:
        record["approximation_error"] = dict(approximation)
    context.result.record["export"] = record
    context.result.save()
    leave_record(final, record)
    return record


def verify(context: Context, picked: Picked, prompts: PromptSets, final: Path) -> Verification:
    """Reload the export and compare what it does with what the trial did."""
    with context.result.stage("verify"):
        try:
            return _verify(context, EXPORTERS[context.settings.export.kind], picked, prompts, final)
        except TrialError as error:  # logits that are no numbers, above all: the very thing to be found here
            return Verification(False, {"ok": False, "checks": {}, "reason": str(error)})


def conclude(context: Context, final: Path, trial: Trial, n_harmful: int, verdict: Verification) -> None:
    """Say what verification found: in `result.json`, in the export's card and record, and to the person if it failed."""
    record = context.result.record["export"]
    record |= {"verified": verdict.ok, "verification": verdict.record}
    context.result.save()
    leave_record(final, record)
    readme = final / "README.md"
    write_atomically(readme, readme.read_text(encoding="utf-8") + checked(verdict.record, trial, n_harmful))
    mark_verified(final, verdict.ok)
    if not verdict.ok:
        failed = [name for name, passed in verdict.record["checks"].items() if not passed]
        context.reporter.warn(
            f"The export reloaded from disk differs from the trial by more than rounding explains "
            f"({', '.join(failed) or verdict.record['reason']}); see {final.name}/README.md before using it."
        )


def keep_recipe(context: Context, directory: RunDirectory, *, exported: bool) -> None:
    """`recipe.json` in the run directory: that of the run's export, or else of the trial that it picked."""
    if exported:
        write_atomically(directory.recipe, (directory.export / RECIPE).read_bytes())
    else:
        record = context.result.record
        picked = next(Trial.from_record(one) for one in record["trials"] if one["number"] == record["selected"])
        write_json(directory.recipe, recipe_record(context.settings, record, picked, NO_EXPORT))


def push_export(context: Context, final: Path) -> None:
    """Upload the export if the settings name a repository and its verification didn't fail.

    Raises:
        AbliterateError: the upload failed; everything else is done by then, and kept.
    """
    settings, record = context.settings.export, context.result.record["export"]
    if not settings.push:
        return
    if record["verified"] is False:
        raise AbliterateError(
            f"The export was not pushed to {settings.push}, because its verification failed; if you want it there all the "
            f"same: hf upload {settings.push} {shlex.quote(str(final))}."
        )
    with context.result.stage("push", settings.push):
        record["pushed"] = push(final, settings)
    context.result.save()
    leave_record(final, record)


def _verify(context: Context, exporter: Exporter, picked: Picked, prompts: PromptSets, final: Path) -> Verification:
    settings = context.settings
    device = choose_device(settings.device)
    run_dtype = getattr(torch, context.result.record["model"]["dtype"])
    # The export's own tokenizer and template: they belong to what a user would load.
    tokenizer = loader.load_tokenizer(str(final), settings.load.model_copy(update={"chat_template": "", "revision": ""}))
    model = exporter.load(final, picked.job, device, run_dtype)
    chat = chat_of(settings, tokenizer, device, picked.calibration.response_prefix)
    engine = make_engine(context, model, chat, picked.calibration.sizes)
    total = len(prompts.harmless_eval) + 2 * len(prompts.harmful_eval)

    def progress(done: int, before: int) -> None:
        context.reporter.progress(before + done, total, "prompts")

    harmful = engine.first_logprobs(prompts.harmful_eval, lambda done, _: progress(done, 0))
    before = len(prompts.harmful_eval)
    observed = engine.observe(prompts.harmful_eval, prompts.harmless_eval, lambda done, _: progress(done, before))
    outputs = module_outputs(model, {name: probe.x for name, probe in picked.expected.probes.items()}, run_dtype)
    quantization = context.result.record["model"]["quantization"]
    precision = Precision(run_dtype, stored_dtype_of(exporter.kind, picked.job), quantization)
    return compare(picked.expected, observed, harmful, outputs, picked.scorers, precision)


def stored_dtype_of(kind: str, job: ExportJob) -> torch.dtype:
    """The dtype that the export rounds edited weights to; an adapter holds an edit's factors, in float32."""
    return stored_dtype(loader.load_config(job.source, job.load)) if stores_weights(kind) else torch.float32
