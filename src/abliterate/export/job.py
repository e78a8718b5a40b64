"""The seam for exporters: what each one is given (`ExportJob`), does (`Exporter`) and reads back (`Reread`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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

# Some rows of an exported W' (n, d_in), float64.
Rows = Callable[[slice], Tensor]


class Reread(Protocol):
    """An export's matrices. `dtype`: what they were rounded to when they were written."""

    dtype: torch.dtype

    def rows(self, target: Target, index: int, weight: Tensor) -> Rows:
        """W' of one matrix of a target as a function of the rows wanted, given the base's `weight` (d_out, d_in)."""

    def untouched(self) -> bool:
        """Whether whatever isn't edited is the base's."""


@dataclass(frozen=True)
class ExportJob:
    """One trial's edits, {module name: factors}, and where the base model comes from.

    `fingerprint`: of the base's content.
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

    def key(self, kind: str) -> str:
        """Equal for exports of `kind` whose files are equal; the card, which is written last, isn't looked at."""
        versions = f"{__version__} {transformers.__version__}"
        total = hashlib.sha256(f"{versions} {kind} {self.fingerprint} {self.load.revision}".encode())
        for name, factors in sorted(self.factors.items()):
            total.update(name.encode())
            for tensor in (factors.row_scale, factors.a, factors.b):
                total.update(b"-" if tensor is None else tensor.contiguous().numpy().tobytes())
        return total.hexdigest()


class Exporter(Protocol):
    """Writes one kind of export.

    An export has the edited weights themselves, rounded to the dtype of the base's files, unless its exporter says by a class
    attribute `stores_weights = False` that it keeps an edit's float32 factors: verification allows for no rounding then.
    """

    kind: str

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """Write into `folder`; returns what belongs into `result.json` about it.

        The folder exists, and is empty or holds what a killed export of an equal `ExportJob.key` left.
        """

    def load(self, folder: Path, job: ExportJob, device: Any, dtype: Any) -> Any:
        """The exported model from disk, as a user would load it."""

    def reread(self, folder: Path, job: ExportJob, base: Matrices) -> Reread:
        """What the files of an export say that its matrices are, given the base's; no model is run for that."""


def check_modules(job: ExportJob, modules: Collection[str]) -> None:
    """AbliterateError where the job edits a module that the model doesn't have: never skipped."""
    absent = sorted(set(job.factors) - set(modules))
    if absent:
        raise AbliterateError(f"The model has no module {absent[0]} to edit; was another model given than the run's?")
