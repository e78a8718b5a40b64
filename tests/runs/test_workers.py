"""Workers as processes: killed ones, restarted servers, and whole runs on a real PostgreSQL."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.model.loader import demo_path
from abliterate.pipeline import local_workers, stages, workers
from abliterate.pipeline import run as pipeline_run
from abliterate.search import storage
from abliterate.search.storage import shared
from abliterate.search.study import STUDY_NAME, Study, open_study
from abliterate.settings.schema import Settings
from abliterate.types import Trial
from support import fake_worker
from support.cli import QUICK, prompt_options
from support.fake_worker import study_of
from support.forked import Command, Forked, ForkedPopen, Held, of_stage
from support.postgres import Server
from support.runs import Recorder, copy_run, outcomes, quick_settings, run_in

Finished = tuple[Path, dict[str, Any], Settings]


# Processes


def start(url: str, journal: Path, worker: str, budget: int, seconds: float, grace: float) -> Forked:
    """A fake worker as a process."""
    given = [url, str(journal), "s", worker, str(budget), str(seconds), str(grace)]
    return Forked(fake_worker.main, [given], journal.parent)


@pytest.mark.parametrize("place", ["journal", "postgres"])
def test_a_killed_worker_and_a_restarted_server_lose_and_double_nothing(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    budget, journal = 20, tmp_path / "study.journal"
    running: Server | None = request.getfixturevalue("postgres") if place == "postgres" else None
    url = running.make("killed") if running else ""
    watcher = study_of(url, journal, "s", "watcher", budget, 60)
    # The first one's trial lasts until it is killed.
    processes = [start(url, journal, f"w{index}", budget, 0.1 if index else 200, grace=1.5) for index in range(4)]
    victim = processes[0]
    wait_for(lambda: any(one.user_attrs["worker"] == "w0" for one in watcher._running()), pause=0.01)
    # Who only opens the study doesn't wait for a server that is gone, so each must have begun a trial before.
    wait_for(lambda: len({one.user_attrs["worker"] for one in watcher._all()}) == 4 and len(watcher.trials()) >= 3)
    victim.send(signal.SIGKILL)
    if running:
        restart(running)
    codes = [process.end(timeout=120) for process in processes]
    assert codes == [-signal.SIGKILL, 0, 0, 0], [process.err[-3000:] for process in processes]
    assert [trial.number for trial in watcher.trials()] == list(range(budget))
    lines = [line.split() for process in processes for line in process.out.splitlines()]
    numbers = [int(line[0]) for line in lines if line[-1] == "told"]
    assert sorted(numbers) == list(range(budget))  # none is missing or doubled
    complete = [one for one in watcher._all() if one.state == optuna.trial.TrialState.COMPLETE]
    assert len(complete) == budget
    assert not watcher._running()


def restart(running: Server) -> None:
    """As after a crash; the workers notice, and try again more than once."""
    running.stop("immediate")
    time.sleep(0.4)
    running.start()


def options_of(prompt_files: dict[str, str], cache: Path, trials: int) -> list[str]:
    """Quick options as a command line."""
    given = [*QUICK, *prompt_options(prompt_files), "-n", str(trials), "--cache-dir", str(cache)]
    for setting in ("search.grace_seconds=2", "efficiency.use_certified_stop=false"):
        given += ["--set", setting]
    return given


def test_workers_at_a_run_of_the_demo(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str], postgres: Server
) -> None:
    """The run and three workers, told by its directory or the database; one is killed in a trial, the server restarted."""
    budget, out, url, go = 12, tmp_path / "run", postgres.make("demo"), tmp_path / "go"
    cache = Path(finished[2].cache_dir)
    options = options_of(prompt_files, cache, budget)
    held = {"before": Held(go)}
    main = Command(["run", "demo", "-o", out, "--storage", url, "--export", "none", "--json", *options], tmp_path, **held)
    assert main.wait_for(of_stage("residuals"), timeout=120), main.err  # by then the study is in the database
    name = RunDirectory(out).study_name()
    places: list[list[str]] = [[str(out)], ["--storage", url, "--study", name], [str(out)]]
    # Whoever joins by the directory allows its database to be opened, here by the environment.
    trusting = {"environment": {"ABLITERATE_SEARCH__STORAGE": url}}
    others = [
        Command(["worker", "--cache-dir", cache, "--json", *place], tmp_path, **held, **(trusting if len(place) == 1 else {}))
        for place in places
    ]
    watcher = study_of(url, out / "study.journal", name, "watcher", budget, 60)
    wait_for(
        lambda: (
            len({one.user_attrs.get("worker") for one in watcher._running()}) == 4
            or not all(process.process.is_alive() for process in (main, *others))
        )
    )
    others[-1].send(signal.SIGKILL)
    restart(postgres)
    go.touch()
    assert main.end(timeout=300) in (0, 1), main.err  # 1: a front may stay empty
    codes = [process.end() for process in others]
    assert codes == [0, 0, -signal.SIGKILL], [process.err for process in others]
    assert [trial.number for trial in watcher.trials()] == list(range(budget))
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert [trial["number"] for trial in result["trials"]] == list(range(budget))
    everything = watcher._all()
    assert len({one.user_attrs["worker"] for one in everything}) == 4
    by_worker = Counter(one.user_attrs["worker"] for one in everything if one.state == optuna.trial.TrialState.COMPLETE)
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
            workers.study_location(*place)
    with pytest.raises(InputError, match="needs the study's name"):
        workers.study_location(None, "sqlite:///x.db", "")
    with pytest.raises(InputError, match="There is no run in"):
        workers.study_location(tmp_path, "", "")
    with pytest.raises(InputError, match="a run's directory names its own"):
        workers.study_location(tmp_path, "", "other")


def test_a_worker_at_no_study_or_no_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(InputError, match="holds no study nobody's"):
        workers.work(None, url, "nobody's", {}, Recorder())
    with pytest.raises(InputError, match=r"can't be opened: .*check --storage"):
        workers.work(None, "postgresql+psycopg://postgres@127.0.0.1:9/x", "s", {}, Recorder())


def test_a_worker_waits_for_the_run_and_can_be_interrupted(tmp_path: Path) -> None:
    study_of("", tmp_path / "study.journal", STUDY_NAME, "run", 4, 60)
    looks = itertools.count()

    def check() -> None:
        if next(looks) == 3:
            raise Interrupted(130)

    recorder = Recorder()
    with pytest.raises(Interrupted):
        workers.work(tmp_path, "", "", {}, recorder, check=check, poll=0.01)
    assert recorder.notes == ["waiting for the run to compute its directions and baseline"]


def test_a_worker_without_the_samplers_package_is_told_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_validate({"model": "demo", "search": {"sampler": "gp"}})
    instead = {"study_location": ("", Path(), "s"), "wait_for_setup": (None, None), "settings_of": nullcontext(settings)}
    for name, value in instead.items():
        monkeypatch.setattr(workers, name, lambda *_, value=value: value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package scipy"):
        workers.work(None, "", "s", {}, Recorder())


def test_a_setup_of_another_version_is_refused() -> None:
    with pytest.raises(InputError, match=r"format 99, not 3.*same version"):
        workers.SharedSetup.of_bytes(json.dumps({"format": 99}).encode())


def test_a_setup_holds_no_path_of_this_machine_and_comes_back(finished: Finished, tmp_path: Path) -> None:
    path, _, settings = finished
    found = shared(
        optuna.load_study(
            study_name=None, storage=storage.open_storage("", copy_run(path, tmp_path / "run") / "study.journal")
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
    other = {"search": {"trials": 500}}
    with pytest.raises(InputError, match=r"doesn't decide search\.trials"), workers.settings_of(setup, other):
        pass


def test_a_worker_with_another_model_is_refused(finished: Finished, tmp_path: Path) -> None:
    path, _, _ = finished
    other = tmp_path / "other"
    shutil.copytree(demo_path() / "model", other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8")) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match="can't join the run with another model"):
        workers.work(
            copy_run(path, tmp_path / "run"), "", "", {"model": str(other), "cache_dir": str(tmp_path / "c")}, Recorder()
        )


def test_a_worker_at_a_finished_run_has_nothing_to_do(finished: Finished, tmp_path: Path) -> None:
    path, result, settings = finished
    recorder = Recorder()
    own = {"cache_dir": settings.cache_dir}
    assert workers.work(copy_run(path, tmp_path / "run"), "", "", own, recorder) == len(result["trials"])
    assert recorder.trials == []


# On one machine


def test_devices_of_a_run() -> None:
    cpu = torch.device("cpu")
    assert [local_workers.devices_of(count, cpu, "cpu") for count in (0, 1, 3)] == [[], [], ["cpu", "cpu"]]


def test_devices_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert local_workers.devices_of(3, torch.device("cuda")) == ["cuda:1", "cuda:2"]
    assert local_workers.devices_of(4, torch.device("cuda:2")) == ["cuda:0", "cuda:1", "cuda:3"]
    with pytest.raises(InputError, match="has 4 devices of type cuda, not 5"):
        local_workers.devices_of(5, torch.device("cuda"))


@pytest.mark.usefixtures("lean")
def test_a_run_on_two_devices_of_this_machine(
    finished: Finished, tmp_path: Path, prompt_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take trials of one journal; what the other one finds is in the run's result."""
    over = {"search": {"trials": 6}, "export": {"kind": "none"}, "device": "cpu"}
    settings = quick_settings(prompt_files, Path(finished[2].cache_dir), **over)
    evaluate, journal = stages.evaluate, tmp_path / "run" / "study.journal"

    def workers_seen() -> int:
        study = study_of("", journal, STUDY_NAME, "watcher", 6, 60)
        return len({one.user_attrs["worker"] for one in study._all()})

    def together(*arguments: Any) -> Trial:
        wait_for(lambda: workers_seen() == 2, pause=0.1)  # in the run's own process: until the other one has begun a trial
        return evaluate(*arguments)

    monkeypatch.setattr(stages, "evaluate", together)
    recorder = Recorder()
    result = pipeline_run.run(settings, recorder, RunDirectory(tmp_path / "run"), gpus=2).to_record()
    assert [trial["number"] for trial in result["trials"]] == list(range(6))
    assert sorted(trial.number for trial in recorder.trials) == list(range(6))
    assert workers_seen() == 2, (tmp_path / "run" / "worker-1.log").read_text()
    assert recorder.warnings == []


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of the machine start at once; the command itself is that of the run on two devices."""
    monkeypatch.setattr("abliterate.pipeline.local_workers.subprocess.Popen", ForkedPopen)


@pytest.mark.usefixtures("forked")
def test_a_worker_that_fails_is_said_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    directory = RunDirectory(tmp_path)  # no run is there
    with local_workers.local_workers(directory, ["cpu"], "", said.append) as check:
        wait_for(lambda: bool(check() or said))
    assert len(said) == 1
    assert "Worker 1 has ended (There is no run in" in said[0]
    assert "worker-1.log" in said[0]


@pytest.mark.usefixtures("forked")
def test_workers_end_with_the_run(tmp_path: Path) -> None:
    study_of("", tmp_path / "study.journal", STUDY_NAME, "run", 4, 60)
    with local_workers.local_workers(RunDirectory(tmp_path), ["cpu"], "", print) as check:
        log = tmp_path / "worker-1.log"
        wait_for(lambda: "waiting for the run" in log.read_text(encoding="utf-8"))
        check()
    assert "interrupted; the run and its other workers continue" in log.read_text(encoding="utf-8")


# Databases that can't be reached


def test_an_unreachable_database_at_the_start_is_a_sentence(tmp_path: Path, prompt_files: dict[str, str]) -> None:
    settings = quick_settings(
        prompt_files, tmp_path / "cache", search={"storage": "postgresql+psycopg://postgres@127.0.0.1:9/x"}
    )
    with pytest.raises(InputError, match=r"storage URL given can't be opened: .*check --storage"):
        pipeline_run.run(settings, Recorder(), RunDirectory(tmp_path / "run"))


@pytest.mark.usefixtures("lean")
def test_a_database_that_goes_away_and_does_not_come_back(
    finished: Finished,
    tmp_path: Path,
    prompt_files: dict[str, str],
    postgres: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends with a sentence; continued, it is the uninterrupted one."""
    monkeypatch.setattr(pipeline_run, "open_study", partial(open_study, patience=0.5, pause=0.01))
    _, whole, settings = finished
    options = {"search": {"trials": 3, "storage": postgres.make("away")}, "export": {"kind": "none"}}
    settings = quick_settings(prompt_files, Path(settings.cache_dir), **options)
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
    resumed = pipeline_run.run(settings, Recorder(), directory, resume=True).to_record()
    assert outcomes(resumed) == outcomes(whole)[:3]


