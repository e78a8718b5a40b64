"""Find batch sizes by a memory estimate and a binary search, and remember them.

The search works on callables; the probes below it run each operation on the loaded model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.engine.reference import ReferenceEngine
from abliterate.model.footprint import Shape, kept_bytes, prepared_bytes, row_bytes
from abliterate.model.loader import LoadedModel, Skeleton
from abliterate.model.memory import SHARE, PeakMeter, return_freed, synchronize, unless_full, usable_memory, used_memory
from abliterate.model.residuals import capture_batch
from abliterate.model.weights import in_features, n_matrices
from abliterate.pipeline.cache_keys import batch_sizes_key
from abliterate.pipeline.calibrate import WarmUp
from abliterate.pipeline.context import Context
from abliterate.prompts.sets import PromptSets
from abliterate.settings.schema import Settings
from abliterate.types import OPERATIONS, BatchSizes, Operation, Prompt

# Two sizes whose throughput differs by less are equally good; the smaller one needs less memory.
PLATEAU = 0.05

# Probes in all, and at most for the smallest size that is as fast.
_PROBES, _SHRINK_PROBES = 8, 4

# Sizes nearer to each other than this aren't told apart, and so many of such steps are taken at first: nearly a doubling.
_STEP, _FIRST_STEP = 1.2, 2


@dataclass(frozen=True)
class BatchTuning:
    """The chosen size and what was measured: {size: items per second, or None where it didn't fit}."""

    size: int
    probes: dict[int, float | None]


def even_sizes(items: int, maximum: int) -> list[int]:
    """Sizes worth a probe, ascending: equally full batches of `items`, at most `maximum` at a time, in steps of a fifth.

    100 items go as 100, 50, 34 or 25 at a time, never as 64 and 36.
    """
    found: list[int] = []
    for batches in range(math.ceil(items / maximum), items + 1):
        size = math.ceil(items / batches)
        if not found or size <= found[-1] / _STEP or (size == 1 and found[-1] > 1):
            found.append(size)
        if size == 1:
            break
    return found[::-1]


def tune_batch_size(
    probe: Callable[[int], float | None], sizes: Sequence[int], start: int, *, grow: bool = True, shrink: bool = True
) -> BatchTuning:
    """The smallest of `sizes` (ascending) that is as fast as any that fits, by binary search in at most eight probes.

    `probe(size)` gives items per second, None if the device runs out of memory. First from `start` (an estimate) to the
    largest size that fits, as long as growing gains speed; then to the smallest that is as fast. 1 where nothing fits.
    Without `grow`, larger sizes than `start` aren't tried; without `shrink`, smaller ones only if it doesn't fit.
    """
    probes: dict[int, float | None] = {}
    at = max((index for index, size in enumerate(sizes) if size <= start), default=0)
    fits, too_large, step = -1, len(sizes) if grow else at + 1, _FIRST_STEP
    while len(probes) < _PROBES and fits < at < too_large:
        before = probes[sizes[fits]] if fits >= 0 else None
        speed = probes[sizes[at]] = probe(sizes[at])
        fits, too_large = (fits, at) if speed is None else (at, too_large)
        if speed is not None and before is not None and speed < (1 + PLATEAU) * before:
            break
        # In growing steps away from the estimate, which is seldom far off; between what fits and what doesn't in the middle.
        if fits >= 0 and None in probes.values():
            at = (fits + too_large) // 2
        else:
            at, step = (max(0, at - step) if speed is None else min(len(sizes) - 1, at + step)), 2 * step
    slow, fast, step = -1, fits, _FIRST_STEP
    for _ in range(min(_SHRINK_PROBES, _PROBES - len(probes)) if shrink else 0):
        if fast - slow <= (1 if slow < 0 else _FIRST_STEP):
            break
        at, step = (max(0, fast - step) if slow < 0 else (slow + fast) // 2), 2 * step
        if sizes[at] not in probes:
            probes[sizes[at]] = probe(sizes[at])
        slow, fast = (slow, at) if sizes[at] in _as_fast_as_any(probes) else (at, fast)
    return BatchTuning(min(_as_fast_as_any(probes), default=1), probes)


def _as_fast_as_any(probes: Mapping[int, float | None]) -> list[int]:
    speeds = {size: speed for size, speed in probes.items() if speed is not None}
    return [size for size, speed in speeds.items() if speed >= (1 - PLATEAU) * max(speeds.values())]


def double_batch_size(probe: Callable[[int], float | None], maximum: int) -> BatchTuning:
    """The fastest of 1, 2, 4, … up to `maximum` or the first that doesn't fit: the plain way, as peers do it."""
    probes: dict[int, float | None] = {}
    size = 1
    while size <= maximum:
        probes[size] = probe(size)
        if probes[size] is None:
            break
        size *= 2
    fitting = {size: speed for size, speed in probes.items() if speed is not None}
    return BatchTuning(max(fitting, key=lambda size: fitting[size]) if fitting else 1, probes)


# Of a decoding probe. What the cache grows by until a response ends is added by arithmetic.
PROBE_TOKENS = 8

# Of a prefill at which a CPU is about as fast as it gets; larger batches would make the search longer than a trial.
CPU_TOKENS = 1024

# Layers at which the trial engine keeps hidden states.
STARTS = 4


@dataclass(frozen=True)
class BatchProbe:
    """What one size was measured to do: prompt or response tokens a second, and the memory it took above what was in use."""

    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Tuned:
    """One operation: the size chosen, the estimate that the search began with, bytes of one prompt, and what was measured.

    `probes`: {size: Probe, or None where it didn't fit}.
    """

    operation: Operation
    size: int
    start: int
    row_bytes: int
    probes: Mapping[int, BatchProbe | None]

    @property
    def speed(self) -> float:
        """Tokens a second at the size chosen, or at the measured one nearest to it; 0 where nothing fitted."""
        fitting = {size: found.tokens_per_second for size, found in self.probes.items() if found is not None}
        return fitting[min(fitting, key=lambda size: abs(size - self.size))] if fitting else 0.0

    def to_record(self) -> dict[str, Any]:
        """JSON form."""
        probes = [
            {"size": size, "fits": found is not None}
            | ({"tokens_per_second": round(found.tokens_per_second, 1), "peak_bytes": found.peak_bytes} if found else {})
            for size, found in sorted(self.probes.items())
        ]
        return {"size": self.size, "estimate": self.start, "row_bytes": self.row_bytes, "probes": probes}


def batch_sizes(
    context: Context,
    loaded: LoadedModel,
    engine: ReferenceEngine,
    prompts: PromptSets,
    told: Mapping[str, int] | None = None,
) -> BatchSizes:
    """As `told` or as the settings say, else as measured here before, else measured now; says which.

    `told` by another machine: no more rows than memory holds here by the estimate.
    """
    if told:
        probes = Probes(context, loaded, engine, prompts)
        rows = [row_bytes(probes.shape, name, *probes.lengths[name][1:]) for name in OPERATIONS]
        sizes = BatchSizes(told["residuals"], told["prefill"], told["decode"], (rows[0], rows[1], rows[2]))
        _say(context, sizes, "as told")
        return sizes
    given = context.settings.evaluation.batch_size
    if given:
        _say(context, BatchSizes.same(given), "as given")
        return BatchSizes.same(given)
    probes = Probes(context, loaded, engine, prompts)
    found = context.store.get("batch-sizes", probes.key)
    if found is not None:
        sizes = json.loads(from_bytes(found["sizes"]))
        known = BatchSizes(**sizes["sizes"], row_bytes=tuple(sizes["row_bytes"]))
        _say(context, known, "from the cache")
        return known
    return sizes_of(_measure(context, loaded, probes))


def tune(context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> tuple[Tuned, ...]:
    """Measure every operation, and keep what was found for later runs."""
    return _measure(context, loaded, Probes(context, loaded, engine, prompts))


def speeds_of(context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> dict[str, float]:
    """Tokens a second by operation, as measured here before, else measured now and kept for later runs."""
    probes = Probes(context, loaded, engine, prompts)
    found = context.store.get("batch-sizes", probes.key)
    known = json.loads(from_bytes(found["sizes"])).get("tokens_per_second") if found is not None else None
    return known or {one.operation: one.speed for one in _measure(context, loaded, probes)}


def _measure(context: Context, loaded: LoadedModel, probes: Probes) -> tuple[Tuned, ...]:
    if context.settings.efficiency.use_binary_search_batch_tuning:
        prefill = probes.search("prefill")
        # Done once: not worth more than a look whether what is good for prefill fits here too.
        tuned: tuple[Tuned, ...] = (probes.search("residuals", at_most=prefill.size), prefill, probes.search("decode"))
    else:
        tuned = probes.double()
    found = sizes_of(tuned)
    speeds = {one.operation: one.speed for one in tuned}
    text = json.dumps({"sizes": found.by_name, "row_bytes": found.row_bytes, "tokens_per_second": speeds})
    label = f"{loaded.info.id}: " + ", ".join(f"{name} {size}" for name, size in found.by_name.items())
    context.store.put("batch-sizes", probes.key, {"sizes": to_bytes(text)}, label)
    _say(context, found, f"found by {sum(len(one.probes) for one in tuned)} probes")
    return tuned


def sizes_of(tuned: Sequence[Tuned]) -> BatchSizes:
    """The sizes chosen, in the order of `OPERATIONS`."""
    residuals, prefill, decode = tuned
    return BatchSizes(residuals.size, prefill.size, decode.size, (residuals.row_bytes, prefill.row_bytes, decode.row_bytes))


def _say(context: Context, sizes: BatchSizes, how: str) -> None:
    distinct = set(sizes.by_name.values())
    each = ", ".join(f"{name} {size}" for name, size in sizes.by_name.items()) if len(distinct) > 1 else str(min(distinct))
    context.reporter.note(f"batch size: {each} ({how})", batch_sizes=sizes.by_name)


def _sets(prompts: PromptSets) -> dict[Operation, tuple[tuple[Prompt, ...], ...]]:
    return {
        "residuals": (prompts.harmful, prompts.harmless),
        "prefill": (prompts.harmless_eval,),
        "decode": (prompts.harmful_eval,),
    }


def reserved_bytes(
    settings: Settings, shape: Shape, loaded: LoadedModel | Skeleton, harmful: int, harmless: int, prompt: int
) -> int:
    """Bytes that are kept between trials, and what KL needs: the base's log-probabilities and the trial's."""
    kept = kept_bytes(shape, STARTS, harmful, harmless, prompt)
    modules = [target.module for target in loaded.targets for _ in range(n_matrices(target.module))]
    kept += prepared_bytes(loaded.info.n_layers, ((loaded.info.d_model, in_features(module)) for module in modules))
    return min(kept, settings.efficiency.max_kept_mb << 20) + 8 * harmless * shape.vocabulary


class Probes:
    """Probes of a loaded model, on the longest prompts of each operation's sets."""

    def __init__(self, context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> None:
        self._context, self._loaded, self._engine = context, loaded, engine
        self._device = loaded.device
        # {operation: (prompts in the larger set, tokens of the longest, tokens of a response)}
        self.lengths: dict[str, tuple[int, int, int]] = {}
        self._longest: dict[str, list[Prompt]] = {}
        for name, parts in _sets(prompts).items():
            tokens = [(len(engine.chat.token_ids(prompt)), prompt) for part in parts for prompt in part]
            tokens.sort(key=lambda pair: -pair[0])
            self._longest[name] = [prompt for _, prompt in tokens[: context.settings.evaluation.max_batch_size]]
            self.lengths[name] = (max(map(len, parts)), tokens[0][0], engine.max_new_tokens)
        self.key = batch_sizes_key(context.settings, loaded, self.lengths)
        model = loaded.model
        self.shape = Shape.of(model.config.get_text_config(), model.dtype)
        once = context.settings.efficiency.use_global_warmup
        self._warm_up = WarmUp(lambda: engine.generate_ids(self._longest["decode"][:1], 2), once=once)
        longest = max(self.lengths[name][1] for name in ("prefill", "decode"))
        counts = len(prompts.harmful_eval), len(prompts.harmless_eval)
        self._reserved = reserved_bytes(context.settings, self.shape, loaded, *counts, longest)

    def search(self, operation: Operation, at_most: int = 0) -> Tuned:
        """From the estimate to the best size; `at_most`: only whether that fits, else what does."""
        items, prompt, response = self.lengths[operation]
        estimate = row_bytes(self.shape, operation, prompt, response)
        maximum = min(at_most or items, self._context.settings.evaluation.max_batch_size)
        sizes = even_sizes(items, maximum)
        start = max(1, min(sizes[-1], self._usable() // estimate))
        is_plateau = self._device.type == "cpu" and operation == "prefill"
        if is_plateau:
            start = min(start, max(1, CPU_TOKENS // prompt))
        probes: dict[int, BatchProbe | None] = {}
        probe = partial(self._speed, operation, estimate, probes)
        tuned = tune_batch_size(probe, sizes, start, grow=not at_most, shrink=not at_most and not is_plateau)
        return self._tuned(operation, tuned, start, estimate, probes)

    def double(self) -> tuple[Tuned, ...]:
        """One size for all operations, by doubling: as peers do it."""
        items, prompt, response = self.lengths["decode"]
        estimate = row_bytes(self.shape, "decode", prompt, response)
        probes: dict[int, BatchProbe | None] = {}
        maximum = min(items, self._context.settings.evaluation.max_batch_size)
        found = double_batch_size(partial(self._speed, "decode", estimate, probes), maximum)
        even = BatchTuning(even_sizes(items, found.size)[-1], found.probes)
        return tuple(self._tuned(name, even, 1, estimate, probes if name == "decode" else {}) for name in OPERATIONS)

    def _tuned(
        self, operation: Operation, tuned: BatchTuning, start: int, estimate: int, probes: Mapping[int, BatchProbe | None]
    ) -> Tuned:
        measured = probes.get(tuned.size)
        taken = (measured.peak_bytes // tuned.size + self._unseen(operation)) if measured else 0
        return Tuned(operation, tuned.size, start, max(taken, estimate), dict(probes))

    def _speed(self, operation: Operation, estimate: int, probes: dict[int, BatchProbe | None], size: int) -> float | None:
        """Prompts a second; None where so many don't fit."""
        self._context.check()
        self._warm_up()
        found = self._probe(operation, estimate, size)
        probes[size] = found
        return found.tokens_per_second / self._tokens(operation) if found else None

    def _probe(self, operation: Operation, estimate: int, size: int) -> BatchProbe | None:
        usable = self._usable()
        # Here no error would come, but the killer of processes.
        if self._device.type in SHARE and size > 1 and size * estimate > usable:
            return None
        longest = self._longest[operation]
        rows = [longest[index % len(longest)] for index in range(size)]
        return_freed(self._device)  # or the peak would hide in what an earlier probe has freed
        meter, before = PeakMeter(), used_memory(self._device)
        times = [time.perf_counter()]

        def note_time() -> None:
            synchronize(self._device)
            times.append(time.perf_counter())

        def work() -> bool:
            self._work(operation)(rows, note_time)
            note_time()
            return True

        if unless_full(work, self._device) is None:
            return None
        peak = max(0, (meter.rss() if self._device.type == "cpu" else meter.device()) - before)
        if size > 1 and peak + size * self._unseen(operation) > usable:
            return None
        return BatchProbe(size * self._speed_of_a_row(operation, times), peak)

    def _speed_of_a_row(self, operation: Operation, times: Sequence[float]) -> float:
        """Tokens a second, given when a probe began, when each token of a response came, and when it ended."""
        tokens, begin, end = self._tokens(operation), times[0], times[-1]
        if operation == "decode" and len(times) > 3:
            # The first token takes a prefill, which is the other operation; and rows may end before the last.
            tokens, begin, end = len(times) - 3, times[1], times[-2]
        return tokens / max(end - begin, 1e-9)

    def _tokens(self, operation: Operation) -> int:
        """Of each row, that a probe is timed for."""
        _, prompt, response = self.lengths[operation]
        return min(PROBE_TOKENS, max(1, response - 1)) if operation == "decode" else prompt

    def _unseen(self, operation: Operation) -> int:
        """Bytes of a row that a short probe doesn't reach: the cache of the rest of a response."""
        if operation != "decode":
            return 0
        _, prompt, response = self.lengths["decode"]
        return self.shape.cache_bytes(prompt + response) - self.shape.cache_bytes(prompt + self._tokens("decode"))

    def _usable(self) -> int:
        """Of the device with the least left, where a model lies on several: which layers need most isn't known."""
        devices = {parameter.device for parameter in self._loaded.model.parameters()}
        places = [device for device in devices if device.type == self._device.type] or [self._device]
        return max(0, min(map(usable_memory, places)) - self._reserved)

    def _work(self, operation: Operation) -> Callable[[Sequence[Prompt], Callable[[], None]], object]:
        """One batch of an operation; a decoding one calls back after every token."""
        loaded, engine, efficiency = self._loaded, self._engine, self._context.settings.efficiency
        if operation == "residuals":
            amp, home = efficiency.use_amp_for_residuals, self._device
            return lambda rows, _: capture_batch(loaded.model, loaded.layers, engine.chat, rows, amp=amp, home=home)
        if operation == "prefill":
            return lambda rows, _: engine.raw_logits(rows, 1)[1][:, 0].float().log_softmax(dim=-1)
        return lambda rows, tell: engine.generate_ids(rows, 1 + self._tokens("decode"), tell)
