"""Several processes and machines at one study: what a run leaves for its workers, and what a worker does.

A worker loads the model and searches; directions, prompts, response prefix and baseline it has from the study's storage. Knows
no order of a run's stages but the part it repeats.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from safetensors.torch import load

from abliterate import stages
from abliterate.bench import Bench, load_and_calibrate
from abliterate.directions import Directions
from abliterate.errors import InputError
from abliterate.evaluation.editor import Editor
from abliterate.identity import study_identity
from abliterate.inputs import Context, PromptSets
from abliterate.rundir import RunDirectory
from abliterate.search import STUDY_NAME, Study, changed_parts, open_study
from abliterate.settings import Settings
from abliterate.settings_sources import check_storage, config_path, dump_settings, load_settings, merge
from abliterate.storage import first_line, open_storage, shared
from abliterate.types import Baseline, Prompt, Reporter

FORMAT = 1
# What a run shares, by name; the setup comes last.
_SETUP, _DIRECTIONS = "setup", "directions"
# Settings that name files of the run's machine: their content is shared.
_FILES = ("evaluation.markers", "load.chat_template")
_LOOK_AGAIN = 2.0


@dataclass(frozen=True)
class Setup:
    """Everything that trials of a run depend on, as one worker gives it to others."""

    settings: str
    files: Mapping[str, str]
    dtype: str
    prefix: str
    prompts: PromptSets
    baseline: Baseline
    identity: Mapping[str, str]

    def to_bytes(self) -> bytes:
        """JSON, the inverse of `of_bytes`."""
        sets = {name: [(one.text, one.system) for one in part] for name, part in vars(self.prompts).items()}
        base = self.baseline
        scores = [base.refusals, base.prompts, *([dict(base.values)] if base.values else [])]  # as earlier versions read it
        record = vars(self) | {"format": FORMAT, "prompts": sets, "baseline": scores}
        return json.dumps({**record, "files": dict(self.files), "identity": dict(self.identity)}).encode()

    @staticmethod
    def of_bytes(content: bytes) -> Setup:
        """Inverse of `to_bytes`; InputError where another version of abliterate wrote it."""
        record = json.loads(content)
        found = record.pop("format", None)
        if found != FORMAT:
            raise InputError(
                f"The study was set up by another version of abliterate (format {found}, not {FORMAT}); install the same "
                "version on all machines."
            )
        sets = {name: tuple(Prompt(*one) for one in part) for name, part in record.pop("prompts").items()}
        return Setup(prompts=PromptSets(**sets), baseline=Baseline(*record.pop("baseline")), **record)


def publish(context: Context, bench: Bench, study: Study, baseline: Baseline, prompts: PromptSets, directions: Path) -> None:
    """Leave what workers need in the study's storage. No path of this machine, no place of the storage."""
    settings = context.settings
    plain = settings.model_copy(
        update={
            "out": "",
            "cache_dir": "",
            "device": "auto",
            "load": settings.load.model_copy(update={"device_map": "", "max_memory": {}, "offload_folder": ""}),
            "search": settings.search.model_copy(update={"storage": ""}),
            "efficiency": settings.efficiency.model_copy(update={"residual_cache_dir": ""}),
            "prompts": type(settings.prompts)(),
            "evaluation": settings.evaluation.model_copy(update={"heldout_scorers": ()}),
            "export": type(settings.export)(),
        }
    )
    files = {name: path.read_text(encoding="utf-8") for name in _FILES if (path := _file(settings, name)) is not None}
    setup = Setup(
        settings=dump_settings(plain),
        files=files,
        dtype=bench.loaded.info.dtype,
        prefix=bench.calibration.response_prefix,
        prompts=prompts,
        baseline=baseline,
        identity=context.result.record["identity"],
    )
    study.share(_DIRECTIONS, directions.read_bytes())
    study.share(_SETUP, setup.to_bytes())


def _file(settings: Settings, name: str) -> Path | None:
    section, option = name.split(".")
    given = getattr(getattr(settings, section), option)
    if name == "evaluation.markers" and not given:  # the default file may be another in another version
        return config_path("markers.txt")
    return Path(given).expanduser() if given else None


def place_of(run: Path | None, url: str, name: str) -> tuple[str, Path, str]:
    """(database or "", journal, name of the study) that a worker is told: by a run's directory, or by both options.

    Raises:
        InputError: neither or both, or there is no run.
    """
    if (run is None) == (not url):
        raise InputError("A worker needs a run's directory, or --storage URL and --study NAME; give one of them.")
    if run is None:
        if not name:
            raise InputError("A worker at a database needs the study's name; the run says it, and keeps it in study.name.")
        return url, Path(), name
    directory = RunDirectory(run)
    if not directory.holds_run:
        raise InputError(f"There is no run in {run}; name a run's directory, or give --storage and --study.")
    stored = load_settings(str(directory.settings)).search.storage if directory.settings.exists() else ""
    study = directory.study_name() if directory.study.exists() else STUDY_NAME
    check_storage(stored, f"--storage URL --study {study} instead of the directory")
    return stored, directory.journal, study


