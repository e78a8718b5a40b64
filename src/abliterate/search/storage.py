"""Where studies live: a journal file, or an Optuna RDB that several workers share. Knows no parameters and no scores.

A database may go away for a while (a restart, a network): what was asked of it is asked again until `PATIENCE` is over. Work
in progress is kept alive by a heartbeat, so that the trial of a worker that died is found.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

from abliterate.errors import NO_ROOM, AbliterateError

Result = TypeVar("Result")

# Seconds: how often a worker says that it lives, after how long a silent one is dead, how long a lost database is waited for.
HEARTBEAT, GRACE, PATIENCE = 10.0, 60.0, 300.0
# Seconds between looks at a study whose last trials others are at.
POLL = 1.0
BEAT = "heartbeat"
_PIECE = 32_000  # characters: less than the 64 KiB that a text may have in MySQL
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_CHECKSUM = "sha256"  # its first 16 digits, in each record of a journal
_DEAD_LOCK = 5  # seconds that a journal's lock is held without anything being written
optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_storage(url: str, journal: Path) -> BaseStorage:
    """The journal, or the database at `url`; whatever its driver raises where that can't be reached or read."""
    if not url:
        drop_torn_line(journal)
        check_journal(journal)
        return JournalStorage(CheckedJournal(journal))
    # Connections that a restart of the server cut are noticed before they are used.
    return RDBStorage(url, {} if url.startswith("sqlite") else {"pool_pre_ping": True})


def drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a full disk or a kill left unfinished: the next record would be glued to it, and lost."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        with journal.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


class CheckedJournal(JournalFileBackend):
    """A journal whose records carry a checksum, and in which a disk that was full leaves no half line to write behind.

    Its lock is given up for dead after `_DEAD_LOCK` seconds. Its path is absolute: of a relative one, Optuna looks for the
    lock's age in the wrong folder, and waits for that of a killed process for ever.
    """

    def __init__(self, path: Path) -> None:
        place = str(path.absolute())
        lock = Path(place + ".lock")
        if lock.is_symlink() and not lock.exists():  # of a run that was killed, and its directory moved since
            lock.unlink(missing_ok=True)
        super().__init__(place, JournalFileSymlinkLock(place, grace_period=_DEAD_LOCK))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs([{**log, _CHECKSUM: _checksum(json.loads(json.dumps(log)))} for log in logs])
        except OSError:
            with contextlib.suppress(OSError):
                self._lock.acquire()
                try:
                    drop_torn_line(Path(self._file_path))
                finally:
                    self._lock.release()
            raise


def check_journal(journal: Path) -> None:
    """ValueError that names the first damaged line: a flipped byte must not become a trial's score.

    Records of earlier versions carry no checksum, and must only be JSON.
    """
    if not journal.exists():
        return
    for number, line in enumerate(journal.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            sound = record.pop(_CHECKSUM, None) in (None, _checksum(record))
        except (ValueError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"line {number} is damaged")


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def patiently(work: Callable[[], Result], check: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> Result:
    """The result of `work`, which must bear being done twice; again and again while the database can't be reached.

    Raises:
        AbliterateError: for longer than `patience` seconds, or the disk of a journal refuses.
    """
    end, pause = time.monotonic() + patience, _FIRST_PAUSE
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
                    f"The study's database hasn't answered for {patience:.0f} s ({first_line(error)}); finished trials are in "
                    "it: continue with --resume once it runs."
                ) from error
        check()
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
        pause = min(2 * pause, _LONGEST_PAUSE)


def disk_refused(error: AbliterateError | OSError) -> AbliterateError:
    """What a person is told where a journal can't be written."""
    if isinstance(error, AbliterateError):
        return error
    remedy = "free some space" if error.errno in NO_ROOM else "mend that"
    return AbliterateError(f"The study can't be written ({error.strerror}); {remedy}, then continue with --resume.")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the database can't be reached now, as opposed to what was asked of it being wrong."""
    from sqlalchemy import exc

    # The last is how a session speaks that was in the middle of something when its connection was cut.
    lost = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, exc.PendingRollbackError)
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, lost) or (isinstance(one, exc.DBAPIError) and one.connection_invalidated):
            return True
        one = one.__cause__ or one.__context__
    return False


@contextlib.contextmanager
def heartbeat(storage: BaseStorage, trial_id: int, interval: float = HEARTBEAT) -> Iterator[None]:
    """While active, a count in the trial goes up every `interval` seconds: whoever looks sees that it is worked on.

    A count and not a time: the clocks of several machines differ. Optuna's own heartbeat is for databases only, and starts with
    `optimize`.
    """
    over = threading.Event()

    def beat() -> None:
        for count in itertools.count(1):
            if over.wait(interval):
                return
            with contextlib.suppress(Exception):  # one that doesn't come through is made up for by the next
                storage.set_trial_user_attr(trial_id, BEAT, count)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def share(study: optuna.Study, name: str, content: bytes) -> None:
    """Leave something in the storage for whoever works at the study, in pieces that any database takes."""
    text = base64.b64encode(content).decode("ascii")
    pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)] or [""]
    whole = [len(pieces), hashlib.sha256(content).hexdigest()]
    if patiently(lambda: study.user_attrs).get(name) == whole:
        return
    for index, piece in enumerate(pieces):
        patiently(partial(study.set_user_attr, f"{name}:{index}", piece))
    # Last: what isn't there as a whole isn't there.
    patiently(partial(study.set_user_attr, name, whole))


def shared(study: optuna.Study, name: str) -> bytes | None:
    """What was shared under a name; None where it isn't there yet, or is just being replaced."""
    found = patiently(lambda: study.user_attrs)
    if name not in found:
        return None
    count, digest = found[name]
    content = base64.b64decode("".join(found.get(f"{name}:{index}", "") for index in range(count)))
    return content if hashlib.sha256(content).hexdigest() == digest else None


class Silence:
    """Which trials in work have shown no heartbeat for `grace` seconds of this observer's clock."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace = grace
        self._clock = clock
        self._seen: dict[int, tuple[object, float]] = {}

    def of(self, beats: Mapping[int, object]) -> list[int]:
        """The trials among `beats` ({trial: its count now}) that are silent; what isn't in work any more is forgotten."""
        now = self._clock()
        self._seen = {
            trial: self._seen[trial] if self._seen.get(trial, (None, 0.0))[0] == beat and trial in self._seen else (beat, now)
            for trial, beat in beats.items()
        }
        return [trial for trial, (_, since) in self._seen.items() if now - since > self._grace]


def first_line(error: Exception) -> str:
    """What an error says, in one line without its end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
