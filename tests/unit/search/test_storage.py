"""Several workers at one study: slots of the budget, signs of life, lost databases."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from abliterate.errors import INTERRUPTED, AbliterateError, Interrupted
from abliterate.search import storage
from abliterate.search import study as study_module
from abliterate.search.storage import Silence, patiently, share, shared
from abliterate.search.study import Asked, Study
from abliterate.types import Trial
from support.fake_worker import study_of


def two(
    tmp_path: Path, kind: str, grace: float = 60.0, trials: int = 6, pause: float = storage.FIRST_PAUSE
) -> tuple[Study, Study]:
    """Two workers at the same new study."""
    url = f"sqlite:///{tmp_path}/study.db" if kind == "database" else ""
    first, second = (study_of(url, tmp_path / "study.journal", "s", name, trials, grace, pause) for name in ("a", "b"))
    return first, second


def told(study: Study, asked: Asked | None, seconds: float = 0.0) -> bool:
    """Whether a complete trial could be told."""
    assert asked is not None
    scores = {"kl": {"mean": 0.1}, "refusals": asked.number, "unanswered": {"count": asked.number}}
    return study.tell(asked, Trial(asked.number, asked.params, "complete", scores, seconds), 100)


BOTH = pytest.mark.parametrize("kind", ["journal", "database"])


def test_a_record_whose_lock_was_taken_away_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stalls for seconds makes others take the lock for abandoned; nothing is lost and nothing ends."""
    journal = storage.CheckedJournal(tmp_path / "study.journal")
    release = type(journal._lock).release

    def robbed(lock: Any) -> None:
        release(lock)
        raise RuntimeError("Error: did not possess lock")

    monkeypatch.setattr(type(journal._lock), "release", robbed)
    journal.append_logs([{"op_code": 0}])
    assert [record["op_code"] for record in journal.read_logs(0)] == [0]
    monkeypatch.setattr(type(journal._lock), "release", lambda lock: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        journal.append_logs([{"op_code": 0}])


def test_a_write_that_fails_under_a_lock_that_was_taken_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = storage.CheckedJournal(tmp_path / "study.journal")
    journal.append_logs([{"op_code": 0}])

    def stolen(lock: Any) -> None:
        raise RuntimeError("Error: did not possess lock")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(journal._lock), "release", stolen)
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.append_logs([{"op_code": 1}])


def test_a_torn_line_is_cut_off_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.journal"
    journal, taken = storage.CheckedJournal(path), list[bool]()
    acquire = journal._lock.acquire
    monkeypatch.setattr(journal._lock, "acquire", lambda: taken.append(True) or acquire())
    path.write_bytes(b"whole\n")
    journal.drop_torn_line()
    assert not taken, "nothing is torn, and the folder may be read-only"
    path.write_bytes(b"whole\ntorn")
    journal.drop_torn_line()
    assert (path.read_bytes(), taken) == (b"whole\n", [True])
    assert not Path(f"{path}.lock").is_symlink()


