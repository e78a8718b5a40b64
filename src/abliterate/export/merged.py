"""Merged export: a fresh load of the base in its stored dtype, every edited matrix replaced, saved as a plain model."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from abliterate.export.base import ExportJob, check_modules
from abliterate.export.companions import save_companions
from abliterate.model.architectures import find_targets
from abliterate.model.loader import load_config, load_weights
from abliterate.model.weights import dense_weight, write_weight


class Merged:
    """A model directory that loads with `transformers` alone."""

    kind = "merged"

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """See `Exporter.write`. The edit is computed in float32 on the stored (never quantized) weights."""
        plain = job.load.model_copy(update={"quantization": "none"})
        config = load_config(job.source, plain)
        dtype = stored_dtype(config)
        model = load_weights(job.source, plain, config, dtype, None)
        edit_weights(model, job)
        model.save_pretrained(folder, max_shard_size=job.export.max_shard_size)
        del model
        gc.collect()
        save_companions(job, folder)
        return {"dtype": str(dtype).removeprefix("torch."), "edited_modules": len(job.factors)}

    def load(self, folder: Path, job: ExportJob, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """See `Exporter.load`."""
        load = job.load.model_copy(update={"quantization": "none", "revision": ""})
        return load_weights(str(folder), load, load_config(str(folder), load), dtype, device)


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype the checkpoint was saved in, as its config says; float32 where it doesn't."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


@torch.no_grad()
def edit_weights(model: PreTrainedModel, job: ExportJob) -> None:
    """Replace the matrices named in `job.factors`; a name that the model doesn't have is an error, never skipped."""
    d_model = model.config.get_text_config().hidden_size
    targets = {target.name: target.module for target in find_targets(model, job.architecture, d_model)}
    check_modules(job, targets)
    for name, factors in job.factors.items():
        weight = dense_weight(targets[name]).float()
        write_weight(targets[name], weight + factors.to(weight.device).delta(weight))
