"""The bench: a loaded model with everything that observes and scores it, and how it is set up and calibrated.

Owns stages 1 and 2 of the pipeline: prompts, load, batch size, response prefix, the one warm-up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate import calibration
from abliterate.cache import ArtifactStore, from_bytes, to_bytes
from abliterate.evaluation import Scorer, make_scorers
from abliterate.evaluation.prefix import prefix_responses
from abliterate.evaluation.reference import ReferenceEngine
from abliterate.evaluation.refusals import read_markers
from abliterate.evaluation.responses import ResponseReader
from abliterate.evaluation.selfcheck import Engine
from abliterate.identity import calibration_key
from abliterate.model import loader
from abliterate.model.architectures import find_architecture, missing_components
from abliterate.model.chat import Chat
from abliterate.model.data import load_prompts
from abliterate.model.loader import DEMO, LoadedModel
from abliterate.results import RunResult
from abliterate.settings import Settings
from abliterate.settings_sources import config_path
from abliterate.types import Prompt, Reporter

HUB_PROMPTS = {
    "harmful": "mlabonne/harmful_behaviors:train[:400]:text",
    "harmless": "mlabonne/harmless_alpaca:train[:400]:text",
    "harmful_eval": "mlabonne/harmful_behaviors:test[:100]:text",
    "harmless_eval": "mlabonne/harmless_alpaca:test[:100]:text",
}
# Of a batch-size probe: enough that decoding counts as it does in a trial.
PROBE_TOKENS = 16
DEMO_PROMPTS = {
    "harmful": "harmful_train.jsonl",
    "harmless": "harmless_train.jsonl",
    "harmful_eval": "harmful_eval.jsonl",
    "harmless_eval": "harmless_eval.jsonl",
}


@dataclass(frozen=True)
class Context:
    """What every stage may use."""

    settings: Settings
    reporter: Reporter
    result: RunResult
    store: ArtifactStore
    check: Callable[[], None]


@dataclass(frozen=True)
class PromptSets:
    """The two sets for directions and the two for scores."""

    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    harmful_eval: tuple[Prompt, ...]
    harmless_eval: tuple[Prompt, ...]

    def all_sets(self) -> tuple[tuple[Prompt, ...], ...]:
        """The four sets in a fixed order."""
        return self.harmful, self.harmless, self.harmful_eval, self.harmless_eval


@dataclass(frozen=True)
class Calibration:
    """Found once per run, and used again for the export's verification."""

    batch_size: int
    response_prefix: str

    def tensors(self) -> dict[str, torch.Tensor]:
        """For the artifact store."""
        return {"batch_size": torch.tensor([self.batch_size]), "response_prefix": to_bytes(self.response_prefix)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Calibration:
        """Inverse of `tensors`."""
        return Calibration(int(tensors["batch_size"][0]), from_bytes(tensors["response_prefix"]))


@dataclass(frozen=True)
class Bench:
    """A loaded model with everything that observes and scores it."""

    loaded: LoadedModel
    chat: Chat
    engine: Engine
    scorers: tuple[Scorer, ...]
    calibration: Calibration


def check_model(settings: Settings) -> None:
    """Raise InputError if the model can't be found or its family isn't known; reads only its config."""
    config = loader.load_config(loader.resolve_source(settings.model), settings.load)
    find_architecture(config.get_text_config().model_type, settings.load.decoder_layers, settings.load.components)


def prompt_sources(settings: Settings) -> dict[str, str]:
    """{set: source}: as given, else the demo's own, else the field's public sets."""
    folder = loader.demo_path() / "prompts"
    demo = {name: str(folder / file) for name, file in DEMO_PROMPTS.items()}
    defaults = demo if settings.model == DEMO else HUB_PROMPTS
    return {name: getattr(settings.prompts, name) or default for name, default in defaults.items()}


def read_prompts(context: Context) -> PromptSets:
    """All four prompt sets; a prompt in both a direction set and a score set is worth a warning."""
    with context.result.stage("prompts"):
        sources = prompt_sources(context.settings)
        sets = PromptSets(**{name: load_prompts(source, context.settings.prompts) for name, source in sources.items()})
        context.result.prompts(sources, {name: getattr(sets, name) for name in sources})
        for name in ("harmful", "harmless"):
            shared = set(getattr(sets, name)) & set(getattr(sets, f"{name}_eval"))
            if shared:
                context.reporter.warn(
                    f"{len(shared)} of the {name} prompts are in both the direction set and the evaluation set, so scores "
                    "on them are optimistic."
                )
    return sets


def load_and_calibrate(context: Context, prompts: PromptSets) -> Bench:
    """Model and tokenizer; then the one warm-up, batch size and response prefix, unless they are known from before."""
    scorers = scorers_of(context.settings)
    loaded = load(context)
    with context.result.stage("calibrate"):
        key = calibration_key(context.settings, loaded, prompts.all_sets())
        known = context.store.get("calibration", key)
        found = calibrate(context, loaded, prompts) if known is None else Calibration.from_tensors(known)
        if known is None:
            context.store.put("calibration", key, found.tensors(), f"{loaded.info.id}: batch size {found.batch_size}")
        size, prefix = found.batch_size, found.response_prefix
        text = (
            f"batch size {size}" + (f", response prefix {prefix!r}" if prefix else "") + (", from the cache" if known else "")
        )
        context.reporter.note(text, batch_size=size, response_prefix=prefix)
    chat = Chat(loaded.tokenizer, loaded.device, prefix)
    return Bench(loaded, chat, make_engine(context, loaded.model, chat, size), scorers, found)


def calibrate(context: Context, loaded: LoadedModel, prompts: PromptSets) -> Calibration:
    """Measure the batch size and look for a response prefix."""
    chat = Chat(loaded.tokenizer, loaded.device)
    size = context.settings.evaluation.batch_size or tune_batches(context, loaded.model, chat, prompts).size
    return Calibration(size, response_prefix(context, loaded, size, prompts))


def tune_only(context: Context, prompts: PromptSets) -> calibration.BatchTuning:
    """Load the model and measure batch sizes."""
    loaded = load(context)
    with context.result.stage("measure batch sizes"):
        return tune_batches(context, loaded.model, Chat(loaded.tokenizer, loaded.device), prompts)


def load(context: Context) -> LoadedModel:
    """The model the settings name."""
    settings = context.settings
    device = loader.choose_device(settings.device)
    probe = Prompt("What is 1+1?", settings.prompts.system)

    def probe_inputs(tokenizer: PreTrainedTokenizerBase, at: torch.device) -> BatchEncoding:
        return Chat(tokenizer, at).encode([probe])

    with context.result.stage("load", settings.model):
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
    for component, count in missing_components(loaded.targets, loaded.architecture, info.n_layers).items():
        context.reporter.warn(f"{count} of {info.n_layers} layers have no {component}; nothing is edited there.")


def scorers_of(settings: Settings) -> tuple[Scorer, ...]:
    """The scorers that the settings name, with their markers."""
    markers = read_markers(Path(settings.evaluation.markers or config_path("markers.txt")))
    efficient = settings.efficiency.use_efficient_refusal_detection
    return make_scorers(settings.evaluation.scorers, markers, efficient=efficient)


def make_engine(context: Context, model: Any, chat: Chat, batch_size: int) -> ReferenceEngine:
    """An engine for `model`, reading responses as the settings say."""
    response = context.settings.response
    reader = ResponseReader(chat.tokenizer, response.thinking_blocks)
    return ReferenceEngine(
        model, chat, reader, max_new_tokens=response.max_new_tokens, batch_size=batch_size, check=context.check
    )


def tune_batches(context: Context, model: Any, chat: Chat, prompts: PromptSets) -> calibration.BatchTuning:
    """Short probes on the longest prompts, after one warm-up; the size divides the evaluation prompts evenly."""
    efficiency = context.settings.efficiency
    longest = sorted(prompts.harmful_eval, key=lambda prompt: -len(prompt.text))
    engine = make_engine(context, model, chat, batch_size=1)
    warm_up = calibration.WarmUp(lambda: engine.generate_ids(longest[:1], 2), once=efficiency.use_global_warmup)

    def probe(size: int) -> float | None:
        context.check()
        warm_up()
        rows = [longest[index % len(longest)] for index in range(size)]
        return calibration.timed_probe(lambda: engine.generate_ids(rows, PROBE_TOKENS), size, chat.device)

    binary = efficiency.use_binary_search_batch_tuning
    tune = calibration.tune_batch_size if binary else calibration.double_batch_size
    tuned = tune(probe, min(context.settings.evaluation.max_batch_size, len(longest)))
    return calibration.BatchTuning(calibration.even_size(tuned.size, len(longest)), tuned.probes)


def response_prefix(context: Context, loaded: LoadedModel, size: int, prompts: PromptSets) -> str:
    """As given, else what the responses to some prompts of both sets have in common."""
    response = context.settings.response
    if not response.detect_prefix:
        return response.prefix
    count = response.prefix_prompts
    some = (*prompts.harmful_eval[:count], *prompts.harmless_eval[:count])

    def respond(prefix: str) -> list[str]:
        engine = make_engine(context, loaded.model, Chat(loaded.tokenizer, loaded.device, prefix), size)
        return prefix_responses(engine, loaded.layers, context.settings.efficiency, some)

    found, notes = calibration.detect_prefix(respond, response.thinking_blocks)
    for note in notes:
        context.reporter.note(note)
    return found