def wait_for_setup(
    url: str, journal: Path, name: str, reporter: Reporter, check: Callable[[], None]
) -> tuple[Setup, Directions]:
    """What the run has left in the storage, as soon as it is there.

    Raises:
        InputError: no such storage or study.
    """
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(url, journal))
    except KeyError as error:
        raise InputError(f"The storage holds no study {name}; begin the run first, or check --study.") from error
    except Exception as error:
        raise InputError(
            f"The study can't be opened: {first_line(error)}; check --storage and that the database runs."
        ) from error
    said = False
    while True:
        directions, setup = shared(study, _DIRECTIONS), shared(study, _SETUP)
        if directions is not None and setup is not None:
            return Setup.of_bytes(setup), Directions(load(directions)["directions"])
        if not said:
            reporter.note("waiting for the run to compute its directions and baseline")
            said = True
        check()
        time.sleep(_LOOK_AGAIN)


@contextlib.contextmanager
def settings_of(setup: Setup, own: Mapping[str, Any]) -> Iterator[Settings]:
    """The run's settings on this machine; `own` options (device, model, …) win. Files are there while active."""
    with tempfile.TemporaryDirectory(prefix="abliterate-worker-") as name:
        folder = Path(name)
        (folder / "settings.toml").write_text(setup.settings, encoding="utf-8")
        over: dict[str, Any] = {"load": {"dtypes": [setup.dtype]}}
        for option, content in setup.files.items():
            section, leaf = option.split(".")
            path = folder / leaf
            path.write_text(content, encoding="utf-8")
            over = merge(over, {section: {leaf: str(path)}})
        yield load_settings(str(folder / "settings.toml"), merge(over, own))


def join(place: tuple[str, Path, str], setup: Setup, directions: Directions, context: Context) -> tuple[Bench, Editor, Study]:
    """The model ready for trials, and the study to find them in.

    Raises:
        InputError: its trials would mean something else than the run's.
    """
    settings, (url, journal, name) = context.settings, place
    bench = load_and_calibrate(context, setup.prompts, setup.prefix)
    identity = study_identity(settings, bench.loaded, setup.prefix, setup.prompts.all_sets(), bench.objectives)
    changed = changed_parts(setup.identity, identity)
    if changed:
        raise InputError(
            f"This worker can't join the run with another {', '.join(changed)}: its trials would mean something else; give "
            "the same model, and the same versions."
        )
    study = open_study(url, journal, stages.search_space(settings, bench), settings.seed, name, worker=uuid.uuid4().hex)
    editor = stages.make_editor(context, bench, directions)
    bench = stages.trial_engine(context, bench, editor, setup.prompts)
    own = stages.baseline(context, bench, setup.prompts)
    if own.refusals != setup.baseline.refusals:
        context.reporter.warn(
            f"On this machine the model refuses {own.refusals} prompts, in the run {setup.baseline.refusals}; its trials may "
            "be off by as much."
        )
    for name, value in setup.baseline.values.items():
        if not math.isclose(own.value(name), value, rel_tol=1e-3, abs_tol=1e-6):
            context.reporter.warn(
                f"On this machine the scorer {name} gives the model {own.value(name):.6g}, in the run {value:.6g}; its trials "
                "may be off by as much."
            )
    return bench, editor, study


class LocalWorkers:
    """Workers of a run on further devices of this machine: started, watched and ended with it."""

    def __init__(self, directory: RunDirectory, devices: Sequence[str], url: str, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._logs = [directory.path / f"worker-{index + 1}.log" for index in range(len(devices))]
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        command = [sys.executable, "-m", "abliterate", "worker", str(directory.path)]
        # The run's settings.toml has no password.
        environment = os.environ | ({"ABLITERATE_SEARCH__STORAGE": url} if url else {})
        for index, device in enumerate(devices):
            with self._logs[index].open("wb") as log:
                self._running[index] = subprocess.Popen(
                    [*command, "--device", device],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )

    def look(self) -> None:
        """Say which of them have failed since the last look: the run goes on without them."""
        for index, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[index]
            if code != 0:
                log = self._logs[index]
                last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
                self._warn(f"Worker {index + 1} has ended ({last.removeprefix('error: ').rstrip('.')}); see {log.name}.")

    def end(self) -> None:
        """Ask those still there to stop, which they do after the current pass, and wait for them."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process in self._running.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


@contextlib.contextmanager
def local_workers(
    directory: RunDirectory, devices: Sequence[str], url: str, warn: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """`LocalWorkers` on the devices while active; gives what says which of them have failed. `url`: of the study's database."""
    started = LocalWorkers(directory, devices, url, warn)
    try:
        yield started.look
    finally:
        started.end()


def devices_of(gpus: int, device: torch.device) -> list[str]:
    """Devices of the further workers of a run that itself works on `device`: `gpus` − 1 of them.

    Raises:
        InputError: the machine has fewer.
    """
    if gpus <= 1:
        return []
    if device.type == "cpu":  # its cores are shared
        return ["cpu"] * (gpus - 1)
    count = torch.accelerator.device_count()
    if gpus > count:
        raise InputError(f"This machine has {count} devices of type {device.type}, not {gpus}; give a smaller --gpus.")
    own = device.index or 0
    return [f"{device.type}:{index}" for index in range(count) if index != own][: gpus - 1]
