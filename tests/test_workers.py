"""Several workers at one study: slots of the budget, signs of life, lost databases; whole runs on a real PostgreSQL."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from conftest import Recorder, copy_run, outcomes, quick_settings, run_in
from fake_worker import study_of
from postgres import Server, binaries, server
from sqlalchemy.exc import OperationalError

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.model.loader import demo_path
from abliterate.pipeline import local_workers, stages, workers
from abliterate.pipeline import run as pipeline_run
from abliterate.search import storage
from abliterate.search.storage import Silence, patiently, share, shared
from abliterate.search.study import STUDY_NAME, Asked, Study
from abliterate.settings.schema import Settings
from abliterate.types import Trial

HERE = Path(__file__).parent
SLOW_ENOUGH = 0.3


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    """One server for this file. In CI it must be there."""
    if binaries() is None and not os.environ.get("CI"):
        pytest.skip("PostgreSQL isn't installed (apt-get install postgresql)")
    with server() as running:
        yield running


def two(tmp_path: Path, kind: str, grace: float = 60.0, trials: int = 6) -> tuple[Study, Study]:
    """Two workers at the same new study."""
    url = f"sqlite:///{tmp_path}/study.db" if kind == "database" else ""
    first, second = (study_of(url, tmp_path / "study.journal", "s", name, trials, grace) for name in ("a", "b"))
    return first, second


def told(study: Study, asked: Asked | None, seconds: float = 0.0) -> bool:
    """Whether a complete trial could be told."""
    assert asked is not None
    scores = {"kl": {"mean": 0.1}, "refusals": asked.number}
    return study.tell(asked, Trial(asked.number, asked.params, "complete", scores, seconds), 100)


BOTH = pytest.mark.parametrize("kind", ["journal", "database"])


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


def test_slots_of_an_earlier_versions_trials_are_their_numbers(tmp_path: Path) -> None:
    first, _ = two(tmp_path, "journal")
    for number in range(3):
        handle = first._study.ask()
        params = first._space.suggest(handle)
        record = Trial(number, params, "complete", {"kl": {"mean": 0.1}, "refusals": 1}).to_record()
        handle.set_user_attr("record", json.dumps(record))
        first._study.tell(handle, [0.1, 0.01])
    asked = first.ask(6)
    assert asked is not None
    assert asked.number == 3


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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses."""
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)


def test_what_was_asked_is_asked_again(impatient: None) -> None:
    calls: list[int] = []
    assert patiently(lost_times(3, lambda: calls.append(1) or 7)) == 7
    assert len(calls) == 4


def test_patience_ends_with_a_sentence(impatient: None) -> None:
    with pytest.raises(AbliterateError, match=r"hasn't answered for 0 s .*finished trials are kept, so continue with --resume"):
        patiently(lost_times(100, lambda: None), patience=0.2)


def test_what_is_wrong_is_not_asked_again(impatient: None) -> None:
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        patiently(wrong)
    assert calls == [1]


def test_waiting_can_be_interrupted(impatient: None) -> None:
    def check() -> None:
        raise Interrupted(130)

    with pytest.raises(Interrupted):
        patiently(lost_times(100, lambda: None), check)


