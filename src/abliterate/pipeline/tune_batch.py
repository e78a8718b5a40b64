"""Measure batch sizes for a model and its prompts, and keep them for later runs (`abliterate tune-batch`)."""

from __future__ import annotations

from abliterate.pipeline import batch_size
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.from_settings import plain_engine
from abliterate.pipeline.preflight import check_model, with_edit_mode
from abliterate.pipeline.workbench import open_workbench
from abliterate.settings.schema import Settings
from abliterate.types import Reporter


def tune(settings: Settings, reporter: Reporter) -> tuple[batch_size.Tuned, ...]:
    """Measure batch sizes for the settings' model and prompts, even if the cache has them."""
    settings = with_edit_mode(settings, reporter.note)
    context = Context.of(settings, reporter)
    check_model(settings, editing=False)
    prompts = read_prompts(context)
    loaded = open_workbench(context, prompts).loaded
    with context.stage("measure batch sizes"):
        return batch_size.tune(context, loaded, plain_engine(context, loaded), prompts)
