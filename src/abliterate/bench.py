"""The bench: a loaded model with everything that observes and scores it, and how it is set up and calibrated.

Owns stages 1 and 2 of the pipeline: prompts, load, batch size, response prefix, the one warm-up.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase

from abliterate import calibration, tuning
from abliterate.cache import from_bytes, to_bytes
from abliterate.errors import InputError
from abliterate.evaluation import Scorer, make_scorers
from abliterate.evaluation.prefix import prefix_responses
from abliterate.evaluation.reference import ReferenceEngine
from abliterate.evaluation.refusals import read_markers
from abliterate.evaluation.responses import ResponseReader
from abliterate.evaluation.selfcheck import Engine
from abliterate.export.adapter import peft_refusal
from abliterate.identity import prefix_key
from abliterate.inputs import Context, PromptSets
from abliterate.model import loader
from abliterate.model.architectures import Target, missing_components
from abliterate.model.chat import Chat
from abliterate.model.loader import LoadedModel
from abliterate.model.quantized import DEQUANTIZED, checkpoint_quantization
from abliterate.settings import Settings
from abliterate.settings_sources import config_path
from abliterate.types import BatchSizes, Prompt


@dataclass(frozen=True)
class Calibration:
    """Found once per run, and used again for the export's verification."""

    sizes: BatchSizes
    response_prefix: str


@dataclass(frozen=True)
class Bench:
    """A loaded model with everything that observes and scores it."""

    loaded: LoadedModel
    chat: Chat
    engine: Engine
    scorers: tuple[Scorer, ...]
    calibration: Calibration


def check_model(settings: Settings) -> None:
    """Raise InputError if the model can't be found, or can't be edited or exported as far as its config tells."""
    config = loader.load_config(loader.resolve_source(settings.model), settings.load)
    check_export(settings, config, loader.check_family(config, settings.load))


def check_export(settings: Settings, config: PretrainedConfig, targets: Collection[Target]) -> None:
    """InputError where the kind of export can't hold edits of these modules: said before a run, not after it."""
    dora = settings.edit.mode == "full" and settings.edit.representation == "exact"
    reason = peft_refusal(config, settings.load, targets, dora=dora) if settings.export.kind == "adapter" and targets else ""
    if reason:
        raise InputError(f"An adapter can't hold edits of this model ({reason}); choose --export merged, or none.")


def load_and_calibrate(context: Context, prompts: PromptSets) -> Bench:
    """Model and tokenizer; then the one warm-up, batch sizes and response prefix, unless they are known from before."""
    scorers = scorers_of(context.settings)
    loaded = load(context)
    with context.result.stage("calibrate"):
        sizes = tuning.batch_sizes(context, loaded, plain_engine(context, loaded), prompts)
        prefix = known_prefix(context, loaded, sizes, prompts)
    chat = Chat(loaded.tokenizer, loaded.device, prefix)
    return Bench(loaded, chat, make_engine(context, loaded.model, chat, sizes), scorers, Calibration(sizes, prefix))


def tune_only(context: Context, prompts: PromptSets) -> tuple[tuning.Tuned, ...]:
    """Load the model and measure batch sizes, whatever is known from before."""
    loaded = load(context)
    with context.result.stage("measure batch sizes"):
        return tuning.tune(context, loaded, plain_engine(context, loaded), prompts)


def load(context: Context) -> LoadedModel:
    """The model the settings name."""
    settings = context.settings
    device = loader.choose_device(settings.device)
    probe = Prompt("What is 1+1?", settings.prompts.system)

    def probe_inputs(tokenizer: PreTrainedTokenizerBase, at: torch.device) -> BatchEncoding:
        return Chat(tokenizer, at).encode([probe])

    with context.result.stage("load", loader.public_name(settings.model)):
        loaded = loader.load_model(settings.model, settings.load, device, probe_inputs, context.reporter.warn)
        describe(context, loaded, device)
    return loaded


