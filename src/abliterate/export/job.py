"""The seam for exporters: what each one is given (`ExportJob`), does (`Exporter`) and reads back (`Reread`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from abliterate._version import __version__
from abliterate.edits import Factors
from abliterate.errors import AbliterateError
from abliterate.export.base_weights import Matrices
from abliterate.model.architectures import Architecture, Target
from abliterate.settings.schema import ExportSettings, LoadSettings

# Rows of an exported W' (n, d_in) in float64, given their slice.
Rows = Callable[[slice], Tensor]


@dataclass(frozen=True)
class ExportJob:
    """One trial's edits, {module name: factors}, and where the base model comes from.

    `fingerprint` identifies the base's content. `tokenizer` is the one that trials used, with settings of its own for running;
    exports get the base's files instead. `refined`: of a refined trial the file of its directions, which its recipe carries.
    """

    source: str
    fingerprint: str
    load: LoadSettings
    export: ExportSettings
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    factors: Mapping[str, Factors]
    base_model: str
    card: str
    refined: bytes = b""

    def key(self, kind: str) -> str:
        """A hash that is equal for exports of `kind` with equal files; the card, which is written last, does not count."""
        versions = f"{__version__} {transformers.__version__}"
        made_of = f"{self.fingerprint} {self.load.revision} {self.load.chat_template}"
        digest = hashlib.sha256(f"{versions} {kind} {made_of}".encode())
        for name, factors in sorted(self.factors.items()):
            digest.update(name.encode())
            for tensor in (factors.row_scale, factors.a, factors.b, factors.column_scale):
                digest.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class Reread(Protocol):
    """The matrices of an export, read back from its files. `dtype`: the format that they were rounded to when written.

    Inherit from this class to get the methods that have a default.
    """

    dtype: torch.dtype

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        """Rows of W' of one matrix of a target, given the base's `weight` (d_out, d_in)."""

    def untouched(self) -> bool:
        """Whether everything that isn't edited is the base's, files beside the weights included.

        Two attributes for the export's card may be left out: `differing`, the names of tensors and files that aren't the
        base's, and `loaded_in`, the dtype that tensors were compared in if they aren't compared as they are stored.
        """

    def largest_error(self, target: Target) -> Callable[[Tensor], Tensor]:
        """A function of rows of W' (n, d_in) in float64 that gives the largest rounding error of each entry (n, d_in).

        By default that is half a step of `dtype`. Storages whose rounding `dtype` doesn't describe have their own.
        """
        return partial(half_step, dtype=self.dtype)


def half_step(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbouring numbers of a dtype, at each entry."""
    info = torch.finfo(dtype)
    return info.eps / 2 * rows.abs() + info.smallest_normal * info.eps


class Exporter(Protocol):
    """Writes one kind of export.

    An export has the edited weights themselves, rounded to the dtype of the base's files, unless its exporter says by a class
    attribute `stores_weights = False` that it keeps an edit's float32 factors: verification allows for no rounding then.
    """

    kind: str

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """Write into `folder`; returns the facts about the export for `result.json`.

        The folder exists. It is empty, or holds the files that a killed export with an equal `ExportJob.key` had finished.
        """

    def load(self, folder: Path, job: ExportJob, device: Any, dtype: Any) -> Any:
        """The exported model from disk, as a user would load it."""

    def reread(self, folder: Path, job: ExportJob, base: Matrices) -> Reread:
        """The matrices of an export as its files have them, given the base's; no model is run for that."""


def check_modules(job: ExportJob, modules: Collection[str]) -> None:
    """AbliterateError if the job edits a module that the model doesn't have; such a module is never skipped."""
    absent = sorted(set(job.factors) - set(modules))
    if absent:
        raise AbliterateError(f"The model has no module {absent[0]} to edit; check that it is the model of the run.")
