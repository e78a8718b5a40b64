"""Store studies in a journal file, or in an Optuna RDB that several workers share.

A database may go away for a while (a restart, a network failure): every request is repeated until `PATIENCE` is over. Running
trials send a heartbeat, so that the trial of a dead worker is noticed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from abliterate.errors import AbliterateError, InputError, disk_remedy, first_line, install_extra

Result = TypeVar("Result")

# Seconds between two heartbeats of a worker, until a silent worker counts as dead, and until a lost database is given up.
HEARTBEAT, GRACE, PATIENCE = 10.0, 60.0, 300.0
# Seconds between two looks at a study whose last trials other workers are running.
POLL = 1.0
BEAT = "heartbeat"
_PIECE = 32_000  # characters, fewer than the 64 KiB that a MySQL text may have
FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds before a lost database is asked again; the pause doubles each time
_CHECKSUM = "sha256"  # the key of the checksum (its first 16 digits) in each record of a journal
# What databases say where another process has just created a table or a row, or is about to.
_RACES = ("already exists", "is locked", "deadlock", "duplicate", "unique constraint", "concurrently updated")
_SCHEMA_PATIENCE = 30.0  # seconds in which a new database's tables must be there, whoever creates them
_POSTGRES = install_extra("postgres")
_DEAD_LOCK = 5  # seconds after which a journal's lock counts as abandoned if nothing is written
optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_storage(url: str, journal: Path, *, dead_lock: int = _DEAD_LOCK) -> BaseStorage:
    """The journal, or the database at `url`. If it can't be reached or read, the driver's own error is raised.

    `dead_lock` is as in `CheckedJournal`.
    """
    if not url:
        backend = CheckedJournal(journal, dead_lock)
        backend.drop_torn_line()
        check_journal(journal)
        return JournalStorage(backend)
    # `pool_pre_ping` notices connections that a restart of the server cut before they are used.
    return make_schema(partial(RDBStorage, url, {} if url.startswith("sqlite") else {"pool_pre_ping": True}))


def check_driver(url: str) -> None:
    """InputError if the package that connects to the database at `url` isn't installed; nothing is connected.

    A URL that can't be read passes, because the error of opening it says more.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(url).get_dialect().import_dbapi()
    except ImportError as error:
        kind = url.partition(":")[0]
        remedy = f"install it, or the extra for PostgreSQL: {_POSTGRES}"
        if kind.startswith("postgresql"):
            remedy = f"run {_POSTGRES}"
            if kind not in ("postgresql", "postgresql+psycopg"):
                remedy += ", and begin the URL with postgresql+psycopg://"
        missing = error.name or first_line(error)
        raise InputError(f"A study at {kind}://… needs the package {missing}, which isn't installed; {remedy}.") from error
    except SQLAlchemyError:
        return


