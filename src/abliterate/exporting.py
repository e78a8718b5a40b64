"""Stage 8: from a picked trial to an export on disk that was reloaded and compared with the trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from abliterate.bench import Bench, Calibration, make_engine
from abliterate.edits import Factors, SvdMemo
from abliterate.edits.svd import relative_error
from abliterate.errors import TrialError
from abliterate.evaluation import Scorer
from abliterate.evaluation.editor import Editor
from abliterate.evaluation.kl import kl_divergence
from abliterate.export import EXPORTERS, Exporter, ExportJob, finished_folder, model_card
from abliterate.export.merged import stored_dtype
from abliterate.export.verify import (
    Expected,
    Precision,
    Probe,
    Verification,
    compare,
    module_outputs,
    probe_inputs,
    storage_rounding,
)
from abliterate.inputs import Context, PromptSets
from abliterate.model import loader
from abliterate.model.chat import Chat
from abliterate.model.weights import dense_weight
from abliterate.types import Baseline, Trial


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


def prepare(context: Context, bench: Bench, editor: Editor, baseline: Baseline, prompts: PromptSets, trial: Trial) -> Picked:
    """What an export of `trial` needs once the model is gone. Edits the model, and gives the base model back."""
    factors = {name: found.to("cpu") for name, found in editor.factors(trial.params).items()}
    approximation = _approximation(context, bench, editor, factors, trial)
    job = _job(context, bench, baseline, len(prompts.harmless_eval), trial, factors, approximation)
    expected = _expect(context, bench, editor, job, prompts, trial)
    return Picked(job, approximation, expected, bench.scorers, bench.calibration)


def _approximation(
    context: Context, bench: Bench, editor: Editor, factors: Mapping[str, Factors], trial: Trial
) -> dict[str, float]:
    """Mean and largest ‖ΔW − BA‖ / ‖ΔW‖ over the edited modules, of the svd representation; else nothing."""
    settings = context.settings.edit
    if settings.representation == "exact" or not factors:
        return {}
    targets = {target.name: target for target in bench.loaded.targets}
    errors = []
    for name, low_rank in factors.items():
        # One module at a time: what an exact editor prepares is large.
        exact_settings = settings.model_copy(update={"representation": "exact"})
        exact = Editor((targets[name],), editor._directions, exact_settings, editor.adapters, SvdMemo(0))
        weight = dense_weight(targets[name].module).float().cpu()
        errors.append(relative_error(exact.factors(trial.params)[name].to("cpu").delta(weight), low_rank))
    return {"mean": sum(errors) / len(errors), "max": max(errors)}


def _job(
    context: Context,
    bench: Bench,
    baseline: Baseline,
    n_harmless: int,
    trial: Trial,
    factors: Mapping[str, Factors],
    approximation: Mapping[str, float],
) -> ExportJob:
    settings, info = context.settings, bench.loaded.info
    facts = {
        "base": info.id,
        "revision": info.revision,
        "n_harmful": baseline.prompts,
        "n_harmless": n_harmless,
        "before": baseline.refusals,
        "after": trial.refusals,
        "kl": trial.scores["kl"],
        "mode": settings.edit.mode,
        "representation": settings.edit.representation,
        "approximation": approximation,
        "method": settings.directions.method,
        "number": trial.number,
        "seed": settings.seed,
        "params": trial.params.to_record(),
    }
    return ExportJob(
        source=info.source,
        fingerprint=info.fingerprint,
        # The commit that was loaded: the Hub's `main` may have moved since.
        load=settings.load if Path(info.source).is_dir() else settings.load.model_copy(update={"revision": info.revision}),
        export=settings.export,
        architecture=bench.loaded.architecture,
        tokenizer=bench.loaded.tokenizer,
        factors=factors,
        base_model=info.id,
        card=model_card(facts),
    )


def _expect(context: Context, bench: Bench, editor: Editor, job: ExportJob, prompts: PromptSets, trial: Trial) -> Expected:
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
    stored = _stored_dtype(context.settings.export.kind, job)
    weights = {target.name: target.module for target in bench.loaded.targets}
    probes = {
        name: Probe(x, base[name], edited[name], storage_rounding(dense_weight(weights[name]), job.factors[name], x, stored))
        for name, x in inputs.items()
    }
    return Expected(trial, harmless, harmful, noise, probes)


def export(context: Context, picked: Picked, prompts: PromptSets, final: Path) -> None:
    """Write the export and, unless switched off, verify it from disk; `result.json` says what came of it."""
    exporter = EXPORTERS[context.settings.export.kind]
    key = picked.job.key(exporter.kind)
    with context.result.stage("export", exporter.kind), finished_folder(final, key) as folder:
        facts = dict(exporter.write(picked.job, folder))
    trial = picked.expected.trial.number
    record = {"kind": exporter.kind, "trial": trial, "path": final.name, "verified": None, **facts}
    if picked.approximation:
        record["approximation_error"] = dict(picked.approximation)
    context.result.record["export"] = record
    context.result.save()
    if context.settings.export.verify:
        with context.result.stage("verify"):
            try:
                verdict = _verify(context, exporter, picked, prompts, final)
            except TrialError as error:  # logits that are no numbers, above all: the very thing to be found here
                verdict = Verification(False, {"ok": False, "checks": {}, "reason": str(error)})
            record |= {"verified": verdict.ok, "verification": verdict.record}
        context.result.save()
        if not verdict.ok:
            failed = [name for name, passed in verdict.record["checks"].items() if not passed]
            context.reporter.warn(
                f"The export reloaded from disk differs from the trial by more than rounding explains "
                f"({', '.join(failed) or verdict.record['reason']}); see export.verification in result.json before using it."
            )


def _verify(context: Context, exporter: Exporter, picked: Picked, prompts: PromptSets, final: Path) -> Verification:
    settings = context.settings
    device = loader.choose_device(settings.device)
    run_dtype = getattr(torch, context.result.record["model"]["dtype"])
    # The export's own tokenizer and template: they belong to what a user would load.
    tokenizer = loader.load_tokenizer(str(final), settings.load.model_copy(update={"chat_template": "", "revision": ""}))
    model = exporter.load(final, picked.job, device, run_dtype)
    chat = Chat(tokenizer, device, picked.calibration.response_prefix)
    engine = make_engine(context, model, chat, picked.calibration.sizes)
    total = len(prompts.harmless_eval) + 2 * len(prompts.harmful_eval)

    def progress(done: int, before: int) -> None:
        context.reporter.progress(before + done, total, "prompts")

    harmful = engine.first_logprobs(prompts.harmful_eval, lambda done, _: progress(done, 0))
    before = len(prompts.harmful_eval)
    observed = engine.observe(prompts.harmful_eval, prompts.harmless_eval, lambda done, _: progress(done, before))
    outputs = module_outputs(model, {name: probe.x for name, probe in picked.expected.probes.items()}, run_dtype)
    precision = Precision(run_dtype, _stored_dtype(exporter.kind, picked.job), settings.load.quantization)
    return compare(picked.expected, observed, harmful, outputs, picked.scorers, precision)


def _stored_dtype(kind: str, job: ExportJob) -> torch.dtype:
    """The dtype that the export rounds edited weights to; an adapter holds an edit's factors, in float32."""
    return stored_dtype(loader.load_config(job.source, job.load)) if kind == "merged" else torch.float32
