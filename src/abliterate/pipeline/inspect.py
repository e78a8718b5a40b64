"""Inspect a model without changing it: its editable modules, and a run's needs and cost (`abliterate inspect`)."""

from __future__ import annotations

from typing import Any

import torch

from abliterate.errors import InputError
from abliterate.model import loader
from abliterate.model.devices import choose_device
from abliterate.model.loader import LoadedModel
from abliterate.model.model_files import check_vocabulary, is_lone_config
from abliterate.pipeline.batch_size import speeds_of
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.from_settings import chat_of, plain_engine
from abliterate.pipeline.preflight import as_refinable, with_edit_mode
from abliterate.pipeline.requirements import Workload, requirements_of
from abliterate.pipeline.workbench import open_workbench
from abliterate.settings.schema import Settings
from abliterate.types import Reporter


def inspect(settings: Settings, reporter: Reporter, *, weights: bool) -> dict[str, Any]:
    """The record of the model that the settings name (`requirements_of`); without `weights`, from its config alone."""
    settings = as_refinable(with_edit_mode(settings, reporter.note), reporter.note)
    context, device = Context.of(settings, reporter), choose_device(settings.device)
    speeds = None
    loaded: LoadedModel | loader.Skeleton | None
    if weights:
        loaded = open_workbench(context).loaded
        chat = chat_of(settings, loaded.tokenizer, loaded.device)
    else:
        with context.stage("read the config", loader.public_name(settings.model)):
            loaded = loader.skeleton(settings.model, settings.load, device, measure=True)
    assert loaded is not None
    source, tokenizer = loaded.info.source, None
    if not weights and not is_lone_config(source):
        tokenizer = loader.load_tokenizer(source, settings.load)
        check_vocabulary(source, tokenizer, loaded.model.config)
    try:
        if not weights:
            if tokenizer is None:
                raise InputError("The directory holds a config without a tokenizer.")
            chat = chat_of(settings, tokenizer, torch.device("cpu"))
        prompts = read_prompts(context)
        work = Workload.of(prompts, chat)
        if isinstance(loaded, LoadedModel):
            with context.stage("measure speed"):
                speeds = speeds_of(context, loaded, plain_engine(context, loaded), prompts)
                speeds = speeds if all(speeds.values()) else None  # not one prompt fits, or none was timed
    except InputError as error:  # a model can be inspected without prompts or a chat template
        work = Workload.usual(str(error))
    return requirements_of(settings, loaded, device, work, speeds)
