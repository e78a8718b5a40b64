"""Inspect a model without changing it: what can be edited, what a run needs and costs (`abliterate inspect`)."""

from __future__ import annotations

from typing import Any

import torch

from abliterate.artifacts.result import RunResult
from abliterate.errors import InputError
from abliterate.model import loader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.devices import choose_device
from abliterate.model.loader import LoadedModel
from abliterate.pipeline import batch_size
from abliterate.pipeline.context import Context, make_store, read_prompts
from abliterate.pipeline.from_settings import plain_engine
from abliterate.pipeline.requirements import Workload, requirements_of
from abliterate.pipeline.workbench import load
from abliterate.settings.schema import Settings
from abliterate.types import Reporter


def inspect_model(context: Context, *, weights: bool) -> dict[str, Any]:
    """The record of the model that the settings name (`requirements.requirements_of`); without `weights`, from its config alone."""
    settings, device = context.settings, choose_device(context.settings.device)
    speeds = None
    loaded: LoadedModel | loader.Skeleton | None
    if weights:
        loaded = load(context, None)
        chat = PromptEncoder(loaded.tokenizer, loaded.device)
    else:
        with context.result.stage("look at the config", loader.public_name(settings.model)):
            loaded = loader.skeleton(settings.model, settings.load, device, measure=True)
    assert loaded is not None
    try:
        if not weights:
            chat = PromptEncoder(loader.load_tokenizer(loaded.info.source, settings.load), torch.device("cpu"))
        prompts = read_prompts(context)
        work = Workload.of(prompts, chat)
        if isinstance(loaded, LoadedModel):
            with context.result.stage("measure speed"):
                speeds = batch_size.speeds_of(context, loaded, plain_engine(context, loaded), prompts)
    except InputError as error:  # a model can be looked at without prompts or a chat template
        work = Workload.usual(str(error))
    return requirements_of(settings, loaded, device, work, speeds)


def inspect(settings: Settings, reporter: Reporter, *, weights: bool) -> dict[str, Any]:
    """What there is to edit in the settings' model, what a run needs and costs (`requirements.requirements_of`); changes nothing."""
    context = Context(settings, reporter, RunResult(None, reporter), make_store(settings, reporter), lambda: None)
    return inspect_model(context, weights=weights)
