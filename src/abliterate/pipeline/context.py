"""The context that every stage is given: settings, reporter, artifact store, stage clock, and the check for interruptions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from abliterate import ranks
from abliterate.artifacts.cache import ArtifactStore, SharedStore, default_root
from abliterate.artifacts.result import Memory, Result
from abliterate.errors import AbliterateError, TrialError, first_line
from abliterate.model.memory import PeakMeter
from abliterate.prompts.sets import PromptSets, read_prompt_sets
from abliterate.settings.schema import Settings
from abliterate.types import Reporter


@contextlib.contextmanager
def unedited_errors() -> Iterator[None]:
    """Make whole sentences of the errors of measuring the unedited model, which no further trial could mend."""
    try:
        yield
    except TrialError as error:
        raise AbliterateError(
            f"The unedited model can't be measured ({first_line(error)}); give a smaller --batch-size, shorter prompts or "
            "another --dtype."
        ) from error


class StageClock:
    """The seconds and peak memory of each stage: the sum and the maximum over all sessions of a run."""

    def __init__(self, result: Result | None = None) -> None:
        self.timings: dict[str, float] = dict(result.timings) if result else {}
        empty = Memory(peak_rss_bytes=0, peak_device_bytes=0, stages={})
        self.memory = result.memory.model_copy(deep=True) if result else empty
        self._stage, self._counted_to = "", 0.0
        self._meter = PeakMeter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the `with` block, and count its time and memory for the stage `name`."""
        self._meter.restart()
        self._stage, self._counted_to = name, time.perf_counter()
        try:
            yield
        finally:
            self.count()
            self._stage = ""

    def count(self) -> None:
        """Add the time since the last count to the current stage, if there is one."""
        if not self._stage:
            return
        now = time.perf_counter()
        spent = self.timings.get(self._stage, 0.0) + now - self._counted_to
        self.timings[self._stage], self._counted_to = round(spent, 3), now
        peaks = self.memory.stages.setdefault(self._stage, {})
        for name, peak in (("peak_rss_bytes", self._meter.rss()), ("peak_device_bytes", self._meter.device())):
            peaks[name] = max(peak, peaks.get(name, 0))
            setattr(self.memory, name, max(peak, getattr(self.memory, name)))


@dataclass(frozen=True)
class Context:
    """The tools that every stage may use. No stage hands a result to the next through it."""

    settings: Settings
    reporter: Reporter
    store: ArtifactStore
    check: Callable[[], None]
    clock: StageClock = field(default_factory=StageClock)

    @staticmethod
    def of(settings: Settings, reporter: Reporter, check: Callable[[], None] = lambda: None) -> Context:
        """A context with the artifact store that the settings name."""
        return Context(settings, reporter, make_store(settings, reporter), check)

    def with_settings(self, settings: Settings) -> Context:
        """The same context with other settings."""
        return replace(self, settings=settings)

    @contextlib.contextmanager
    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> Iterator[None]:
        """Announce a stage and its end, and record its duration and memory peak. `at_once` is as in `Reporter.stage`."""
        self.reporter.stage(name, detail, at_once=at_once)
        try:
            with self.clock.stage(name):
                yield
        finally:
            self.reporter.stage_ended()


def make_store(settings: Settings, reporter: Reporter) -> ArtifactStore:
    """The artifact store that the settings name."""
    efficiency = settings.efficiency
    return (ArtifactStore if ranks.size() == 1 else SharedStore)(
        default_root(efficiency.residual_cache_dir or settings.cache_dir),
        warn=reporter.warn,
        enabled=efficiency.enable_residual_cache,
        in_memory=efficiency.cache_residuals_in_memory,
    )


def read_prompts(context: Context) -> PromptSets:
    """The four prompt sets that the settings name."""
    with context.stage("prompts", at_once=True):
        return ranks.agree(lambda: read_prompt_sets(context.settings, context.reporter.warn, context.reporter.note))
