"""Processes for tests of what happens to workers whose run is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import Interrupted
from abliterate.pipeline.local_workers import LocalWorkers
from abliterate.terminal.interrupts import Interrupts, end_with


def keep_a_worker(folder: str) -> None:
    """Start a worker of the run in `folder` as `--gpus` does, print its process id, and do nothing more."""
    workers = LocalWorkers(RunDirectory(Path(folder)), ["cpu"], "", print, ())
    print(*(process.pid for process in workers._running.values()), flush=True)
    time.sleep(300)


def wait_on(descriptor: int, deaf: bool) -> None:
    """Work until the pipe ends: with safe points, or in one step without any (`deaf`). Prints how it ended."""
    interrupts = Interrupts()
    end_with(descriptor, patience=0.5)
    try:
        with interrupts.listening():
            while True:
                time.sleep(0.01)
                if not deaf:
                    interrupts.check()
    except Interrupted as ended:
        print("safe point", ended.exit_code, flush=True)
    except KeyboardInterrupt:
        print("at once", flush=True)


def child_of_a_killed_process(deaf: bool) -> None:
    """Fork a child that works until this process is gone, then be killed."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        wait_on(reading, deaf)
        os._exit(0)
    os.close(reading)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
