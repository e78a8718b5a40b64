"""Run the command line in processes that start at once, because they are forked from a process that has everything imported.

Tests use them to kill a run, signal it, or fill its disk. The `--json` lines show the stages as they begin.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from support.paths import TESTS

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["support.warm"])
# The server of forks is started without its parent's `sys.path`.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


def _child(
    work: Callable[..., None],
    given: Sequence[Any],
    folder: str,
    environment: dict[str, str],
    before: Callable[[], None] | None,
    out: str,
    err: str,
) -> None:
    """In the child: run `work` with its output in files; the process ends with it."""
    os.chdir(folder)
    os.environ.update(environment)
    for name, descriptor in ((out, 1), (err, 2)):
        file = os.open(name, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    if before is not None:
        before()
    try:
        work(*given)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def abliterate(arguments: Sequence[str]) -> None:
    """Run the command line as its entry point does."""
    sys.argv = ["abliterate", *arguments]
    from abliterate.cli import app

    app.main()


class Forked:
    """One function in a child process. `out` and `err` are its output so far; `before` runs in the child.

    The function and its arguments are pickled by name, so they must come from `support`, not from a test file.
    """

    def __init__(
        self,
        work: Callable[..., None],
        given: Sequence[Any],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        number = len(list(folder.glob(".out-*")))
        self._out, self._err = folder / f".out-{number}", folder / f".err-{number}"
        self._out.touch()
        self._err.touch()
        variables = {"ABLITERATE_CACHE_DIR": os.environ["ABLITERATE_CACHE_DIR"], **(environment or {})}
        self.process = CONTEXT.Process(
            target=_child,
            args=(work, given, str(folder), variables, before, str(self._out), str(self._err)),
            daemon=True,
        )
        self.process.start()

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="surrogateescape")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="surrogateescape")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The complete `--json` lines so far."""
        return [json.loads(line) for line in self.out.split("\n")[:-1]]

    def wait_for(self, seen: Callable[[list[dict[str, Any]]], bool], timeout: float = 120) -> bool:
        """Wait until the events meet the condition; False if the command ended before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if seen(self.events):
                return True
            if not self.process.is_alive():
                return seen(self.events)
            time.sleep(0.002)
        raise AssertionError(f"nothing came of it: {self.out} {self.err}")

    def send(self, number: int) -> None:
        """Send a signal; it is no error if the process has ended already."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.pid:
                os.kill(self.process.pid, number)

    def end(self, timeout: float = 180) -> int:
        """Wait for the end, and return the exit code (negative: killed by that signal)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it doesn't end: {self.out} {self.err}")
        assert self.process.exitcode is not None
        return self.process.exitcode


class Command(Forked):
    """One `abliterate` command in a child process."""

    def __init__(self, arguments: Sequence[object], folder: Path, **options: Any) -> None:
        super().__init__(abliterate, [[*map(str, arguments)]], folder, **options)


def finish(arguments: Sequence[object], folder: Path, **options: Any) -> Command:
    """Run a command to its end."""
    command = Command(arguments, folder, **options)
    command.end()
    return command


def write_config(path: Path, options: Mapping[str, Any]) -> Path:
    """`quick_options` as a file for `-c`."""
    path.write_text(tomli_w.dumps(dict(options)), encoding="utf-8")
    return path


def of_stage(name: str) -> Callable[[list[dict[str, Any]]], bool]:
    """A condition for `wait_for`: the stage has been announced."""
    return lambda events: any(event["event"] == "stage" and event["name"] == name for event in events)


def durations(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The seconds from each stage's announcement to the next stage's."""
    stages = [(event["name"], event["time"]) for event in events if event["event"] == "stage"]
    ends = [time for _, time in stages[1:]] + [events[-1]["time"]]
    return {name: end - begin for (name, begin), end in zip(stages, ends, strict=True)}


class NoPictures:
    """In the child: a report without pictures, which take a second each."""

    def __call__(self) -> None:
        from abliterate.report import draw

        draw.svg = lambda specs: (dict.fromkeys(specs, ""), "")


