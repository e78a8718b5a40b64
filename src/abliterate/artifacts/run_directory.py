"""The run directory: the names of its files, and the lock of the run that works there."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from abliterate.artifacts.runs import JOURNAL, RESULT, RUNS, SETTINGS, STUDY, holds_run
from abliterate.errors import NO_ROOM, AbliterateError, InputError, as_command, disk_remedy
from abliterate.files import drop_lock, is_locked, read_toml, safe_name, take_lock, write_atomically
from abliterate.settings import untrusted
from abliterate.types import REFINED

# A run that works in a directory holds this lock file; the kernel releases it however the process ends.
LOCK = ".lock"

_TEMPORARY = re.compile(
    r"\.(settings\.toml|study\.name|directions\.safetensors|(result|geometry|answers|recipe)\.json|report\.html)\.[0-9a-f]+\.tmp"
)

_TEMPORARY_REFINED = re.compile(r"\.\d+\.safetensors\.[0-9a-f]+\.tmp")

_STUDY_NAME = re.compile(r"abliterate-[A-Za-z0-9._-]+-[0-9a-f]{12}")


class RunDirectory:
    """The directory of one study and its results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / SETTINGS
        self.journal = path / JOURNAL
        self.study = path / STUDY
        self.directions = path / "directions.safetensors"
        self.refined = path / REFINED
        self.geometry = path / "geometry.json"
        self.answers = path / "answers.json"
        self.result = path / RESULT
        self.report = path / "report.html"
        self.recipe = path / "recipe.json"
        self.export = path / "model"
        # The actions of `prepare` that `remove_if_empty` undoes.
        self._made = False
        self._moved: Path | None = None
        # The held lock, if any; `locked` owns it.
        self._locking = False
        self._lock: IO[bytes] | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While active, no other run works here: from now on if the directory holds a run, else from `prepare` on.

        Raises:
            InputError: another run works here.
        """
        self._locking = True
        try:
            if self.holds_run:
                self._take_lock()
            yield
        finally:
            self._locking = False
            self._drop_lock(self.path)

    @property
    def holds_run(self) -> bool:
        """Whether a run has left its study here."""
        return holds_run(self.path)

    @property
    def _lacks_study(self) -> bool:
        """Whether what else a run leaves is here, but not its study."""
        return not self.holds_run and self.settings.is_file() and self.result.is_file()

    @property
    def at_work(self) -> bool:
        """Whether a run works here now, in this process or another; a worker alone doesn't count."""
        return is_locked(self.path / LOCK)

    def stored_settings(self) -> dict[str, Any]:
        """The settings that the run wrote. InputError: the file can't be read, or isn't what a run writes."""
        stored = read_toml(self.settings)
        edit = stored.get("edit")
        wanting = [] if isinstance(stored.get("model"), str) and stored["model"] else ["model"]
        if not isinstance(edit, dict) or edit.get("mode", "auto") == "auto":  # a run writes the mode that was found
            wanting.append("edit mode")
        if wanting:
            what = f"names no {' and no '.join(wanting)}" if stored else "is empty"
            raise InputError(
                f"The file {self.settings} {what}, so it isn't as the run wrote it; put it back, or make a new run."
            )
        return stored

    def resuming(self, effect: str, *further: str) -> str:
        """The end of a sentence: the command that continues the run, with `further` options, and its effect.

        The command repeats what the run's settings may do only if a person says so.
        """
        options: list[str] = []
        with contextlib.suppress(InputError):  # settings that can't be read ask for nothing
            stored = read_toml(self.settings)
            options = untrusted.options(stored, untrusted.requests(stored, self.path))
        trusted = " (if you trust the run, since these options let it do what its files can't)" if options else ""
        return f"{as_command('run', '--resume', '--out', self.path, *options, *further)} {effect}{trusted}"

    def check(self, *, resume: bool, restart: bool) -> None:
        """Raise InputError if `prepare` would; nothing is changed.

        Raises:
            InputError: it holds a run and neither `resume` nor `restart` is given, or it holds other files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"The path {self.path} is a file; choose another --out.")
        if self.holds_run and not (resume or restart):
            raise InputError(
                f"The directory {self.path} already holds a run; continue it with --resume, start over with --restart "
                "(the old run is kept under another name), or choose another --out."
            )
        if self._lacks_study:
            if not restart:
                raise InputError(
                    f"The study of the run in {self.path} is gone; put its {self.journal.name} back and continue it with "
                    "--resume, start over with --restart (the old run is kept under another name), or choose another --out."
                )
        elif not self.holds_run and self.path.is_dir() and any(not _is_ours(path) for path in self.path.iterdir()):
            raise InputError(f"The directory {self.path} is not empty and holds no run; choose another --out.")

    def prepare(self, *, resume: bool, restart: bool) -> None:
        """Make the directory ready: new, continued, or with the old run moved to another name beside it.

        Raises:
            InputError: `check` refuses the directory, or it can't be moved or made.
        """
        self.check(resume=resume, restart=restart)
        try:
            if restart and (self.holds_run or self._lacks_study):
                self._made = True  # so that `remove_if_empty` puts the old run back, wherever an interruption comes
                self._moved = _free_name(self.path.absolute())
                self.path.rename(self._moved)
                self._drop_lock(self._moved)
            self._made = self._made or not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _refused(f"The directory {self.path} can't be made or moved", error) from error
        if self._locking and self._lock is None:
            self._take_lock()

    def check_links(self) -> None:
        """InputError if a file that is written in place, or the folder that is written to, is a link.

        By a link a stranger's run could change any file.
        """
        for path in (self.journal, self.path / LOCK, self.refined, *self.path.glob("worker-*.log")):
            if path.is_symlink():
                raise InputError(f"The file {path} is a link, which no run makes; put the file itself in its place.")

    def _take_lock(self) -> None:
        """Hold the lock file, and remove the half-written files of a killed run."""
        self.check_links()
        try:
            self._lock = take_lock(self.path / LOCK)
            half_written = [path for path in self.path.iterdir() if _TEMPORARY.fullmatch(path.name)]
            half_written += [path for path in self.refined.glob(".*.tmp") if _TEMPORARY_REFINED.fullmatch(path.name)]
            for path in half_written:
                path.unlink(missing_ok=True)
        except BlockingIOError as error:
            raise InputError(
                f"Another run is at work in {self.path}; wait for it or stop it, or choose another --out "
                f"({as_command('worker', self.path)} would help it)."
            ) from error
        except OSError as error:
            raise _refused(f"The directory {self.path} can't be written to", error) from error

    def _drop_lock(self, path: Path) -> None:
        """Release the lock, if it is held; its file is in `path`."""
        if self._lock is not None:
            drop_lock(self._lock, path / LOCK)
            self._lock = None

    def remove_if_empty(self) -> None:
        """Undo `prepare` after a run that failed before its first artifact: remove its directory, put the old run back."""
        with contextlib.suppress(OSError):
            if not self._made or (self.path.exists() and any(self.path.iterdir())):
                return
            if self.path.exists():
                self.path.rmdir()
            if self._moved:
                self._moved.rename(self.path)

    def study_name(self, model: str = "") -> str:
        """The name of the run's study in a database, made up once, so that no two runs share a study by accident.

        A new name has the model (or, without one, the directory's name), the time, and a random part.
        """
        if not self.study.exists():
            name = named_after(model or str(self.path.absolute()))
            write_atomically(self.study, f"abliterate-{name}-{uuid.uuid4().hex[:12]}\n")
        try:
            study_name = self.study.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InputError(
                f"The file {self.study} can't be read ({error}); put it back, or start over with --restart."
            ) from error
        if not _STUDY_NAME.fullmatch(study_name):
            raise InputError(f"The file {self.study} holds no study's name; put it back, or start over with --restart.")
        return study_name


def default_path(model: str) -> Path:
    """`runs/<model>-<time>`; no part of the model's name can lead out of that folder."""
    return RUNS / named_after(model)


def named_after(model: str) -> str:
    """`<model>-<time>`, the default name of a run and of its study."""
    return f"{safe_name(model)}-{time.strftime('%Y%m%d-%H%M%S')}"


def latest_run(model: str) -> Path | None:
    """The newest run directory of exactly this model under `runs/` with a default name, if any."""
    name = re.compile(re.escape(safe_name(model)) + r"-\d{8}-\d{6}")
    runs = [path for path in RUNS.glob("*") if name.fullmatch(path.name) and _model_of(path) == model]
    return max(runs, key=lambda path: path.name, default=None)  # not by the folder's time, which a new report changes, too


def _model_of(path: Path) -> str | None:
    """The model of the run in a directory; None if there is no run."""
    directory = RunDirectory(path)
    if not directory.holds_run:
        return None
    with contextlib.suppress(InputError):
        return str(read_toml(directory.settings).get("model"))
    return None


def _refused(failure: str, error: OSError) -> AbliterateError:
    if error.errno in NO_ROOM:
        return AbliterateError(f"{failure}: {error.strerror}; free some space and repeat the command.")
    return InputError(f"{failure}: {error.strerror}; {disk_remedy(error)}, or choose another --out.")


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to a run that was killed at its very beginning."""
    return path.name == LOCK or _TEMPORARY.fullmatch(path.name) is not None


def _free_name(path: Path) -> Path:
    for number in range(1, 10_000):
        candidate = path.with_name(f"{path.name}.old-{number}")
        if not candidate.exists():
            return candidate
    raise InputError(f"There are too many old runs beside {path}; delete some of them.")