@BOTH
def test_lost_answers_lose_and_double_nothing(
    tmp_path: Path, kind: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that is written is written, and its answer lost, once or twice."""
    first, second = two(tmp_path, kind)
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


# Processes


def start(url: str, journal: Path, worker: str, budget: int, seconds: float, grace: float) -> subprocess.Popen[str]:
    """A fake worker as a process."""
    command = [
        sys.executable,
        str(HERE / "fake_worker.py"),
        url,
        str(journal),
        "s",
        worker,
        str(budget),
        str(seconds),
        str(grace),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", ["journal", "postgres"])
def test_a_killed_worker_and_a_restarted_server_lose_and_double_nothing(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    budget, journal = 40, tmp_path / "study.journal"
    running: Server | None = request.getfixturevalue("postgres") if place == "postgres" else None
    url = running.make("killed") if running else ""
    watcher = study_of(url, journal, "s", "watcher", budget, 60)
    processes = [start(url, journal, f"w{index}", budget, SLOW_ENOUGH, grace=2.0) for index in range(4)]
    wait_for(lambda: len(watcher.trials()) >= 6)
    victim = processes[0]
    wait_for(lambda: any(one.user_attrs["worker"] == "w0" for one in watcher._running()), pause=0.01)
    victim.kill()
    if running:
        running.stop("immediate")
        time.sleep(1)
        running.start()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0, 0, 0], [err[-3000:] for _, err in outputs]
    assert [trial.number for trial in watcher.trials()] == list(range(budget))
    lines = [line.split() for out, _ in outputs for line in out.splitlines()]
    numbers = [int(line[0]) for line in lines if line[-1] == "told"]
    # A line of the victim's may be missing, none is doubled.
    assert len(set(numbers)) == len(numbers) >= budget - 1
    complete = [one for one in watcher._all() if one.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == budget
    assert not watcher._running()


def demo_command(out: Path, url: str, options: list[str], *more: str) -> list[str]:
    """A quick run of the demo at a database."""
    return [
        sys.executable,
        "-m",
        "abliterate",
        "run",
        "demo",
        "-o",
        str(out),
        "--storage",
        url,
        "--export",
        "none",
        *options,
        *more,
    ]


def options_of(prompt_files: dict[str, str], cache: Path, trials: int) -> list[str]:
    """Quick options as a command line."""
    given = ["-n", str(trials), "--cache-dir", str(cache), "--batch-size", "50", "--startup-trials", "4"]
    for name in ("harmful", "harmless"):  # trials on all evaluation prompts: they must last until the workers are there
        given += [f"--{name}", prompt_files[name]]
    for setting in ("response.detect_prefix=false", "search.grace_seconds=3", "efficiency.use_certified_stop=false"):
        given += ["--set", setting]
    return [*given, "--set", "evaluation.heldout=false"]


@pytest.mark.parametrize("count", [2, 4])
def test_workers_at_a_run_of_the_demo(tmp_path: Path, prompt_files: dict[str, str], postgres: Server, count: int) -> None:
    """The run and `count` − 1 workers, told by its directory or the database; of four one is killed, the server restarted."""
    budget, out, url = 12 + 4 * count, tmp_path / "run", postgres.make(f"demo{count}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    main = subprocess.Popen(
        demo_command(out, url, options_of(prompt_files, tmp_path / "cache", budget)), env=environment, stdout=log, stderr=log
    )
    wait_for(lambda: (out / "study.name").exists() or main.poll() is not None)
    name = RunDirectory(out).study_name()
    places: list[list[str]] = [[str(out)], ["--storage", url, "--study", name], [str(out)]][: count - 1]
    command = [sys.executable, "-m", "abliterate", "worker", "--cache-dir", str(tmp_path / "cache"), "--json"]
    others = [subprocess.Popen([*command, *place], env=environment, stdout=subprocess.PIPE, text=True) for place in places]
    watcher = study_of(url, out / "study.journal", name, "watcher", budget, 60)
    if count == 4:
        wait_for(
            lambda: len({one.user_attrs.get("worker") for one in watcher._running()} - {"run"}) >= 1 or main.poll() is not None
        )
        others[-1].kill()
        postgres.stop("immediate")
        time.sleep(1)
        postgres.start()
    assert main.wait(timeout=300) in (0, 1), (tmp_path / "log").read_text()  # 1: a front may stay empty
    for process in others:
        process.communicate(timeout=60)
    assert [process.returncode for process in others][: 1 if count == 2 else 2] == [0] * (1 if count == 2 else 2)
    assert [trial.number for trial in watcher.trials()] == list(range(budget))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert [trial["number"] for trial in result["trials"]] == list(range(budget))
    by_worker = Counter(one.user_attrs["worker"] for one in watcher._all() if one.state == optuna.trial.TrialState.COMPLETE)
    assert by_worker["run"] >= 1
    assert len(by_worker) >= 2


def wait_for(condition: Callable[[], bool], seconds: float = 120, pause: float = 0.05) -> None:
    """Until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(pause)


# What is said


def test_a_worker_needs_to_be_told_where(tmp_path: Path) -> None:
    for place in ((None, "", ""), (tmp_path, "sqlite:///x.db", "s")):
        with pytest.raises(InputError, match="a run's directory, or --storage URL and --study NAME"):
            workers.place_of(*place)
    with pytest.raises(InputError, match="needs the study's name"):
        workers.place_of(None, "sqlite:///x.db", "")
    with pytest.raises(InputError, match="There is no run in"):
        workers.place_of(tmp_path, "", "")


def test_a_worker_at_no_study_or_no_database(tmp_path: Path, impatient: None) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(InputError, match="holds no study nobody's"):
        pipeline_run.work(None, url, "nobody's", {}, Recorder())
    with pytest.raises(InputError, match=r"can't be opened: .*check --storage"):
        pipeline_run.work(None, "postgresql+psycopg://postgres@127.0.0.1:9/x", "s", {}, Recorder())


def test_a_worker_waits_for_the_run_and_can_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_of("", tmp_path / "study.journal", STUDY_NAME, "run", 4, 60)
    monkeypatch.setattr(workers, "_LOOK_AGAIN", 0.01)
    looks = itertools.count()

    def check() -> None:
        if next(looks) == 3:
            raise Interrupted(130)

    recorder = Recorder()
    with pytest.raises(Interrupted):
        pipeline_run.work(tmp_path, "", "", {}, recorder, check=check)
    assert recorder.notes == ["waiting for the run to compute its directions and baseline"]


def test_a_setup_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"format 99, not 1.*same version"):
        workers.SharedSetup.of_bytes(json.dumps({"format": 99}).encode())


