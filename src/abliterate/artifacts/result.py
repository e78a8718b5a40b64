"""`result.json` and the measuring of stages: what a run did, written atomically after every trial.

Owns the file's layout (DESIGN §6), time and memory per stage. Knows no model.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from abliterate import __version__
from abliterate.artifacts.run_directory import FORMAT, OtherVersion, RunDirectory
from abliterate.errors import InputError
from abliterate.files import DIGEST, digest_of, write_json
from abliterate.model.memory import PeakMeter
from abliterate.objectives import DEFAULT, to_records
from abliterate.plugins import installed
from abliterate.prompts.files import digest, public_source
from abliterate.types import Baseline, ModelInfo, Objective, Prompt, Reporter, Trial

_PACKAGES = ("torch", "transformers", "peft", "optuna", "safetensors")


class RunResult:
    """The record behind `result.json`; `save` makes it durable, unless there is no `directory` to write to.

    Timings add up over all sessions of a run, and memory is the peak of all.
    """

    def __init__(self, directory: RunDirectory | None, reporter: Reporter) -> None:
        self._directory = directory
        self._reporter = reporter
        self._stage, self._counted_to = "", 0.0
        self._meter = PeakMeter()
        self.record: dict[str, Any] = {
            "format": FORMAT,
            "model": {},
            "prompts": {},
            "objectives": [],
            "baseline": {},
            "trials": [],
            "front": [],
            "selected": None,
            "export": {"kind": "none", "path": None, "verified": None, "pushed": None},
            "timings": {},
            "memory": {"peak_rss_bytes": 0, "peak_device_bytes": 0, "stages": {}},
            "caches": {},
            "environment": environment(),
        }

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "") -> Iterator[None]:
        """Announce a stage, and record how long it took and its memory peak."""
        self._reporter.stage(name, detail)
        self._meter.restart()
        self._stage, self._counted_to = name, time.perf_counter()
        try:
            yield
        finally:
            self._count()
            self._stage = ""

    def _count(self) -> None:
        """Add the time since the last count to the current stage."""
        now = time.perf_counter()
        spent = self.record["timings"].get(self._stage, 0.0) + now - self._counted_to
        self.record["timings"][self._stage], self._counted_to = round(spent, 3), now
        memory = self.record["memory"]
        of_stage = memory.setdefault("stages", {}).setdefault(self._stage, {})
        for name, peak in (("peak_rss_bytes", self._meter.rss()), ("peak_device_bytes", self._meter.device())):
            of_stage[name] = max(peak, of_stage.get(name, 0))
            memory[name] = max(peak, memory[name])

    def go_on(self) -> None:
        """Start from what earlier sessions of the run left: an interruption must not make it forget its export."""
        assert self._directory is not None
        try:
            self.record |= self._directory.read_result() | {"environment": environment()}
        except OtherVersion:
            raise
        except InputError:  # a file that can't be read is built anew: the study has the trials
            pass

    def describe(self, info: ModelInfo, device_name: str) -> None:
        """Which model, on what. No path of this machine: results are shared."""
        self.record["model"] = {
            "id": info.id,
            "revision": info.revision,
            "fingerprint": info.fingerprint,
            "family": info.family,
            "n_layers": info.n_layers,
            "d_model": info.d_model,
            "n_parameters": info.n_parameters,
            "dtype": info.dtype,
            "quantization": info.quantization,
        }
        self.record["environment"]["device"] = device_name

    def prompts(self, sources: Mapping[str, str], sets: Mapping[str, Sequence[Prompt]]) -> None:
        """Which prompts: of a file its name, not where it lies."""
        self.record["prompts"] = {
            name: {"source": public_source(sources[name]), "count": len(part), "digest": digest(part)}
            for name, part in sets.items()
        }

    def trials(
        self,
        trials: Sequence[Trial],
        front: Sequence[Trial],
        baseline: Baseline,
        objectives: Sequence[Objective] = DEFAULT,
    ) -> None:
        """All finished trials and the front among them."""
        self.record["objectives"] = to_records(objectives)
        self.record["baseline"] = baseline.to_record()
        self.record["trials"] = [trial.to_record() for trial in trials]
        self.record["front"] = [trial.number for trial in front]

    def caches(self, **counts: Mapping[str, int]) -> None:
        """Hits and misses by cache."""
        self.record["caches"] = {name: dict(count) for name, count in counts.items()}

    def save(self) -> None:
        """Write `result.json`, with the current stage's time so far: an interruption must not lose it."""
        if self._stage:
            self._count()
        self.record[DIGEST] = digest_of(self.record)
        if self._directory is not None:
            write_json(self._directory.result, self.record)


def environment() -> dict[str, Any]:
    """Versions that a result depends on, with those of the packages that have plugins."""
    versions = {name: metadata.version(name) for name in _PACKAGES} | {one.package: one.version for one in installed()}
    return {
        "versions": {"abliterate": __version__, "python": platform.python_version(), **versions},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": "",
    }
