"""What every exporter is given, the seam, and the promise that only finished exports carry the final name."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from abliterate.edits import Factors
from abliterate.errors import AbliterateError
from abliterate.model.architectures import Architecture
from abliterate.settings import ExportSettings, LoadSettings


@dataclass(frozen=True)
class ExportJob:
    """One trial's edits, {module name: factors}, and where the base model comes from."""

    source: str
    load: LoadSettings
    export: ExportSettings
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase
    factors: Mapping[str, Factors]
    base_model: str
    card: str


class Exporter(Protocol):
    """Writes one kind of export."""

    kind: str

    def write(self, job: ExportJob, folder: Path) -> Mapping[str, Any]:
        """Write into `folder` (exists, empty); returns what belongs into `result.json` about it."""

    def load(self, folder: Path, job: ExportJob, device: Any, dtype: Any) -> Any:
        """The exported model from disk, as a user would load it."""


def check_modules(job: ExportJob, modules: Collection[str]) -> None:
    """AbliterateError where the job edits a module that the model doesn't have: never skipped."""
    absent = sorted(set(job.factors) - set(modules))
    if absent:
        raise AbliterateError(f"The model has no module {absent[0]} to edit; was another model given than the run's?")


@contextlib.contextmanager
def finished_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its name on success and vanishes on failure; an old `final` stays until then.

    Raises:
        AbliterateError: the disk is full or refuses.
    """
    partial, old = final.with_name(final.name + ".partial"), final.with_name(final.name + ".old")
    try:
        for leftover in (partial, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        yield partial
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AbliterateError(_disk_sentence(final, error)) from error
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the operating system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise AbliterateError(_disk_sentence(final, OSError(errno.ENOSPC, "No space left on device"))) from error
        raise


def _disk_sentence(final: Path, error: OSError) -> str:
    return (
        f"The export to {final.name} could not be written ({error.strerror or error}); nothing half-written is left there: "
        "free some space and run the same command with --resume, or choose another --out."
    )
