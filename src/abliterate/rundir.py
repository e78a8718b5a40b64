"""The run directory: the names of what is in it, and atomic writes. Knows nothing of what the files mean."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.errors import AbliterateError, InputError
from abliterate.settings_sources import read_toml


class RunDirectory:
    """One study and its results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.toml"
        self.journal = path / "study.journal"
        self.study = path / "study.name"
        self.directions = path / "directions.safetensors"
        self.geometry = path / "geometry.json"
        self.answers = path / "answers.json"
        self.result = path / "result.json"
        self.report = path / "report.html"
        self.export = path / "model"
        # What `prepare` did, for `remove_if_empty` to undo.
        self._made = False
        self._moved: Path | None = None

    @property
    def holds_run(self) -> bool:
        """Whether a run has left its study here. Other files don't count: their names are everybody's."""
        return self.journal.exists() or self.study.exists()

    def check(self, *, resume: bool, restart: bool) -> None:
        """Raise InputError where `prepare` would; changes nothing.

        Raises:
            InputError: it holds another run and neither `resume` nor `restart` was said, or something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"The path {self.path} is a file; choose another --out.")
        if self.holds_run and not (resume or restart):
            raise InputError(
                f"The directory {self.path} already holds a run; continue it with --resume, start over with --restart "
                "(the old one is kept under another name), or choose another --out."
            )
        if not self.holds_run and self.path.is_dir() and any(self.path.iterdir()):
            raise InputError(f"The directory {self.path} is not empty and holds no run; choose another --out.")

    def prepare(self, *, resume: bool, restart: bool) -> None:
        """Make the directory ready: new, continued, or with the old run moved to another name beside it.

        Raises:
            InputError: as `check` says, or it can't be moved or made.
        """
        self.check(resume=resume, restart=restart)
        try:
            if restart and self.holds_run:
                self._moved = _free_name(self.path.absolute())
                self.path.rename(self._moved)
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"The directory {self.path} can't be made or moved: {error.strerror}; choose another --out."
            ) from error

    def remove_if_empty(self) -> None:
        """A run that failed before its first artifact leaves no directory of its own, and the old run where it was."""
        with contextlib.suppress(OSError):
            if self._made and not any(self.path.iterdir()):
                self.path.rmdir()
                if self._moved:
                    self._moved.rename(self.path)

    def study_name(self) -> str:
        """The name of the run's study in a database: made up once, so that no two runs ever share a study by accident."""
        if not self.study.exists():
            name = safe_name(str(self.path.absolute()))
            write_atomically(self.study, f"abliterate-{name}-{uuid.uuid4().hex[:12]}\n")
        return self.study.read_text(encoding="utf-8").strip()

    def read_result(self) -> dict[str, Any]:
        """The content of `result.json`; InputError where there is none or it doesn't parse."""
        try:
            record = json.loads(self.result.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"There is no run in {self.path}: it has no result.json.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"The file {self.result} can't be read: {error}; abliterate run --resume rebuilds it.") from error
        found = record.get("format") if isinstance(record, dict) else None
        if found != 1:
            raise InputError(f"The file {self.result} has format {found}, this version reads format 1.")
        return record


def default_path(model: str) -> Path:
    """`runs/<model>-<time>`, with nothing of the model's name that could leave that folder."""
    return Path("runs") / f"{safe_name(model)}-{time.strftime('%Y%m%d-%H%M%S')}"


def latest_run(model: str) -> Path | None:
    """The newest run directory of exactly that model under `runs/` with a default name, if any."""
    name = re.compile(re.escape(safe_name(model)) + r"-\d{8}-\d{6}")
    found = [path for path in Path("runs").glob("*") if name.fullmatch(path.name) and _model_of(path) == model]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _model_of(path: Path) -> str | None:
    """The model of the run in a directory; None where there is no run."""
    directory = RunDirectory(path)
    if not directory.holds_run:
        return None
    with contextlib.suppress(InputError):
        return str(read_toml(directory.settings).get("model"))
    return None


def safe_name(text: str) -> str:
    """A file name made of a model id or path: its last part, letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/\\]", text.rstrip("/\\"))[-1]).strip(".-")
    return name[:80] or "model"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name and rename, so that a reader sees the old content or the new.

    Raises:
        AbliterateError: the disk refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AbliterateError(
            f"The file {path} can't be written: {error.strerror}; free some space and repeat the command (a run continues "
            "with --resume)."
        ) from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """`record` as strict JSON (no NaN), atomically."""
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _free_name(path: Path) -> Path:
    for number in range(1, 10_000):
        candidate = path.with_name(f"{path.name}.old-{number}")
        if not candidate.exists():
            return candidate
    raise InputError(f"There are too many old runs beside {path}; delete some.")
