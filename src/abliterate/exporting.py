"""Stage 8: from a picked trial to an export on disk that was reloaded and compared with the trial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abliterate.bench import Bench, Calibration, Context, PromptSets, make_engine
from abliterate.evaluation import Scorer
from abliterate.evaluation.editor import Editor
from abliterate.export import EXPORTERS, Exporter, ExportJob, finished_folder, model_card
from abliterate.export.verify import Verification, compare
from abliterate.model import loader
from abliterate.model.chat import Chat
from abliterate.types import Baseline, Trial


@dataclass(frozen=True)
class Picked:
    """What outlives the loaded model: the trial, its export job, and what the export must reproduce.

    `expected_logprobs` (n_harmless, vocabulary): the trial's first-token log-probabilities, float32.
    """

    trial: Trial
    job: ExportJob
    expected_logprobs: Tensor
    scorers: tuple[Scorer, ...]
    calibration: Calibration


def export_job(context: Context, bench: Bench, editor: Editor, baseline: Baseline, n_harmless: int, trial: Trial) -> ExportJob:
    """Everything an export needs once the model is gone: the trial's factors on the CPU, tokenizer, card."""
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
        "method": settings.directions.method,
        "number": trial.number,
        "seed": settings.seed,
        "params": trial.params.to_record(),
    }
    return ExportJob(
        source=info.source,
        load=settings.load,
        export=settings.export,
        architecture=bench.loaded.architecture,
        tokenizer=bench.loaded.tokenizer,
        factors={name: factors.to("cpu") for name, factors in editor.factors(trial.params).items()},
        base_model=info.id,
        card=model_card(facts),
    )


def export(context: Context, picked: Picked, prompts: PromptSets, final: Path) -> None:
    """Write the export and, unless switched off, verify it from disk; `result.json` says what came of it."""
    exporter = EXPORTERS[context.settings.export.kind]
    with context.result.stage("export", exporter.kind), finished_folder(final) as folder:
        facts = dict(exporter.write(picked.job, folder))
    record = {"kind": exporter.kind, "trial": picked.trial.number, "path": final.name, "verified": None, **facts}
    context.result.record["export"] = record
    context.result.save()
    if context.settings.export.verify:
        with context.result.stage("verify"):
            verdict = _verify(context, exporter, picked, prompts, final)
            record |= {"verified": verdict.ok, "verification": verdict.record}
        context.result.save()
        if not verdict.ok:
            context.reporter.warn(
                "The export reloaded from disk differs from the trial by more than rounding explains; see "
                "export.verification in result.json before using it."
            )


def _verify(context: Context, exporter: Exporter, picked: Picked, prompts: PromptSets, final: Path) -> Verification:
    settings = context.settings
    device = loader.choose_device(settings.device)
    run_dtype = getattr(torch, context.result.record["model"]["dtype"])
    # The export's own tokenizer and template: they belong to what a user would load.
    tokenizer = loader.load_tokenizer(str(final), settings.load.model_copy(update={"chat_template": "", "revision": ""}))
    model = exporter.load(final, picked.job, device, run_dtype)
    chat = Chat(tokenizer, device, picked.calibration.response_prefix)
    engine = make_engine(context, model, chat, picked.calibration.batch_size)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "prompts")

    observed = engine.observe(prompts.harmful_eval, prompts.harmless_eval, progress)
    stored = getattr(torch, context.result.record["export"].get("dtype", "float32"))
    coarser = max(stored, run_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if settings.load.quantization != "none":
        coarser = torch.bfloat16  # the export holds full-precision weights, the trial ran on quantized ones
    return compare(picked.expected_logprobs, picked.trial.refusals, observed, picked.scorers, coarser)
