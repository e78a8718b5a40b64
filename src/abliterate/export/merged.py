"""Merged export: the base's own files with every edited matrix replaced, a plain model of its stored dtype.

The files are streamed where they hold the matrices under the model's names. Where `transformers` renames or converts
tensors as it loads them, or where weights aren't safetensors, the model is loaded and saved as a whole.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from abliterate.edits import Factors
from abliterate.export.base import ExportJob, check_modules, empty
from abliterate.export.companions import save_companions
from abliterate.export.shards import INDEX, SINGLE, EditTensor, Unfit, check_editable, check_room, copy_edited, shard_files
from abliterate.model.architectures import Target, find_targets
from abliterate.model.checkpoint import empty_model
from abliterate.model.loader import load_config, load_weights
from abliterate.model.weights import dense_weight, write_weight

# Entries of a matrix that are in memory in float32 at a time, several times over.
CHUNK = 1 << 18


class Merged:
    """A model directory that loads with `transformers` alone."""

    kind = "merged"

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """See `Exporter.write`. The edit is computed in float32 on the stored (never quantized) weights."""
        config = load_config(job.source, job.load)
        facts: dict[str, Any] = {"dtype": str(stored_dtype(config)).removeprefix("torch."), "edited_modules": len(job.factors)}
        try:
            stream(job, config, folder)
            facts["streamed"] = True
        except Unfit as reason:
            empty(folder)  # of what a killed export of another version streamed
            write_whole(job, config, folder)
            facts |= {"streamed": False, "reason": str(reason)}
        save_companions(job, folder)
        return facts

    def load(self, folder: Path, job: ExportJob, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """See `Exporter.load`."""
        load = job.load.model_copy(update={"quantization": "none", "revision": ""})
        return load_weights(str(folder), load, load_config(str(folder), load), dtype, device)


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype the checkpoint was saved in, as its config says; float32 where it doesn't."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def stream(job: ExportJob, config: PretrainedConfig, folder: Path) -> None:
    """Copy the checkpoint's files one after the other, editing matrices on the way.

    Raises:
        Unfit: it has to be loaded as a whole; nothing is written then.
    """
    targets = _targets(empty_model(config, job.load), job)
    edits: dict[str, EditTensor] = {
        f"{name}.weight": partial(edit_stored, factors=factors, transposed=isinstance(targets[name].module, Conv1D))
        for name, factors in job.factors.items()
    }
    base = checkpoint_folder(job)
    files = shard_files(base)
    check_editable(files, edits, stored_dtype(config))
    check_room(files, folder)
    for path in files:
        if not (folder / path.name).exists():  # else a killed export had finished it
            part = folder / f"{path.name}.part"
            copy_edited(path, part, edits)
            part.rename(folder / path.name)
    for name in ["config.json"] if files[0].name == SINGLE else ["config.json", INDEX]:
        shutil.copyfile(base / name, folder / name)
    if job.load.trust_remote_code:  # its config names them
        for code in base.glob("*.py"):
            shutil.copyfile(code, folder / code.name)


def edit_stored(stored: Tensor, factors: Factors, *, transposed: bool) -> None:
    """W' in the place of W, in float32 by chunks of rows; `transposed`: stored as (d_in, d_out)."""
    weight = stored.T if transposed else stored
    step = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        scale = None if factors.row_scale is None else factors.row_scale[rows]
        old = weight[rows].float()
        weight[rows] = (old + Factors(scale, factors.a, factors.b[rows]).delta(old)).to(weight.dtype)


def checkpoint_folder(job: ExportJob) -> Path:
    """The directory with the base's files: given, or the Hub's snapshot on this disk."""
    source = Path(job.source)
    if source.is_dir():
        return source
    revision = {"revision": job.load.revision} if job.load.revision else {}
    found = cached_file(job.source, "config.json", **revision)
    if found is None:
        raise Unfit("its files aren't on this disk")
    return Path(found).parent


def write_whole(job: ExportJob, config: PretrainedConfig, folder: Path) -> None:
    """A fresh load of the base in its stored dtype, edited and saved."""
    plain = job.load.model_copy(update={"quantization": "none"})
    model = load_weights(job.source, plain, config, stored_dtype(config), None)
    edit_weights(model, job)
    model.save_pretrained(folder, max_shard_size=job.export.max_shard_size)
    del model
    gc.collect()


@torch.no_grad()
def edit_weights(model: PreTrainedModel, job: ExportJob) -> None:
    """Replace the matrices named in `job.factors`."""
    targets = _targets(model, job)
    for name, factors in job.factors.items():
        weight = dense_weight(targets[name].module).float()
        write_weight(targets[name].module, weight + factors.to(weight.device).delta(weight))


def _targets(model: PreTrainedModel, job: ExportJob) -> dict[str, Target]:
    """By name; a name in `job.factors` that the model doesn't have is an error, never skipped."""
    d_model = model.config.get_text_config().hidden_size
    targets = {target.name: target for target in find_targets(model, job.architecture, d_model)}
    check_modules(job, targets)
    return targets
