"""The workbench: a loaded model with its prompts, engines and scorers, ready to be measured under edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from abliterate.engine.self_check import Engine
from abliterate.model import loader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.devices import choose_device
from abliterate.model.loader import LoadedModel
from abliterate.objectives import DEFAULT
from abliterate.pipeline import batch_size
from abliterate.pipeline.cache_keys import rendering
from abliterate.pipeline.calibrate import known_prefix
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import chat_of, make_engine, objectives_of, plain_engine, scorers_of
from abliterate.pipeline.preflight import check_loaded
from abliterate.pipeline.requirements import describe
from abliterate.prompts.sets import PromptSets
from abliterate.scorers import Scorer
from abliterate.types import BatchSizes, Objective, Prompt


@dataclass(frozen=True)
class Calibration:
    """Found once per run, and used again for the export's verification."""

    sizes: BatchSizes
    response_prefix: str


@dataclass(frozen=True)
class Workbench:
    """A loaded model with everything that observes and scores it."""

    loaded: LoadedModel
    chat: PromptEncoder
    engine: Engine
    scorers: tuple[Scorer, ...]
    calibration: Calibration
    objectives: tuple[Objective, ...] = DEFAULT


def load_and_calibrate(
    context: Context, prompts: PromptSets, prefix: str | None = None, sizes_by_name: Mapping[str, int] | None = None
) -> Workbench:
    """Model and tokenizer; then the one warm-up, batch sizes and response prefix, unless they are known from before.

    `prefix`: the response prefix that a run has told its workers, or a recipe tells; `sizes_by_name`: its batch sizes.
    """
    scorers = scorers_of(context.settings)
    objectives = objectives_of(context.settings, scorers)
    loaded = load(context, prompts)
    check_loaded(context, loaded)
    with context.result.stage("calibrate"):
        sizes = batch_size.batch_sizes(context, loaded, plain_engine(context, loaded), prompts, sizes_by_name)
        if prefix is None:
            prefix = known_prefix(context, loaded, sizes, prompts)
        context.result.record |= {"response_prefix": prefix, "rendering": rendering(context.settings, loaded)}
    chat = chat_of(context.settings, loaded.tokenizer, loaded.device, prefix)
    for note in dict.fromkeys(chat.form(prompt).note for part in prompts.all_sets() for prompt in part):
        if note:
            context.reporter.note(note)
    engine = make_engine(context, loaded.model, chat, sizes)
    return Workbench(loaded, chat, engine, scorers, Calibration(sizes, prefix), objectives)


def tune_only(context: Context, prompts: PromptSets) -> tuple[batch_size.Tuned, ...]:
    """Load the model and measure batch sizes, whatever is known from before."""
    loaded = load(context, prompts)
    with context.result.stage("measure batch sizes"):
        return batch_size.tune(context, loaded, plain_engine(context, loaded), prompts)


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
