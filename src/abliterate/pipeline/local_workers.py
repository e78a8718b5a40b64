"""Start, watch and stop the workers of a run on further devices of this machine (`--gpus`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.settings.schema import Settings


class LocalWorkers:
    """The worker processes of a run on this machine, one per further device."""

    def __init__(
        self, directory: RunDirectory, devices: Sequence[str], url: str, warn: Callable[[str], None], options: Sequence[str]
    ) -> None:
        self._warn = warn
        self._logs = [directory.path / f"worker-{index + 1}.log" for index in range(len(devices))]
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        # -P: files of the current folder, which may be a stranger's run, must not be imported.
        command = [sys.executable, "-P", "-m", "abliterate", "worker", str(directory.path), "--end-with-input", *options]
        # The settings.toml of the run doesn't hold the database's password.
        environment = os.environ | ({"ABLITERATE_SEARCH__STORAGE": url} if url else {})
        for index, device in enumerate(devices):
            with self._logs[index].open("wb") as log:
                self._running[index] = subprocess.Popen(
                    [*command, "--device", device],
                    stdin=subprocess.PIPE,  # it ends when this process does, even if that is killed
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    # A terminal's Ctrl+C is for the run alone, which asks its workers: a second signal would end them at once.
                    start_new_session=True,
                )

    def check(self) -> None:
        """Warn of each worker that has failed since the last check; the run continues without it."""
        for index, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[index]
            _close(process)
            if code != 0:
                log = self._logs[index]
                last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
                self._warn(f"Worker {index + 1} has ended ({last.removeprefix('error: ').rstrip('.')}); see {log.name}.")

    def end(self) -> None:
        """Ask the running workers to stop, which they do after the current pass, and wait for them."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _close(process)
        self._running.clear()


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def local_workers(
    directory: RunDirectory, devices: Sequence[str], url: str, warn: Callable[[str], None], options: Sequence[str] = ()
) -> Iterator[Callable[[], None]]:
    """Keep workers running on the devices during the `with` block, which gets their `check`.

    `url` is the study's database, and `options` are further options of the command `abliterate worker`.
    """
    workers = LocalWorkers(directory, devices, url, warn, options)
    try:
        yield workers.check
    finally:
        workers.end()


def own_places(settings: Settings) -> list[str]:
    """The run's folders of caches as options: a worker of another machine has its own, but those of this one share them."""
    cache = ["--cache-dir", settings.cache_dir] if settings.cache_dir else []
    folder = settings.efficiency.residual_cache_dir
    return cache + (["--set", f"efficiency.residual_cache_dir={folder}"] if folder else [])


def devices_of(gpus: int, device: torch.device, named: str = "auto") -> list[str]:
    """The `gpus` − 1 devices of the further workers of a run that itself works on `device`, which the settings call `named`.

    The cores of a CPU are shared by as many workers as are asked for, if the settings name it.

    Raises:
        InputError: the machine has fewer devices.
    """
    if gpus <= 1:
        return []
    if device.type == "cpu":
        if named == "auto":
            raise InputError(
                f"This machine has no GPU that torch can use, so --gpus {gpus} finds none; leave --gpus out, or add --device "
                f"cpu to search with {gpus} processes on the CPU."
            )
        return ["cpu"] * (gpus - 1)
    count = torch.accelerator.device_count()
    if gpus > count:
        there = f"{count} devices" if count != 1 else "1 device"
        raise InputError(f"This machine has {there} of type {device.type}, not {gpus}; give --gpus {count}, or leave it out.")
    own_index = device.index or 0
    return [f"{device.type}:{index}" for index in range(count) if index != own_index][: gpus - 1]
