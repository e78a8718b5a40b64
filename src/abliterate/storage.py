"""Where studies live: a journal file, or an Optuna RDB that several workers share. Knows no parameters and no scores.

A database may go away for a while (a restart, a network): what was asked of it is asked again until `PATIENCE` is over. Work
in progress is kept alive by a heartbeat, so that the trial of a worker that died is found.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from abliterate.errors import AbliterateError

Result = TypeVar("Result")

# Seconds: how often a worker says that it lives, after how long a silent one is dead, how long a lost database is waited for.
HEARTBEAT, GRACE, PATIENCE = 10.0, 60.0, 300.0
BEAT = "heartbeat"
_PIECE = 32_000  # characters: less than the 64 KiB that a text may have in MySQL
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)


def open_storage(url: str, journal: Path) -> BaseStorage:
    """The journal, or the database at `url`; whatever its driver raises where that can't be reached or read."""
    if not url:
        drop_torn_line(journal)
        return JournalStorage(JournalFileBackend(str(journal)))
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
            raise AbliterateError(
                f"The study can't be written ({error.strerror}); free some space, then continue with --resume."
            ) from error
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