def test_a_setup_holds_no_path_of_this_machine_and_comes_back(
    finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path
) -> None:
    path, _, settings = finished
    name = STUDY_NAME
    found = shared(
        optuna.load_study(
            study_name=name, storage=storage.open_storage("", copy_run(path, tmp_path / "run") / "study.journal")
        ),
        "setup",
    )
    assert found is not None
    setup = workers.SharedSetup.of_bytes(found)
    assert workers.SharedSetup.of_bytes(setup.to_bytes()) == setup
    text = found.decode()
    for private in (str(path), settings.cache_dir, str(Path(settings.prompts.harmful).parent), str(Path.home())):
        assert private not in text
    with workers.settings_of(setup, {"device": "cpu"}) as own:
        assert own.search == settings.search
        assert own.load.dtypes == ("float32",)
        assert Path(own.evaluation.markers).read_text(encoding="utf-8") == setup.files["evaluation.markers"]
    assert not Path(own.evaluation.markers).exists()


def test_a_worker_with_another_model_is_refused(finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path) -> None:
    path, _, _ = finished
    other = tmp_path / "other"
    shutil.copytree(demo_path() / "model", other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="can't join the run with another model"):
        pipeline_run.work(
            copy_run(path, tmp_path / "run"), "", "", {"model": str(other), "cache_dir": str(tmp_path / "c")}, Recorder()
        )


def test_a_worker_at_a_finished_run_has_nothing_to_do(finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path) -> None:
    path, result, settings = finished
    recorder = Recorder()
    own = {"cache_dir": settings.cache_dir}
    assert pipeline_run.work(copy_run(path, tmp_path / "run"), "", "", own, recorder) == len(result["trials"])
    assert recorder.trials == []


# On one machine


def test_devices_of_a_run() -> None:
    cpu = torch.device("cpu")
    assert [local_workers.devices_of(count, cpu) for count in (0, 1, 3)] == [[], [], ["cpu", "cpu"]]


def test_devices_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert local_workers.devices_of(3, torch.device("cuda")) == ["cuda:1", "cuda:2"]
    assert local_workers.devices_of(4, torch.device("cuda:2")) == ["cuda:0", "cuda:1", "cuda:3"]
    with pytest.raises(InputError, match="has 4 devices of type cuda, not 5"):
        local_workers.devices_of(5, torch.device("cuda"))


