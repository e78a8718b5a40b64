"""A run that is killed takes its workers with it, and several processes may begin at one new database."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.pipeline.run import run
from abliterate.search.study import STUDY_NAME
from support import fake_worker, orphan
from support.fake_worker import study_of
from support.forked import Forked
from support.runs import Recorder, quick_settings


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_worker_of_a_killed_run_ends(tmp_path: Path) -> None:
    """It waits for the run here; within seconds of kill −9 it ends, as it does when it is asked to."""
    study_of("", tmp_path / "study.journal", STUDY_NAME, "run", 4, 60)
    run = Forked(orphan.keep_a_worker, [str(tmp_path)], tmp_path)
    log = tmp_path / "worker-1.log"
    until(lambda: log.exists() and "waiting for the run" in log.read_text(encoding="utf-8"))
    worker = int(run.out)
    assert is_running(worker)
    run.send(signal.SIGKILL)
    run.end()
    until(lambda: not is_running(worker), seconds=10)
    assert "interrupted; the run and its other workers continue" in log.read_text(encoding="utf-8")


@pytest.mark.parametrize(("deaf", "said"), [(False, "safe point 143"), (True, "at once")])
def test_a_process_ends_with_its_parent_at_a_safe_point_or_soon(deaf: bool, said: str, tmp_path: Path) -> None:
    parent = Forked(orphan.child_of_a_killed_process, [deaf], tmp_path)
    assert parent.end() == -signal.SIGKILL
    until(lambda: parent.out.strip() != "", seconds=10)
    assert parent.out.strip() == said


@pytest.mark.parametrize("kind", [pytest.param("sqlite", marks=pytest.mark.slow), "postgres"])
def test_eight_processes_begin_at_one_new_database(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"sqlite:///{tmp_path}/new.db" if kind == "sqlite" else request.getfixturevalue("postgres").make("new")
    given = [[url, str(tmp_path / "no.journal"), "s", f"w{index}", "8", "0", "60"] for index in range(8)]
    processes = [Forked(fake_worker.main, [arguments], tmp_path) for arguments in given]
    codes = [process.end(timeout=120) for process in processes]
    assert codes == [0] * 8, [process.err[-600:] for process in processes if process.err]
    watcher = study_of(url, tmp_path / "no.journal", "s", "watcher", 8, 60)
    assert [trial.number for trial in watcher.trials()] == list(range(8))


@pytest.mark.parametrize(
    "url", ["sqlite:////no/such/folder/study.db", "postgresql+psycopg://postgres@127.0.0.1:9/x", "nonsense", "foo://x/y"]
)
def test_a_database_that_cant_be_opened_is_known_before_anything_is_loaded(
    url: str, tmp_path: Path, prompt_files: dict[str, str]
) -> None:
    recorder = Recorder()
    with pytest.raises(InputError, match=r"storage URL given can't be opened: .*check --storage"):
        run(quick_settings(prompt_files, tmp_path / "cache", search={"storage": url}), recorder, RunDirectory(tmp_path / "run"))
    assert recorder.stages == []
    assert not (tmp_path / "run").exists()