def make_schema(connect: Callable[[], Result], patience: float = _SCHEMA_PATIENCE) -> Result:
    """The result of `connect`, which creates missing tables; it is repeated if another process creates them at this moment.

    Optuna looks whether a table is there and creates it in two steps, so of several processes at a new database all but one
    would fail. The pauses are random, so that they don't meet again. Any other error is raised at once.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return connect()
        except Exception as error:
            if not _is_schema_race(error) or time.monotonic() >= end:
                raise
        time.sleep(random.uniform(0.02, 0.3))


def _is_schema_race(error: BaseException) -> bool:
    """Whether an error in creating tables means that another process is creating them."""
    from sqlalchemy import exc

    cause: BaseException | None = error
    while cause is not None:
        # By words, because the classes of the drivers' errors also mean that a right or a server is missing.
        if isinstance(cause, exc.DBAPIError):
            return any(words in str(cause).lower() for words in _RACES)
        cause = cause.__cause__ or cause.__context__
    return False


def drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a full disk or a kill left unfinished; the next record would be glued to it and lost."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


class CheckedJournal(JournalFileBackend):
    """A journal whose records carry a checksum, and in which a full disk leaves no half line.

    Its lock counts as abandoned after `dead_lock` seconds. Its path is absolute, because for a relative path Optuna looks up
    the lock's age in the wrong folder and waits for ever for a killed process.
    """

    def __init__(self, path: Path, dead_lock: int = _DEAD_LOCK) -> None:
        absolute = str(path.absolute())
        lock = Path(absolute + ".lock")
        if lock.is_symlink() and not lock.exists():  # the lock of a killed run whose directory was moved afterwards
            lock.unlink(missing_ok=True)
        super().__init__(absolute, JournalFileSymlinkLock(absolute, grace_period=dead_lock))
        self._file = _file_at(absolute)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """As Optuna's; AbliterateError if the file isn't the one that was opened."""
        self._check_file()
        yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """As Optuna's, but for the checksums, and for a lock that others took for abandoned while the disk stalled."""
        checked = [{**log, _CHECKSUM: _checksum(json.loads(json.dumps(log)))} for log in logs]
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in checked)
        with self._locked():
            self._check_file()
            try:
                with open(self._file_path, "ab") as file:
                    file.write(text.encode("utf-8"))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    drop_torn_line(Path(self._file_path))
                raise

    def drop_torn_line(self) -> None:
        """`drop_torn_line` under the lock: a record that another process is writing isn't torn."""
        path = Path(self._file_path)
        if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
            return
        # Where nothing may be written no lock can be had, and the error of cutting says so.
        with self._locked() if os.access(path.parent, os.W_OK) else contextlib.nullcontext():
            drop_torn_line(path)

    def _check_file(self) -> None:
        """A run that begins anew makes a new file: what a worker of the old one writes would be taken for the new one's."""
        if _file_at(self._file_path) != self._file:
            raise AbliterateError(
                f"The run in {Path(self._file_path).parent} was moved, deleted or begun anew; start this process again."
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            try:
                self._lock.release()
            except RuntimeError as error:  # what was to be written is, or its own error is raised
                if "possess lock" not in str(error):
                    raise


def _file_at(path: str) -> tuple[int, int] | None:
    """What tells a file from others of its name; None if there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def check_journal(journal: Path) -> None:
    """Raise a ValueError that names the first damaged line, because a flipped byte must not become a trial's score."""
    if not journal.exists():
        return
    for number, line in enumerate(journal.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            sound = record.pop(_CHECKSUM, None) == _checksum(record)
        except (ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"line {number} is damaged")


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def patiently(
    work: Callable[[], Result],
    check: Callable[[], None] = lambda: None,
    patience: float = PATIENCE,
    pause: float = FIRST_PAUSE,
) -> Result:
    """The result of `work`, which must be idempotent: it is retried while the database can't be reached.

    The first retry comes after `pause` seconds, and each pause is twice the one before.

    Raises:
        AbliterateError: the database is away for longer than `patience` seconds, or the disk of a journal refuses.
    """
    end = time.monotonic() + patience
    while True:
        try:
            return work()
        except OSError as error:
            raise disk_refused(error) from error
        except Exception as error:
            if not is_lost(error):
                raise
            if time.monotonic() >= end:
                raise AbliterateError(
                    f"The study's database hasn't answered for {patience:.0f} s ({first_line(error)}); its finished trials are "
                    "kept, so continue with --resume once it runs."
                ) from error
        check()
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE)


def disk_refused(error: AbliterateError | OSError) -> AbliterateError:
    """The error for a user whose journal can't be written."""
    if isinstance(error, AbliterateError):
        return error
    return AbliterateError(f"The study can't be written ({error.strerror}); {disk_remedy(error)}, then continue with --resume.")


def is_lost(error: BaseException) -> bool:
    """Whether an error means that the database can't be reached now, and not that the request was wrong."""
    from sqlalchemy import exc

    # A session raises the last of these if its connection was cut in the middle of a transaction.
    lost = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, exc.PendingRollbackError)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, lost) or (isinstance(cause, exc.DBAPIError) and cause.connection_invalidated):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int, interval: float = HEARTBEAT) -> Iterator[None]:
    """While active, a count in the trial goes up every `interval` seconds, so other workers see that it is running.

    It is a count and not a time, because the clocks of several machines differ. Optuna's own heartbeat works for databases
    only, and starts with `optimize`.
    """
    over = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if over.wait(interval):
                return
            with contextlib.suppress(Exception):  # the next heartbeat makes up for a lost one
                storage.set_trial_user_attr(trial_id, BEAT, count)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def share(study: optuna.Study, name: str, content: bytes, patience: float = PATIENCE, pause: float = FIRST_PAUSE) -> None:
    """Leave `content` in the storage for all workers of the study, in pieces that any database accepts.

    `patience` and `pause` are as in `patiently`.
    """
    text = base64.b64encode(content).decode("ascii")
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)] or [""]
    whole = [len(pieces), hashlib.sha256(content).hexdigest()]
    if patiently(lambda: study.user_attrs, patience=patience, pause=pause).get(name) == whole:
        return
    for index, piece in enumerate(pieces):
        patiently(partial(study.set_user_attr, f"{name}:{index}", piece), patience=patience, pause=pause)
    # Written last, so that readers see all of the content or none of it.
    patiently(partial(study.set_user_attr, name, whole), patience=patience, pause=pause)


def shared(study: optuna.Study, name: str, patience: float = PATIENCE, pause: float = FIRST_PAUSE) -> bytes | None:
    """The content that was shared under a name; None if it isn't there yet or is just being replaced.

    `patience` and `pause` are as in `patiently`.
    """
    attributes = patiently(lambda: study.user_attrs, patience=patience, pause=pause)
    if name not in attributes:
        return None
    try:
        count, digest = attributes[name]
        # A study may come from anybody, so the count alone decides nothing: reading ends with the first missing piece.
        there = itertools.takewhile(lambda piece: piece in attributes, (f"{name}:{index}" for index in range(int(count))))
        content = base64.b64decode("".join(attributes[piece] for piece in there))
    except (TypeError, ValueError):
        return None
    return content if hashlib.sha256(content).hexdigest() == digest else None


class Silence:
    """Finds running trials that have shown no heartbeat for `grace` seconds of this observer's clock."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._seen: dict[int, tuple[object, float]] = {}

    def of(self, beats: Mapping[int, object]) -> list[int]:
        """The silent trials among `beats` ({trial: its current count}); trials that no longer run are forgotten."""
        now = self._clock()
        self._seen = {
            trial: self._seen[trial] if self._seen.get(trial, (None, 0.0))[0] == beat and trial in self._seen else (beat, now)
            for trial, beat in beats.items()
        }
        return [trial for trial, (_, since) in self._seen.items() if now - since > self._grace]
