"""The bench: a loaded model with everything that observes and scores it, and how it is set up and calibrated.

Owns stages 1 and 2 of the pipeline: prompts, load, batch size, response prefix, the one warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate import calibration, tuning
from abliterate.cache import from_bytes, to_bytes
from abliterate.errors import InputError
from abliterate.evaluation import Scorer, make_objectives, make_scorers
from abliterate.evaluation.prefix import prefix_responses
from abliterate.evaluation.reference import ReferenceEngine
from abliterate.evaluation.refusals import read_markers
from abliterate.evaluation.responses import ResponseReader
from abliterate.evaluation.selfcheck import Engine
from abliterate.identity import prefix_key, rendering
from abliterate.inputs import Context, PromptSets, read_prompts
from abliterate.inspection import Workload, check_loaded, describe, inspect
from abliterate.model import loader
from abliterate.model.chat import Chat
from abliterate.model.devices import choose_device
from abliterate.model.loader import LoadedModel
from abliterate.model.markup import Markup
from abliterate.objectives import DEFAULT
from abliterate.settings import Settings
from abliterate.settings_sources import config_path
from abliterate.types import BatchSizes, Objective, Prompt


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
    objectives: tuple[Objective, ...] = DEFAULT


def load_and_calibrate(
    context: Context, prompts: PromptSets, prefix: str | None = None, sizes_by_name: Mapping[str, int] | None = None
) -> Bench:
    """Model and tokenizer; then the one warm-up, batch sizes and response prefix, unless they are known from before.

    `prefix`: the response prefix that a run has told its workers, or a recipe tells; `sizes_by_name`: its batch sizes.
    """
    scorers = scorers_of(context.settings)
    objectives = objectives_of(context.settings, scorers)
    loaded = load(context, prompts)
    check_loaded(context, loaded)
    with context.result.stage("calibrate"):
        sizes = tuning.batch_sizes(context, loaded, plain_engine(context, loaded), prompts, sizes_by_name)
        if prefix is None:
            prefix = known_prefix(context, loaded, sizes, prompts)
        context.result.record |= {"response_prefix": prefix, "rendering": rendering(context.settings, loaded)}
    chat = chat_of(context.settings, loaded.tokenizer, loaded.device, prefix)
    for note in dict.fromkeys(chat.form(prompt).note for part in prompts.all_sets() for prompt in part):
        if note:
            context.reporter.note(note)
    engine = make_engine(context, loaded.model, chat, sizes)
    return Bench(loaded, chat, engine, scorers, Calibration(sizes, prefix), objectives)


def tune_only(context: Context, prompts: PromptSets) -> tuple[tuning.Tuned, ...]:
    """Load the model and measure batch sizes, whatever is known from before."""
    loaded = load(context, prompts)
    with context.result.stage("measure batch sizes"):
        return tuning.tune(context, loaded, plain_engine(context, loaded), prompts)


def inspect_model(context: Context, *, weights: bool) -> dict[str, Any]:
    """The record of the model that the settings name (`inspection.inspect`); without `weights`, from its config alone."""
    settings, device = context.settings, choose_device(context.settings.device)
    speeds = None
    loaded: LoadedModel | loader.Skeleton | None
    if weights:
        loaded = load(context, None)
        chat = Chat(loaded.tokenizer, loaded.device)
    else:
        with context.result.stage("look at the config", loader.public_name(settings.model)):
            loaded = loader.skeleton(settings.model, settings.load, device, measure=True)
    assert loaded is not None
    try:
        if not weights:
            chat = Chat(loader.load_tokenizer(loaded.info.source, settings.load), torch.device("cpu"))
        prompts = read_prompts(context)
        work = Workload.of(prompts, chat)
        if isinstance(loaded, LoadedModel):
            with context.result.stage("measure speed"):
                speeds = tuning.speeds_of(context, loaded, plain_engine(context, loaded), prompts)
    except InputError as error:  # a model can be looked at without prompts or a chat template
        work = Workload.usual(str(error))
    return inspect(settings, loaded, device, work, speeds)


def load(context: Context, prompts: PromptSets | None) -> LoadedModel:
    """The model the settings name; described as what works through `prompts`, where these are known."""
    settings = context.settings
    device = choose_device(settings.device)
    probe = Prompt("What is 1+1?", settings.prompts.system)

    def probe_inputs(tokenizer: PreTrainedTokenizerBase, at: torch.device) -> BatchEncoding:
        return chat_of(settings, tokenizer, at).encode([probe])

    with context.result.stage("load", loader.public_name(settings.model)):
        loaded = loader.load_model(settings.model, settings.load, device, probe_inputs, context.reporter.warn)
        if prompts is not None:
            describe(context, loaded, device, prompts)
    return loaded


def scorers_of(settings: Settings, *, heldout: bool = False) -> tuple[Scorer, ...]:
    """The scorers that the settings name, with their markers; `heldout`: those for held-out prompts only, too."""
    markers = read_markers(Path(settings.evaluation.markers or config_path("markers.txt")))
    efficient = settings.efficiency.use_efficient_refusal_detection
    names = settings.scorers + (settings.evaluation.heldout_scorers if heldout else ())
    return make_scorers(names, markers, efficient=efficient, settings=settings.evaluation)


def objectives_of(settings: Settings, scorers: Sequence[Scorer]) -> tuple[Objective, ...]:
    """What the settings search for; `scorers`: as `scorers_of` gives them."""
    return make_objectives(settings.search.objectives, settings.scorers, scorers)


def chat_of(settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device, prefix: str = "") -> Chat:
    """A chat with the template options of the settings."""
    return Chat(tokenizer, device, prefix, settings.load.template_options)


def markup_of(settings: Settings) -> Markup:
    """The markup in responses that the settings name."""
    return Markup(settings.response.thinking_blocks, settings.response.answer_tags)


def make_engine(context: Context, model: Any, chat: Chat, sizes: BatchSizes) -> ReferenceEngine:
    """An engine for `model`, reading responses as the settings say."""
    response = context.settings.response
    reader = ResponseReader(chat.tokenizer, markup_of(context.settings))
    return ReferenceEngine(model, chat, reader, max_new_tokens=response.max_new_tokens, sizes=sizes, check=context.check)


def plain_engine(context: Context, loaded: LoadedModel) -> ReferenceEngine:
    """An engine for what is measured before a response prefix is known."""
    chat = chat_of(context.settings, loaded.tokenizer, loaded.device)
    return make_engine(context, loaded.model, chat, BatchSizes.same(1))


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

    def chat(prefix: str = "") -> Chat:
        return chat_of(context.settings, loaded.tokenizer, loaded.device, prefix)

    def respond(prefix: str) -> list[str]:
        engine = make_engine(context, loaded.model, chat(prefix), sizes)
        return prefix_responses(engine, loaded.layers, context.settings.efficiency, some)

    plain = chat()
    tails = [plain.tail(prompt) for prompt in some]
    skip = response.thinking == "skip"
    found, notes = calibration.detect_prefix(respond, markup_of(context.settings), tails, skip=skip)
    if notes and (switches := [name for name in plain.template.options if "think" in name or "reason" in name]):
        notes.append(f"the chat template itself has {', '.join(switches)} (load.template_options)")
    for note in notes:
        context.reporter.note(note)
    return found
