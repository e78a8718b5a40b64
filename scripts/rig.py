"""Set up a model for the measuring scripts as a run does, evaluate trials on it, and count forward passes and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from abliterate import Workbench, find_directions, load
from abliterate.edits import AUTO
from abliterate.model.memory import PeakMeter
from abliterate.objectives import KL, REFUSALS
from abliterate.pipeline import stages
from abliterate.scorers import Observation
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings, merge, parse_assignments
from abliterate.types import Baseline, Table, Trial, TrialParams


class Quiet:
    """A reporter that prints only warnings, and measures memory from the moment the weights are loaded."""

    def __init__(self) -> None:
        self.memory = PeakMemory()

    def header(self, fields: Mapping[str, str]) -> None:
        """Start measuring: the header is shown as soon as the weights are loaded."""
        self.memory.start()

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None: ...
    def stage_ended(self) -> None: ...
    def progress(self, done: int, total: int, unit: str) -> None: ...
    def note(self, text: str, **fields: Any) -> None: ...
    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None: ...
    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None: ...
    def close(self) -> None: ...
    def warn(self, text: str) -> None:
        print(f"warning: {text}", flush=True)


@dataclass
class Counters:
    """The number of all forward passes, and of the token positions in them."""

    passes: int = 0
    tokens: int = 0

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a pass; this is a forward pre-hook of the whole model."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.passes += 1
        self.tokens += ids.numel() if ids is not None else 0


@dataclass
class Rig:
    """A workbench that is ready for trials, with the base model's scores."""

    bench: Workbench
    baseline: Baseline
    memory: PeakMemory
    counters: Counters = field(default_factory=Counters)

    def evaluate(self, number: int, params: TrialParams, pruner: DominancePruner) -> Trial:
        """Evaluate one trial as a run does."""
        return stages.evaluate(self.bench, number, params, pruner)

    def pruner(self, done: Sequence[Trial]) -> DominancePruner:
        """The pruner after the trials `done`."""
        return DominancePruner.of(done, self.baseline, self.bench.objectives)

    def replay(self, trials: Sequence[TrialParams]) -> list[Trial]:
        """Evaluate a fixed list of trials, each with the pruning limit from the trials before it."""
        done: list[Trial] = []
        for number, params in enumerate(trials):
            done.append(self.evaluate(number, params, self.pruner(done)))
        return done


def make_rig(settings: Settings, *, with_baseline: bool = True) -> Rig:
    """Carry out the stages of a run before its search: load, calibrate, residuals, directions, engine, baseline.

    A random model refuses nothing, so without a baseline only its log-probabilities are kept, for the KL. The objectives are
    those of comparable tools, because these scripts measure the engine, which no other scorer concerns; the edit mode is full,
    by which the recorded trials were found, unless another one is given.
    """
    reporter = Quiet()
    search = settings.search.model_copy(update={"objectives": (REFUSALS, KL)})
    edit = settings.edit.model_copy(update={"mode": "full"}) if settings.edit.mode == AUTO else settings.edit
    bench = load(settings.model_copy(update={"search": search, "edit": edit}), reporter)
    find_directions(bench)
    rig = Rig(bench, stages.baseline(bench) if with_baseline else _log_probabilities_only(bench), reporter.memory)
    bench.loaded.model.register_forward_pre_hook(rig.counters.count, with_kwargs=True)
    return rig


def _log_probabilities_only(bench: Workbench) -> Baseline:
    with bench.base():
        logprobs = bench.engine.first_logprobs(bench.prompts.harmless_eval)
    for scorer in bench.scorers:
        scorer.setup(Observation((), logprobs))
    return Baseline(1, len(bench.prompts.harmful_eval))


class PeakMemory:
    """Peak resident and device memory between `start` and `stop` in bytes, also relative to the memory at `start`."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._meter = PeakMeter()

    def start(self) -> None:
        """Forget the peak so far."""
        self._before = self._process.memory_info().rss
        self._meter.restart()

    def stop(self) -> dict[str, int]:
        """The peaks since `start`."""
        return {"rss": self._meter.rss(), "rss_above": self._meter.rss() - self._before, "device": self._meter.device()}


def timed(work: Any) -> tuple[Any, float]:
    """The result of `work` and its seconds."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def settings_of(model: str, seed: int, assignments: Sequence[str] = ()) -> Settings:
    """The settings of a run of the demo, or of a model in a folder, on its own prompts."""
    options: dict[str, Any] = {"model": model, "seed": seed, "evaluation": {"heldout": False}}
    if model != "demo":
        names = ("harmful", "harmless", "harmful_eval", "harmless_eval")
        options["prompts"] = {name: str(Path(model) / "prompts" / f"{name}.jsonl") for name in names}
    return load_settings("", merge(options, parse_assignments(list(assignments))))