def test_a_run_on_two_devices_of_this_machine(
    tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take trials of one journal; what the other one finds is in the run's result."""
    settings = quick_settings(prompt_files, tmp_path / "cache", search={"trials": 60}, export={"kind": "none"}, device="cpu")
    evaluate = stages.evaluate

    def slowly(*arguments: Any) -> Trial:
        time.sleep(SLOW_ENOUGH)  # in the run's own process: until the other one has started
        return evaluate(*arguments)

    monkeypatch.setattr(stages, "evaluate", slowly)
    recorder = Recorder()
    result = pipeline_run.run(settings, recorder, RunDirectory(tmp_path / "run"), gpus=2)
    assert [trial["number"] for trial in result["trials"]] == list(range(60))
    assert sorted(trial.number for trial in recorder.trials) == list(range(60))
    study = study_of("", tmp_path / "run" / "study.journal", STUDY_NAME, "watcher", 60, 60)
    assert len({one.user_attrs["worker"] for one in study._all()}) == 2, (tmp_path / "run" / "worker-1.log").read_text()
    assert recorder.warnings == []


def test_a_worker_that_fails_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    directory = RunDirectory(tmp_path)  # no run is there
    with local_workers.local_workers(directory, ["cpu"], "", said.append) as look:
        wait_for(lambda: bool(look() or said))
    assert len(said) == 1
    assert "Worker 1 has ended (There is no run in" in said[0]
    assert "worker-1.log" in said[0]


def test_workers_end_with_the_run(tmp_path: Path) -> None:
    study_of("", tmp_path / "study.journal", STUDY_NAME, "run", 4, 60)
    with local_workers.local_workers(RunDirectory(tmp_path), ["cpu"], "", print) as look:
        log = tmp_path / "worker-1.log"
        wait_for(lambda: "waiting for the run" in log.read_text(encoding="utf-8"))
        look()
    assert "interrupted; the run and its other workers go on" in log.read_text(encoding="utf-8")


# Databases that can't be reached


def test_an_unreachable_database_at_the_start_is_a_sentence(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    settings = quick_settings(
        prompt_files, tmp_path / "cache", search={"storage": "postgresql+psycopg://postgres@127.0.0.1:9/x"}
    )
    with pytest.raises(InputError, match=r"storage URL given can't be opened: .*check --storage"):
        pipeline_run.run(settings, Recorder(), RunDirectory(tmp_path / "run"))


def test_a_database_that_goes_away_and_does_not_come_back(
    tmp_path: Path, prompt_files: dict[str, str], postgres: Server, monkeypatch: pytest.MonkeyPatch, impatient: None
) -> None:
    """The run ends with a sentence; continued, it is the uninterrupted one."""
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    monkeypatch.setattr(storage.patiently, "__defaults__", (*storage.patiently.__defaults__[:-1], 0.5))  # type: ignore[index]
    options = {"search": {"trials": 5, "storage": postgres.make("away")}, "export": {"kind": "none"}}
    settings = quick_settings(prompt_files, tmp_path / "cache", **options)
    directory = RunDirectory(tmp_path / "run")
    recorder = Recorder()
    tell, told_trials = Study.tell, itertools.count()

    def going_away(self: Study, *arguments: Any) -> bool:
        if next(told_trials) == 2:
            postgres.stop("immediate")
        return tell(self, *arguments)

    monkeypatch.setattr(Study, "tell", going_away)
    try:
        with pytest.raises(AbliterateError, match=r"hasn't answered for 0 s .*continue with --resume"):
            pipeline_run.run(settings, recorder, directory)
    finally:
        monkeypatch.setattr(Study, "tell", tell)
        postgres.start()
    assert len(recorder.trials) == 2
    resumed = pipeline_run.run(settings, Recorder(), directory, resume=True)
    whole, _ = run_in(
        tmp_path / "whole", quick_settings(prompt_files, tmp_path / "cache", search={"trials": 5}, export={"kind": "none"})
    )
    assert outcomes(resumed) == outcomes(whole)