def test_a_worker_waits_for_the_setup_of_the_present_session(finished: Finished, tmp_path: Path) -> None:
    """A continued run may have more trials than the setup of its earlier session says."""
    path, _, _ = finished
    run = copy_run(path, tmp_path / "run")
    study = optuna.load_study(study_name=None, storage=storage.open_storage("", run / "study.journal"))
    storage.share(study, "session", b"a later one")
    looks = itertools.count()

    def check() -> None:
        if next(looks) == 2:
            storage.share(study, "session of setup", b"a later one")

    recorder = Recorder()
    place = ("", run / "study.journal", STUDY_NAME)
    workers.wait_for_setup(*place, recorder, check, poll=0.01)
    assert next(looks) == 3
    assert len(recorder.notes) == 1


def test_a_session_that_fails_before_its_setup_leaves_the_earlier_one(
    finished: Finished, prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is at work a worker waits; after that the earlier setup holds again."""
    path, _, _ = finished
    run = copy_run(path, tmp_path / "run")
    study = optuna.load_study(study_name=None, storage=storage.open_storage("", run / "study.journal"))
    place, waits = ("", run / "study.journal", STUDY_NAME), list[bool]()

    def stop() -> None:
        raise Interrupted(130)

    def fail(*given: Any) -> None:
        with pytest.raises(Interrupted):
            workers.wait_for_setup(*place, Recorder(), stop, poll=0.01)
        waits.append(True)
        raise AbliterateError("The unedited model can't be measured.")

    assert shared(study, "session") == shared(study, "session of setup") != b""
    monkeypatch.setattr(stages, "baseline", fail)
    with pytest.raises(AbliterateError, match="can't be measured"):
        run_in(run, quick_settings(prompt_files, tmp_path / "cache", search={"trials": 5}), resume=True)
    assert waits == [True]
    setup, _ = workers.wait_for_setup(*place, Recorder(), stop, poll=0.01)
    assert setup.identity
