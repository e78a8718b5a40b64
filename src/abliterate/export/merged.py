"""Export a merged model: the base's own files with every edited matrix replaced, in the dtype that they are stored in.

The files are streamed if they hold the matrices under the model's names. If `transformers` converts tensors as it loads them,
or if they aren't stored in the dtype that the config names, the model is loaded and saved as a whole; what its class doesn't
load is carried over from the base's files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from abliterate.edits import Factors
from abliterate.export.base_weights import Matrices, config_file
from abliterate.export.card import missing_section
from abliterate.export.check_weights import RereadMerged
from abliterate.export.companions import save_companions
from abliterate.export.folder import empty
from abliterate.export.job import ExportJob, Reread, check_modules
from abliterate.export.safetensors_copy import INDEX, SINGLE, EditTensor, check_room, copy_edited, missing_bytes
from abliterate.export.unloaded import carry_over, dense_config, find_unloaded
from abliterate.model.checkpoint import dense_load, load_weights
from abliterate.model.loader import load_config
from abliterate.model.weights import dense_weight

# The number of entries of a matrix that are in memory in float32 at a time, in several copies.
CHUNK = 1 << 18


class Merged:
    """The exporter of a model directory that loads with `transformers` alone."""

    kind = "merged"

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """Write the model. The edit is computed in float32 on the stored weights; quantized weights are made dense first."""
        matrices = Matrices(job.source, job.load, job.architecture)
        check_modules(job, matrices.targets)
        missing: tuple[str, ...] = ()
        facts: dict[str, Any] = {"dtype": str(matrices.dtype).removeprefix("torch."), "edited_modules": len(job.factors)}
        if matrices.whole is None:
            stream(job, matrices, folder, self._chunk)
            facts["streamed"] = True
        else:
            missing = self._save_whole(job, matrices, matrices.whole, folder)
            facts |= {"streamed": False, "reason": matrices.reason} | ({"missing": list(missing)} if missing else {})
        if matrices.dequantized:
            facts["dequantized"] = matrices.dequantized
        save_companions(job, folder)
        if missing:
            with (folder / "README.md").open("a", encoding="utf-8") as card:
                card.write(missing_section(missing))
        return facts

    def _save_whole(self, job: ExportJob, matrices: Matrices, model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
        """Save the model that was loaded as a whole, edited; returns the names of the base's tensors that aren't in it."""
        empty(folder)  # a killed export of another version may have streamed files into it
        check_room(sum(parameter.nbytes for parameter in model.parameters()), folder)
        edit_weights(matrices, job, self._chunk)
        # The base's own is copied later. Saving refuses some that models ship, such as a temperature without sampling.
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder, max_shard_size=job.export.max_shard_size)
        (folder / "generation_config.json").unlink(missing_ok=True)
        unloaded = find_unloaded(job.source, matrices.load, matrices.config)
        carry_over(folder, unloaded)
        # The base's, because every version of transformers writes configs in a form that older ones misread.
        (folder / "config.json").write_bytes(dense_config(config_file(job.source, job.load).read_bytes()))
        return unloaded.missing

    def load(self, folder: Path, job: ExportJob, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        load = dense_load(job.load).model_copy(update={"revision": ""})
        return load_weights(str(folder), load, load_config(str(folder), load), dtype, device)

    def reread(self, folder: Path, job: ExportJob, base: Matrices) -> Reread:
        return RereadMerged(folder, job, base)


def stream(job: ExportJob, matrices: Matrices, folder: Path, chunk: int) -> None:
    """Copy the checkpoint's files one after the other and edit matrices on the way."""
    edits: dict[str, EditTensor] = {}
    for name, factors in job.factors.items():
        for place, single in zip(matrices.places[name], factors.parts(), strict=True):
            if place.in_stack:
                edits[place.tensor] = partial(edit_stack, factors=factors, transposed=place.transposed, chunk=chunk)
            else:
                edits[place.tensor] = partial(edit_stored, factors=single, transposed=place.transposed, chunk=chunk)
    files, base = matrices.files, matrices.files[0].parent
    check_room(missing_bytes(files, folder), folder)
    for path in files:
        if not (folder / path.name).exists():  # otherwise a killed export had finished this file
            unfinished = folder / f"{path.name}.part"
            copy_edited(path, unfinished, edits)
            unfinished.rename(folder / path.name)
    for name in ["config.json"] if files[0].name == SINGLE else ["config.json", INDEX]:
        shutil.copyfile(base / name, folder / name)


def edit_stored(stored: Tensor, factors: Factors, *, transposed: bool, chunk: int) -> None:
    """Replace W by W', in float32 and by rows of about `chunk` entries; `transposed`: W is stored as (d_in, d_out)."""
    weight = stored.T if transposed else stored
    step = max(1, chunk // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        weight[rows] = edited_rows(weight[rows].float(), factors, rows).to(weight.dtype)


def edited_rows(old: Tensor, factors: Factors, rows: slice) -> Tensor:
    """The rows of W' (n, d_in) in float32; `old` are these rows of W, in float32."""
    scale = None if factors.row_scale is None else factors.row_scale[rows]
    return old + Factors(scale, factors.a, factors.b[rows], factors.column_scale).delta(old)


def edit_stack(stored: Tensor, factors: Factors, *, transposed: bool, chunk: int) -> None:
    """Replace each matrix of fused experts as `edit_stored` does."""
    for expert, expert_factors in zip(stored, factors.parts(), strict=True):
        edit_stored(expert, expert_factors, transposed=transposed, chunk=chunk)


@torch.no_grad()
def edit_weights(matrices: Matrices, job: ExportJob, chunk: int) -> None:
    """Replace the matrices that `job.factors` names in the model that was loaded as a whole."""
    for name, factors in job.factors.items():
        weight = dense_weight(matrices.targets[name].module)
        edit = edit_stack if weight.ndim == 3 else edit_stored
        edit(weight, factors, transposed=False, chunk=chunk)
