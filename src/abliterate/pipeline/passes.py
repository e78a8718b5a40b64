"""Make the forward and backward passes of refinement for a workbench's model."""

from __future__ import annotations

from functools import partial

import torch

from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import may_share
from abliterate.model.footprint import Shape, learning_bytes
from abliterate.model.memory import usable_on_all
from abliterate.pipeline.workbench import Workbench
from abliterate.refine.descent import Pass


def passes_of(bench: Workbench) -> Pass:
    """Passes over as many rows as memory allows; layers keep their activations only if they fit into half of it."""
    settings, info, device = bench.settings.refine, bench.loaded.info, bench.loaded.device
    longest = max(len(bench.chat.token_ids(prompt)) for prompt in (*bench.prompts.harmful, *bench.prompts.harmless))
    shape = Shape.of(bench.loaded.model.config.get_text_config(), getattr(torch, info.dtype))
    size, row_bytes = 2 * settings.batch, partial(learning_bytes, shape, longest + settings.tokens, settings.tokens)
    devices = {parameter.device for parameter in bench.loaded.model.parameters()}
    # Weights that are elsewhere until their layer needs them: kept activations would keep all of them on the device.
    are_fetched = any(one.type == "meta" for one in devices)
    checkpointing = are_fetched or 2 * size * row_bytes(checkpointing=False) > usable_on_all(devices, device)
    batches = Batches(size, device, row_bytes=row_bytes(checkpointing=checkpointing))
    return Pass(
        bench.loaded.model,
        bench.loaded.layers,
        bench.editor.hooks,
        device,
        batches,
        checkpointing=checkpointing,
        share=may_share(bench.engine),
        check=bench.context.check,
    )
