"""What every exporter is given, the seam, and the promise that only finished exports carry the final name."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from abliterate import __version__
from abliterate.edits import Factors
from abliterate.errors import AbliterateError, InputError
from abliterate.model.architectures import Architecture
from abliterate.settings import ExportSettings, LoadSettings

# In every finished export: what holds it may be replaced by a later one, what doesn't is somebody else's.
MARKER = "abliterate.json"


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


def check_output(final: Path) -> None:
    """InputError where an export to `final` would replace what no export of ours has left there; changes nothing."""
    if not final.exists() or (final / MARKER).is_file() or (final.is_dir() and not any(final.iterdir())):
        return
    raise InputError(
        f"The path {final} exists and is no export of abliterate, so it is left alone; choose another --out, or move it away."
    )


@contextlib.contextmanager
def finished_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that takes its name on success and vanishes on failure; an old export stays until then.

    Raises:
        InputError: `final` is there and not ours. AbliterateError: the disk is full or refuses.
    """
    check_output(final)
    final = final.resolve()  # "." and ".." have no name to put anything beside
    # A new name of our own: nobody else's folder is ever written to or removed.
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        (partial / MARKER).write_text(json.dumps({"format": 1, "abliterate": __version__}) + "\n", encoding="utf-8")
        _rename(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise AbliterateError(_disk_sentence(final, error)) from error
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk as an error of its own, with the operating system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise AbliterateError(_disk_sentence(final, OSError(errno.ENOSPC, "No space left on device"))) from error
        raise


def _rename(partial: Path, final: Path) -> None:
    """Give `partial` the name `final`; an old export goes only once the new one has its name."""
    check_output(final)  # again: the export took its time
    if not final.exists():
        partial.rename(final)
        return
    # Not hidden: after a kill between the two renames this is the last whole export, and a person must find it.
    old = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:8]}")
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if not final.exists():
            old.rename(final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _disk_sentence(final: Path, error: OSError) -> str:
    return (
        f"The export to {final.name} could not be written ({error.strerror or error}); nothing half-written is left there: "
        "free some space and repeat the command (a run continues with --resume), or choose another --out."
    )
