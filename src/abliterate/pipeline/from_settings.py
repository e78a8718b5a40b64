"""Build the objects that the settings alone decide: scorers, objectives, the prompt encoder, and engines for a model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from abliterate.directions import count_of, direction_method
from abliterate.edits import edit_method, parameters_of
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.responses import ResponseReader
from abliterate.model.chat_template import PromptEncoder, source_of, writes_date
from abliterate.model.loader import LoadedModel
from abliterate.model.thinking import Markup, shown_blocks
from abliterate.pipeline.context import Context
from abliterate.scorers import Scorer, make_objectives, make_scorers
from abliterate.scorers.refusals import read_markers
from abliterate.settings.schema import ResponseSettings, Settings
from abliterate.settings.sources import config_path
from abliterate.types import BatchSizes, Objective, Range, weight_name


def scorers_of(settings: Settings, *, heldout: bool = False) -> tuple[Scorer, ...]:
    """The scorers that the settings name, with their markers; with `heldout` also the scorers for held-out prompts only."""
    markers = read_markers(Path(settings.evaluation.markers or config_path("markers.txt")))
    efficient = settings.efficiency.use_efficient_refusal_detection
    names = settings.scorers + (settings.evaluation.heldout_scorers if heldout else ())
    return make_scorers(names, markers, efficient=efficient, settings=settings.evaluation)


def objectives_of(settings: Settings, scorers: Sequence[Scorer]) -> tuple[Objective, ...]:
    """The objectives that the settings name; `scorers` come from `scorers_of`."""
    return make_objectives(settings.search.objectives, settings.scorers, scorers)


def direction_count(settings: Settings) -> int:
    """The number of directions of a layer. InputError: the settings ask a method for more of them than it finds."""
    return count_of(direction_method(settings.directions.method), settings.directions.count)


def asked_for(settings: Settings) -> dict[str, Range]:
    """The ranges of the numbers that the settings' direction and edit method ask the search for, by name.

    Of several directions a layer, each has a weight, by which the coeff is multiplied.
    """
    count = direction_count(settings)
    weights = {weight_name(place): Range(0.0, 1.0) for place in range(count if count > 1 else 0)}
    return {**weights, **parameters_of(edit_method(settings.edit.mode))}


def chat_of(settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device, prefix: str = "") -> PromptEncoder:
    """A prompt encoder with the template options and the moment of the settings."""
    load = settings.load
    now = datetime.fromisoformat(load.template_now) if load.template_now else None
    return PromptEncoder(tokenizer, device, prefix, load.template_options, now)


def at_a_moment(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Settings:
    """The settings with a moment for a template that writes the date, so that all prompts are rendered at the same one."""
    if settings.load.template_now or not writes_date(tokenizer):
        return settings
    now = datetime.now().isoformat(timespec="seconds")
    return settings.model_copy(update={"load": settings.load.model_copy(update={"template_now": now})})


def markup_of(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Markup:
    """The markup in responses: that of the settings, and with the default settings also the tags that the model itself shows.

    A template that takes closing tags out of earlier answers is made for a model that may close a block nobody opened.
    """
    blocks, template = settings.response.thinking_blocks, source_of(tokenizer)
    if blocks == ResponseSettings().thinking_blocks:
        known = {opening for opening, _ in blocks}
        shown = shown_blocks((template, *tokenizer.get_added_vocab()))
        blocks = (*blocks, *(pair for pair in shown if pair[0] not in known))
    closings = [block.closing for block in Markup(blocks).blocks if block.nests]
    unopened = dict.fromkeys(closing for closing in closings if closing in template)
    return Markup(blocks, settings.response.answer_tags, unopened)


def make_engine(context: Context, model: Any, chat: PromptEncoder, sizes: BatchSizes) -> ReferenceEngine:
    """A plain engine for `model` that reads responses as the settings say."""
    response = context.settings.response
    reader = ResponseReader(chat.tokenizer, markup_of(context.settings, chat.tokenizer))
    return ReferenceEngine(model, chat, reader, max_new_tokens=response.max_new_tokens, sizes=sizes, check=context.check)


def plain_engine(context: Context, loaded: LoadedModel) -> ReferenceEngine:
    """A plain engine for measurements that come before the response prefix is known."""
    chat = chat_of(context.settings, loaded.tokenizer, loaded.device)
    return make_engine(context, loaded.model, chat, BatchSizes.same(1))