class Lean(NoPictures):
    """In the child, as the fixture `lean` in this process: no answers either, and a short self-check of the engine."""

    def __call__(self) -> None:
        from abliterate.engine import self_check
        from abliterate.pipeline import report_data

        super().__call__()
        report_data.answers = lambda bench, trial: None
        self_check.ROWS = self_check.TOKENS = 2


class OfHub:
    """In the child: the Hub is at a port of this machine, as its variables of the environment say it to a new interpreter."""

    def __init__(self, port: int, home: str) -> None:
        self.port, self.home = port, home

    def __call__(self) -> None:
        import importlib

        from huggingface_hub import constants, hf_api

        os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{self.port}", HF_HUB_OFFLINE="0", HF_HOME=self.home)
        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT  # copied when it was imported


class ForkedPopen:
    """`subprocess.Popen` of `python -m abliterate …`, as far as `local_workers` uses it, forked and so started at once."""

    def __init__(
        self, command: Sequence[str], *, stdin: int, stdout: Any, stderr: int, env: Mapping[str, str], start_new_session: bool
    ) -> None:
        assert list(command[:4]) == [sys.executable, "-P", "-m", "abliterate"]
        assert start_new_session, "a terminal's Ctrl+C would reach the worker beside the run's signal, and end it at once"
        self.stdin = None  # a forked child ends with its parent in any case
        arguments = [argument for argument in command[4:] if argument != "--end-with-input"]
        given = (arguments, os.getcwd(), dict(env), None, stdout.name, stdout.name)
        self._process = CONTEXT.Process(target=_child, args=(abliterate, [given[0]], *given[1:]), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid
        os.kill(self._process.pid, number)

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode


def import_afresh(packages: Sequence[str], modules: Sequence[str], asked: str) -> None:
    """Import modules as if nothing of the packages had been imported, and print whether a module came with them."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    for path in reversed(os.environ["PYTHONPATH"].split(os.pathsep)):
        sys.path.insert(0, path)
    for name in modules:
        importlib.import_module(name)
    print(asked in sys.modules)


class Held(Lean):
    """In the child: trials wait for a file before they are evaluated, so that it is known where each process is."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> None:
        from abliterate.pipeline import stages

        super().__call__()
        evaluate = stages.evaluate

        def held(*given: Any) -> Any:
            while not self.file.exists():
                time.sleep(0.01)
            return evaluate(*given)

        stages.evaluate = held


class Slow:
    """In the child: a stage waits for a moment, or until a signal has arrived, which so surely arrives during it."""

    def __init__(self, stage: str, seconds: float = 0.5) -> None:
        self.stage, self.seconds = stage, seconds

    def __call__(self) -> None:
        from abliterate.terminal import reporters

        announce = reporters.JsonReporter.stage
        arrived, wakeup = os.pipe()
        os.set_blocking(wakeup, False)

        def slow(reporter: reporters.JsonReporter, name: str, detail: str = "", *, at_once: bool = False) -> None:
            if name == self.stage:
                signal.set_wakeup_fd(wakeup)
            announce(reporter, name, detail, at_once=at_once)
            if name == self.stage:
                select.select([arrived], [], [], self.seconds)

        reporters.JsonReporter.stage = slow  # type: ignore[method-assign]


class Stuck:
    """In the child: a pass of the search that doesn't end."""

    def __call__(self) -> None:
        from abliterate.pipeline import stages

        def forever(*args: Any) -> Any:
            os.write(1, b'{"event": "stuck"}\n')  # among the lines of --json, where prints don't go
            while True:
                time.sleep(0.01)

        stages.evaluate = forever  # type: ignore[assignment]


class Pipes(NoPictures):
    """In the child: nobody reads what is written to the descriptors `unread`, as after `| head` or q in `less`.

    Standard input is the file `typed`, if it is given; the system takes all streams for this `encoding`.
    """

    def __init__(self, *unread: int, typed: str = "", encoding: str = "utf-8") -> None:
        self.unread, self.typed, self.encoding = unread, typed, encoding

    def __call__(self) -> None:
        super().__call__()
        for descriptor in self.unread:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, descriptor)
            os.close(writing)
        if self.typed:
            sys.stdin = open(self.typed, encoding=self.encoding)  # noqa: SIM115
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding=self.encoding, closefd=False) for number in (1, 2))
