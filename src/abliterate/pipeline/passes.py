"""Make the forward and backward passes of refinement for a workbench's model."""

from __future__ import annotations

import torch

from abliterate.engine.batching import Batches
from abliterate.evaluation.teacher_forced import may_share
from abliterate.model.memory import usable_memory
from abliterate.pipeline.workbench import Workbench
from abliterate.refine.descent import Pass

# Values that a decoder layer keeps for its backward pass, per token and d_model: attention's and the MLP's inputs and outputs.
_KEPT = 40


def passes_of(bench: Workbench) -> Pass:
    """Passes over as many rows as memory allows; layers keep their activations only if they fit into half of it."""
    settings, info, device = bench.settings.refine, bench.loaded.info, bench.loaded.device
    longest = max(len(bench.chat.token_ids(prompt)) for prompt in (*bench.prompts.harmful, *bench.prompts.harmless))
    values = (longest + settings.tokens) * info.d_model
    logits = 4 * 4 * settings.tokens * bench.loaded.model.config.get_text_config().vocab_size
    itemsize = getattr(torch, info.dtype).itemsize
    all_kept = itemsize * values * info.n_layers * _KEPT + logits
    size = 2 * settings.batch
    checkpointing = 2 * size * all_kept > usable_memory(device)
    row_bytes = itemsize * values * (info.n_layers + _KEPT) + logits if checkpointing else all_kept
    batches = Batches(size, device, row_bytes=row_bytes)
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