def describe(context: Context, loaded: LoadedModel, device: torch.device) -> None:
    """Put the model into the result and before the person's eyes; say what is left out."""
    info = loaded.info
    name = loader.device_name(device)
    context.result.describe(info, name)
    context.reporter.header(
        {
            "model": f"{info.id} ({info.family}, {info.n_layers} layers × {info.d_model}, {info.n_parameters / 1e6:.1f} M)",
            "weights": f"{info.dtype}, {info.quantization}" if info.quantization != "none" else info.dtype,
            "device": name,
            "memory": loader.memory_text(device),
            "edits": f"{len(loaded.targets)} modules, {context.settings.edit.mode} ({context.settings.edit.representation})",
        }
    )
    if info.quantization.endswith(DEQUANTIZED) and not context.settings.load.dequantize:
        stored = checkpoint_quantization(info.quantization)
        context.reporter.note(
            f"the checkpoint is quantized ({stored}), which can't run here as it is; its weights were made dense"
        )
    if loaded.architecture.found_by == "structure":
        check_export(context.settings, loaded.model.config, loaded.targets)
        found = "; ".join(f"{component}: {', '.join(paths)}" for component, paths in loaded.architecture.components.items())
        context.reporter.note(
            f"the family isn't in the table; by what its layers do, these write to the residual stream: {found}"
        )
    for component, count in missing_components(loaded.targets, loaded.architecture, info.n_layers).items():
        context.reporter.warn(f"{count} of {info.n_layers} layers have no {component}; nothing is edited there.")


def scorers_of(settings: Settings) -> tuple[Scorer, ...]:
    """The scorers that the settings name, with their markers."""
    markers = read_markers(Path(settings.evaluation.markers or config_path("markers.txt")))
    efficient = settings.efficiency.use_efficient_refusal_detection
    return make_scorers(settings.evaluation.scorers, markers, efficient=efficient)


def make_engine(context: Context, model: Any, chat: Chat, sizes: BatchSizes) -> ReferenceEngine:
    """An engine for `model`, reading responses as the settings say."""
    response = context.settings.response
    reader = ResponseReader(chat.tokenizer, response.thinking_blocks)
    return ReferenceEngine(model, chat, reader, max_new_tokens=response.max_new_tokens, sizes=sizes, check=context.check)


def plain_engine(context: Context, loaded: LoadedModel) -> ReferenceEngine:
    """An engine for what is measured before a response prefix is known."""
    return make_engine(context, loaded.model, Chat(loaded.tokenizer, loaded.device), BatchSizes.same(1))


def known_prefix(context: Context, loaded: LoadedModel, sizes: BatchSizes, prompts: PromptSets) -> str:
    """The response prefix, from the cache where known; says what it is."""
    key = prefix_key(context.settings, loaded, prompts.all_sets())
    known = context.store.get("response-prefix", key)
    prefix = response_prefix(context, loaded, sizes, prompts) if known is None else from_bytes(known["prefix"])
    if known is None:
        context.store.put("response-prefix", key, {"prefix": to_bytes(prefix)}, f"{loaded.info.id}: {prefix!r}")
    if prefix:
        how = "" if known is None else " (from the cache)"
        context.reporter.note(f"response prefix: {prefix!r}{how}", response_prefix=prefix)
    return prefix


def response_prefix(context: Context, loaded: LoadedModel, sizes: BatchSizes, prompts: PromptSets) -> str:
    """As given, else what the responses to some prompts of both sets have in common."""
    response = context.settings.response
    if not response.detect_prefix:
        return response.prefix
    count = response.prefix_prompts
    some = (*prompts.harmful_eval[:count], *prompts.harmless_eval[:count])

    def respond(prefix: str) -> list[str]:
        engine = make_engine(context, loaded.model, Chat(loaded.tokenizer, loaded.device, prefix), sizes)
        return prefix_responses(engine, loaded.layers, context.settings.efficiency, some)

    found, notes = calibration.detect_prefix(respond, response.thinking_blocks)
    for note in notes:
        context.reporter.note(note)
    return found