@pytest.mark.parametrize("begun_anew", [False, True])
def test_a_run_that_begins_anew_gets_nothing_from_a_worker_of_the_old_one(tmp_path: Path, begun_anew: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    old = storage.CheckedJournal(folder / "study.journal")
    old.append_logs([{"op_code": 0}])
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    if begun_anew:
        new = storage.CheckedJournal(folder / "study.journal")
        new.append_logs([{"op_code": 1}])
    for act in (lambda: old.append_logs([{"op_code": 2}]), lambda: list(old.read_logs(0))):
        with pytest.raises(
            AbliterateError, match=f"run in {folder} was moved, deleted or begun anew; start this process again"
        ):
            act()
    if begun_anew:
        assert [record["op_code"] for record in new.read_logs(0)] == [1]
    else:
        assert not (folder / "study.journal").exists()


# Slots


@BOTH
def test_two_workers_share_the_budget_exactly(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind)
    asked = [worker.ask(6) for worker in (first, second, second, first, second, first)]
    assert [one.number for one in asked if one] == list(range(6))
    assert first.ask(6) is None
    assert second.ask(6) is None
    for worker, one in zip((first, second, second, first, second, first), asked, strict=True):
        assert told(worker, one)
    assert [trial.number for trial in first.trials()] == list(range(6))
    assert first.trials() == second.trials()
    more = second.ask(7)
    assert more is not None
    assert more.number == 6


@BOTH
def test_an_interrupted_slot_is_the_next_one_given(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind)
    lost, kept = first.ask(6), second.ask(6)
    assert lost is not None
    first.give_up(lost)
    again = second.ask(6)
    assert again is not None
    assert again.number == lost.number == 0
    assert told(second, again)
    assert told(second, kept)
    assert [trial.number for trial in first.trials()] == [0, 1]


@BOTH
def test_what_a_worker_left_is_its_own_to_give_up(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind)
    first.ask(6)
    second.ask(6)
    third = study_of(
        f"sqlite:///{tmp_path}/study.db" if kind == "database" else "", tmp_path / "study.journal", "s", "a", 6, 60
    )
    assert third.fail_interrupted() == 1  # the other one's trial goes on
    again = third.ask(6)
    assert again is not None
    assert again.number == 0


@BOTH
@pytest.mark.parametrize("count", [2, 7])
def test_of_those_that_take_a_slot_at_once_the_first_numbered_has_it(
    tmp_path: Path, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All look, then all begin: as near as processes can be. Each that loses finds a slot at its next attempt."""
    names = "abcdefg"[:count]
    url = f"sqlite:///{tmp_path}/study.db" if kind == "database" else ""
    workers = [study_of(url, tmp_path / "study.journal", "s", name, 9, 60) for name in names]
    barrier, wanted = threading.Barrier(count, timeout=20), {}
    take = Study._take

    def at_once(self: Study, slot: int, tries: Iterator[int]) -> tuple[int | None, int]:
        if self._worker not in wanted:
            wanted[self._worker] = slot
            barrier.wait()
        return take(self, slot, tries)

    monkeypatch.setattr(Study, "_take", at_once)
    asked: dict[str, Asked | None] = {}
    threads = [
        threading.Thread(target=lambda w=worker, n=name: asked.update({n: w.ask(9)}))
        for name, worker in zip(names, workers, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wanted == dict.fromkeys(names, 0)
    assert sorted(one.number for one in asked.values() if one) == list(range(count))
    begun = workers[0]._all()
    assert sum(one.state == optuna.trial.TrialState.RUNNING for one in begun) == count
    assert len(begun) == 2 * count - 1


def test_a_claim_whose_answer_was_lost_is_found_again(tmp_path: Path) -> None:
    first, _ = two(tmp_path, "journal")
    tries = itertools.count()
    began = first._take(0, tries)
    assert first._take(0, tries) == began
    assert len(first._all()) == 1


# Signs of life


def test_silence_is_of_the_same_count_for_longer_than_the_grace() -> None:
    now = [0.0]
    silence = Silence(10, lambda: now[0])
    assert silence.of({1: None, 2: 5}) == []
    now[0] = 9.0
    assert silence.of({1: None, 2: 6}) == []
    now[0] = 10.5
    assert silence.of({1: None, 2: 6}) == [1]
    now[0] = 19.5
    assert silence.of({2: 6, 3: None}) == [2]
    assert silence.of({3: None, 1: None}) == []  # 1 was forgotten: it begins anew


@BOTH
def test_a_silent_workers_trial_is_begun_again_and_can_not_be_told(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind, grace=0.2)
    dead = first.ask(6)
    assert second.fail_silent() == 0
    time.sleep(0.3)
    assert second.fail_silent() == 1
    again = second.ask(6)
    assert dead is not None
    assert again is not None
    assert again.number == dead.number
    assert told(second, again)
    assert not told(first, dead, seconds=9)
    assert [trial.seconds for trial in first.trials()] == [0.0]


@BOTH
def test_a_worker_at_work_is_never_silent(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind, grace=0.3)
    asked = first.ask(6)
    assert asked is not None
    with first.at_work(asked):
        for _ in range(10):
            time.sleep(0.1)
            assert second.fail_silent() == 0
    assert told(first, asked)
    assert threading.active_count() < 10


# Databases that go away


def lost_times(count: int, work: Callable[..., Any]) -> Callable[..., Any]:
    """Work whose first answers are lost after it was done."""
    left = itertools.count()

    def losing(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        if next(left) < count:
            raise OperationalError("select", {}, Exception("server closed the connection"))
        return result

    return losing


SHORT = 0.01  # seconds before the first retry


def test_what_was_asked_is_asked_again() -> None:
    calls: list[int] = []
    assert patiently(lost_times(3, lambda: calls.append(1) or 7), pause=SHORT) == 7
    assert len(calls) == 4


def test_patience_ends_with_a_sentence() -> None:
    with pytest.raises(AbliterateError, match=r"answered for 0 s .*its finished trials are kept, so continue with --resume"):
        patiently(lost_times(100, lambda: None), patience=0.2, pause=SHORT)


def test_what_is_wrong_is_not_asked_again() -> None:
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        patiently(wrong, pause=SHORT)
    assert calls == [1]


def test_waiting_can_be_interrupted() -> None:
    def check() -> None:
        raise Interrupted(130)

    with pytest.raises(Interrupted):
        patiently(lost_times(100, lambda: None), check, pause=SHORT)


@BOTH
def test_lost_answers_lose_and_double_nothing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that is written is written, and its answer lost, once or twice."""
    first, second = two(tmp_path, kind, pause=SHORT)
    for name in ("create_new_trial", "set_trial_user_attr", "set_trial_state_values"):
        monkeypatch.setattr(first._storage, name, lost_times(2, getattr(first._storage, name)))
    asked = first.ask(6)
    assert told(first, asked)
    other = second.ask(6)
    assert other is not None
    assert other.number == 1
    assert told(second, other)
    states = Counter(one.state.name for one in second._all())
    assert states == {"COMPLETE": 2}
    assert [trial.number for trial in second.trials()] == [0, 1]


@BOTH
def test_what_is_shared_is_there_as_a_whole_or_not(tmp_path: Path, kind: str) -> None:
    first, second = two(tmp_path, kind)
    content = bytes(range(256)) * 700
    assert shared(second._study, "x") is None
    share(first._study, "x", content)
    assert shared(second._study, "x") == content
    share(first._study, "x", b"")
    assert shared(second._study, "x") == b""
    second._study.set_user_attr("x:0", "AAAA")  # one piece of the next
    assert shared(first._study, "x") is None


# A new database


def refusing(error: Exception, times: int) -> tuple[Callable[[], str], list[int]]:
    """A function that raises so many times before it returns, and the list of its calls."""
    calls: list[int] = []

    def connect() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "connected"

    return connect, calls


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("CREATE TABLE studies", {}, Exception("table studies already exists")),
        OperationalError("INSERT", {}, Exception("database is locked")),
        OperationalError("CREATE TABLE studies", {}, Exception("(1050, \"Table 'studies' already exists\")")),
        ProgrammingError("CREATE TABLE alembic_version", {}, Exception('relation "alembic_version" already exists')),
        IntegrityError("INSERT INTO version_info", {}, Exception("duplicate key value violates unique constraint")),
    ],
)
def test_creating_tables_is_repeated_where_another_process_creates_them(error: Exception) -> None:
    connect, calls = refusing(error, 2)
    assert storage.make_schema(connect) == "connected"
    assert len(calls) == 3
    wrapped = optuna.exceptions.StorageInternalError("An exception is raised during the commit.")
    wrapped.__cause__ = error
    connect, calls = refusing(wrapped, 1)
    assert storage.make_schema(connect) == "connected"
    with pytest.raises(type(error)):
        storage.make_schema(refusing(error, 10**6)[0], patience=0.1)


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("connect", {}, Exception("connection refused")),
        OperationalError("connect", {}, Exception("unable to open database file")),
        ProgrammingError("CREATE TABLE studies", {}, Exception("permission denied for schema public")),
        RuntimeError("The runtime optuna version is no longer compatible with the table schema"),
    ],
)
def test_what_is_no_race_is_raised_at_once(error: Exception) -> None:
    connect, calls = refusing(error, 1)
    with pytest.raises(type(error)):
        storage.make_schema(connect)
    assert len(calls) == 1


def test_while_the_database_is_away_no_worker_is_silent_and_a_run_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []

    def check() -> None:
        checked.append(1)
        if len(checked) == 3:
            raise Interrupted(INTERRUPTED)

    study, _ = two(tmp_path, "journal", pause=SHORT)
    study._check = check
    silence = study._silence
    asked = study.ask()
    assert asked is not None
    monkeypatch.setattr(study_module, "HEARTBEAT", 0.0)
    monkeypatch.setattr(study._study, "get_trials", lost_times(2, study._study.get_trials))
    study.trials()
    assert len(checked) == 2
    assert study._silence is not silence, "their heartbeats could not come, either"
    monkeypatch.setattr(study._storage, "set_trial_user_attr", lost_times(3, study._storage.set_trial_user_attr))
    trial = Trial(asked.number, asked.params, "failed", reason="no convergence")
    assert study.tell(asked, trial, 100), "a finished trial is stored first"
    assert len(checked) == 2
    monkeypatch.setattr(study._study, "get_trials", lost_times(9, lambda **options: []))
    with pytest.raises(Interrupted):
        study.trials()
