"""The command line in processes of its own that start at once: forked from one that has everything imported.

For tests that kill, signal or fill a disk under a run. Stages are seen in the `--json` lines as they come.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

CONTEXT = multiprocessing.get_context("forkserver")
# What a run of the demo imports; imported only, since threads wouldn't survive a fork.
CONTEXT.set_forkserver_preload(
    [
        *("transformers.models.qwen2.modeling_qwen2", "transformers.models.qwen2.tokenization_qwen2"),
        *("abliterate.cli.app", "abliterate.cli.run", "peft", "peft.tuners.lora", "torch._dynamo", "torch._inductor"),
    ]
)


def _main(
    arguments: list[str], folder: str, environment: dict[str, str], before: Callable[[], None] | None, out: str, err: str
) -> None:
    """In the child: `abliterate` with these arguments; its end is the process's end."""
    os.chdir(folder)
    os.environ.update(environment)
    for name, descriptor in ((out, 1), (err, 2)):
        file = os.open(name, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    sys.argv = ["abliterate", *arguments]
    if before is not None:
        before()
    from abliterate.cli import app

    try:
        app.main()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


class Command:
    """One `abliterate` at work. `out` and `err` are what it has written so far; `before` runs in the child."""

    def __init__(
        self,
        arguments: Sequence[object],
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
            target=_main,
            args=([*map(str, arguments)], str(folder), variables, before, str(self._out), str(self._err)),
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
        """The whole lines of `--json` so far."""
        return [json.loads(line) for line in self.out.split("\n")[:-1]]

    def wait_for(self, seen: Callable[[list[dict[str, Any]]], bool], timeout: float = 60) -> bool:
        """Wait until the events say so; False where the command ended before."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if seen(self.events):
                return True
            if not self.process.is_alive():
                return seen(self.events)
            time.sleep(0.002)
        raise AssertionError(f"nothing came of it: {self.out} {self.err}")

    def send(self, number: int) -> None:
        """A signal; too late is no error."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.pid:
                os.kill(self.process.pid, number)

    def end(self, timeout: float = 60) -> int:
        """Wait for its end, and return the exit code (negative: killed by that signal)."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it doesn't end: {self.out} {self.err}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def finish(arguments: Sequence[object], folder: Path, **options: Any) -> Command:
    """A command that has ended."""
    command = Command(arguments, folder, **options)
    command.end()
    return command


def write_config(path: Path, options: Mapping[str, Any]) -> Path:
    """`quick_options` as a file for `-c`."""
    path.write_text(tomli_w.dumps(dict(options)), encoding="utf-8")
    return path


def of_stage(name: str) -> Callable[[list[dict[str, Any]]], bool]:
    """For `wait_for`: the stage has been announced."""
    return lambda events: any(event["event"] == "stage" and event["name"] == name for event in events)


def durations(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds from each stage's announcement to the next one's."""
    stages = [(event["name"], event["time"]) for event in events if event["event"] == "stage"]
    ends = [time for _, time in stages[1:]] + [events[-1]["time"]]
    return {name: end - begin for (name, begin), end in zip(stages, ends, strict=True)}
