"""Find batch sizes by a memory estimate and a binary search, and remember them.

The search works on callables; the probes below it run each operation on the loaded model.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from abliterate import ranks
from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.edits import edit_method, prepared_bytes, reading_method
from abliterate.engine.reference import ReferenceEngine
from abliterate.model.footprint import Shape, kept_bytes, row_bytes
from abliterate.model.loader import LoadedModel, Skeleton
from abliterate.model.memory import SHARE, PeakMeter, return_freed, synchronize, unless_full, usable_on_all, used_memory
from abliterate.model.residuals import capture_batch
from abliterate.model.weights import in_features, n_matrices, out_features
from abliterate.pipeline.cache_keys import batch_sizes_key
from abliterate.pipeline.calibrate import WarmUp
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import direction_count
from abliterate.prompts.sets import PromptSets
from abliterate.settings.schema import Settings
from abliterate.types import OPERATIONS, BatchSizes, Operation, Prompt

# Two sizes whose throughput differs by less than this share are equally good. The larger one is taken: a probe may be slow by
# chance, and rows leave their batch as they finish.
PLATEAU = 0.05

# The most sizes that are probed, and the most of them spent on finding a smaller size that is as fast. Where two sizes decide,
# both are probed again, because other work on the machine may slow down any one probe.
_PROBES, _SHRINK_PROBES = 8, 4

# About so many probes find the sizes of all operations; for the progress that a person sees.
_USUAL_PROBES = 12

# Trials that decode so many times as fast as the probe of their size did say that the machine was busy then.
_BUSY = 2.0

# Neighbouring sizes differ by this factor, and a search begins with _FIRST_STEP such steps at once: nearly a doubling.
_STEP, _FIRST_STEP = 1.2, 2


@dataclass(frozen=True)
class BatchTuning:
    """The chosen size and the `probes`: {size: items per second, or None if it didn't fit}."""

    size: int
    probes: dict[int, float | None]


def even_sizes(items: int, maximum: int) -> list[int]:
    """The sizes worth a probe, ascending: equally full batches of `items`, at most `maximum` each, in steps of a fifth.

    100 items are run as 100, 50, 34 or 25 at a time, never as 64 and 36.
    """
    sizes: list[int] = []
    for batches in range(math.ceil(items / maximum), items + 1):
        size = math.ceil(items / batches)
        if not sizes or size <= sizes[-1] / _STEP or (size == 1 and sizes[-1] > 1):
            sizes.append(size)
        if size == 1:
            break
    return sizes[::-1]


def tune_batch_size(
    probe: Callable[[int], float | None], sizes: Sequence[int], start: int, *, grow: bool = True, shrink: bool = True
) -> BatchTuning:
    """The largest of the probed `sizes` (ascending) that isn't clearly slower than another, after a binary search over eight.

    `probe(size)` gives items per second, or None if the device runs out of memory. The search goes from `start` (an estimate)
    to the largest size that fits, as long as growing gains speed, and then to the smallest size that is as fast; both are
    probed again. The result is 1 if nothing fits. Without `grow`, sizes above `start` aren't tried; without `shrink`, smaller
    sizes only if it doesn't fit, and the smallest of equal ones is taken.
    """
    probes: dict[int, float | None] = {}
    index = max((index for index, size in enumerate(sizes) if size <= start), default=0)
    fits, too_large, step = -1, len(sizes) if grow else index + 1, _FIRST_STEP
    while len(probes) < _PROBES and fits < index < too_large:
        before, speed = fits, probe(sizes[index])
        probes[sizes[index]] = speed
        fits, too_large = (fits, index) if speed is None else (index, too_large)
        if speed is not None and before >= 0 and _gains_nothing(probe, probes, sizes[before], sizes[index], again=shrink):
            break
        # Growing steps lead away from the estimate, which is seldom far off; between a size that fits and a size that doesn't,
        # the search bisects.
        if fits >= 0 and None in probes.values():
            index = (fits + too_large) // 2
        else:
            index, step = (max(0, index - step) if speed is None else min(len(sizes) - 1, index + step)), 2 * step
    slow, fast, step = -1, fits, _FIRST_STEP
    for _ in range(min(_SHRINK_PROBES, _PROBES - len(probes)) if shrink else 0):
        if fast - slow <= (1 if slow < 0 else _FIRST_STEP):
            break
        index, step = (max(0, fast - step) if slow < 0 else (slow + fast) // 2), 2 * step
        if sizes[index] not in probes:
            probes[sizes[index]] = probe(sizes[index])
        slow, fast = (slow, index) if sizes[index] in _as_fast_as_any(probes) else (index, fast)
    if not shrink:
        return BatchTuning(min(_as_fast_as_any(probes), default=1), probes)
    largest = max((size for size, speed in probes.items() if speed is not None), default=1)
    smaller = min(_as_fast_as_any(probes), default=1)
    if smaller < largest:
        for size in (largest, smaller):
            _again(probe, probes, size)
    return BatchTuning(max(_as_fast_as_any(probes), default=1), probes)


def _gains_nothing(
    probe: Callable[[int], float | None], probes: dict[int, float | None], small: int, large: int, *, again: bool
) -> bool:
    """Whether the larger size isn't clearly faster, also if both are probed `again`."""

    def gain() -> bool:
        return (probes[large] or 0.0) >= (1 + PLATEAU) * (probes[small] or 0.0)

    if gain() or not again:
        return not gain()
    for size in (large, small):
        _again(probe, probes, size)
    return not gain()


def _again(probe: Callable[[int], float | None], probes: dict[int, float | None], size: int) -> None:
    """Probe a size again and keep its best speed; a size that doesn't fit any more is as if it never did."""
    before = probes[size]
    if before is not None:
        speed = probe(size)
        probes[size] = None if speed is None else max(before, speed)


def _as_fast_as_any(probes: Mapping[int, float | None]) -> list[int]:
    speeds = {size: speed for size, speed in probes.items() if speed is not None}
    return [size for size, speed in speeds.items() if speed >= (1 - PLATEAU) * max(speeds.values())]


def double_batch_size(probe: Callable[[int], float | None], maximum: int) -> BatchTuning:
    """The fastest of 1, 2, 4, … up to `maximum` or the first size that doesn't fit: the plain way of comparable tools."""
    probes: dict[int, float | None] = {}
    size = 1
    while size <= maximum:
        probes[size] = probe(size)
        if probes[size] is None:
            break
        size *= 2
    fitting = {size: speed for size, speed in probes.items() if speed is not None}
    return BatchTuning(max(fitting, key=lambda size: fitting[size]) if fitting else 1, probes)


# The tokens of a decoding probe. The growth of the cache until a response ends is added by arithmetic.
PROBE_TOKENS = 8

# The tokens of a prefill at which a CPU reaches about its top speed; larger batches would make the search longer than a trial.
CPU_TOKENS = 1024

# The number of layers at which the trial engine keeps hidden states.
STARTS = 4


@dataclass(frozen=True)
class BatchProbe:
    """The measurement of one size: prompt or response tokens a second, and the memory it took on top of that in use."""

    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class Tuned:
    """The tuning of one operation: the chosen size, the estimate `start` of the search, and the bytes of one prompt.

    `probes` is {size: Probe, or None if it didn't fit}.
    """

    operation: Operation
    size: int
    start: int
    row_bytes: int
    probes: Mapping[int, BatchProbe | None]

    @property
    def speed(self) -> float:
        """Tokens a second at the chosen size, or at the measured size nearest to it; 0 if nothing fitted."""
        fitting = {size: probe.tokens_per_second for size, probe in self.probes.items() if probe is not None}
        return fitting[min(fitting, key=lambda size: abs(size - self.size))] if fitting else 0.0

    def to_record(self) -> dict[str, Any]:
        """JSON form."""
        probes = [
            {"size": size, "fits": probe is not None}
            | ({"tokens_per_second": round(probe.tokens_per_second, 1), "peak_bytes": probe.peak_bytes} if probe else {})
            for size, probe in sorted(self.probes.items())
        ]
        return {"size": self.size, "estimate": self.start, "row_bytes": self.row_bytes, "probes": probes}


def batch_sizes(
    context: Context,
    loaded: LoadedModel,
    engine: ReferenceEngine,
    prompts: PromptSets,
    run_sizes: Mapping[str, int] | None = None,
) -> BatchSizes:
    """The batch sizes and a note of their origin: given by the run or the settings, or measured here before or now.

    `run_sizes` were found on another machine, so the rows are limited to the memory here by the estimate.
    """
    if not run_sizes and (fixed_size := context.settings.evaluation.batch_size):
        _report(context, BatchSizes.same(fixed_size), "as given")
        return BatchSizes.same(fixed_size)
    probes = Probes(context, loaded, engine, prompts)
    residuals, prefill, decode = (probes.lengths[name][1] for name in OPERATIONS)
    return replace(_sizes(context, loaded, probes, run_sizes), row_tokens=(residuals, prefill, decode))


def _sizes(context: Context, loaded: LoadedModel, probes: Probes, run_sizes: Mapping[str, int] | None) -> BatchSizes:
    if run_sizes:
        rows = [row_bytes(probes.shape, name, *probes.lengths[name][1:]) for name in OPERATIONS]
        sizes = BatchSizes(run_sizes["residuals"], run_sizes["prefill"], run_sizes["decode"], (rows[0], rows[1], rows[2]))
        _report(context, sizes, "as the run uses")
        return sizes
    if ranks.size() > 1:  # a probe that doesn't fit would end the run, and clocks differ
        sizes = probes.estimated()
        _report(context, sizes, "by estimate")
        return sizes
    stored = _stored(context, probes)
    if stored is not None and not stored.get("outdated"):
        cached_sizes = BatchSizes(**stored["sizes"], row_bytes=tuple(stored["row_bytes"]))
        _report(context, cached_sizes, "from the cache")
        return cached_sizes
    return sizes_of(_measure(context, loaded, probes))


def tune(context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> tuple[Tuned, ...]:
    """Measure every operation, and keep the sizes for later runs."""
    return _measure(context, loaded, Probes(context, loaded, engine, prompts))


def speeds_of(context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> dict[str, float]:
    """Tokens a second by operation, measured here before, or else measured now and kept for later runs."""
    probes = Probes(context, loaded, engine, prompts)
    return _known_speeds(context, probes) or {tuned.operation: tuned.speed for tuned in _measure(context, loaded, probes)}


def known_speeds(
    context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets
) -> dict[str, float] | None:
    """Tokens a second by operation, if they were measured here before; the run's own batch size leaves them unmeasured."""
    return _known_speeds(context, Probes(context, loaded, engine, prompts))


def _known_speeds(context: Context, probes: Probes) -> dict[str, float] | None:
    stored = _stored(context, probes)
    speeds = stored.get("tokens_per_second") if stored is not None and not stored.get("outdated") else None
    return speeds if speeds and all(speeds.values()) else None


def renew_if_slow(context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets, speed: float) -> bool:
    """Have the next run measure anew, if trials decode `speed` tokens a second and the stored probe was far slower.

    It was then measured while the machine had other work, and may have chosen too small a size. This is done once: where the
    engine of trials is so much faster than the probes, another measurement changes nothing. Returns whether it is done.
    """
    probes = Probes(context, loaded, engine, prompts)
    stored = _stored(context, probes)
    measured = float(((stored or {}).get("tokens_per_second") or {}).get("decode", 0))
    if not stored or "outdated" in stored or not 0 < measured * _BUSY < speed:
        return False
    label = f"{loaded.info.id}: outdated, measured on a busy machine"
    context.store.put("batch-sizes", probes.key, {"sizes": to_bytes(json.dumps(stored | {"outdated": True}))}, label)
    context.reporter.note(
        f"trials decode {speed:.0f} tokens a second, and it was {measured:.0f} when batch sizes were found, probably "
        "beside other work; the next run finds them anew"
    )
    return True


def _stored(context: Context, probes: Probes) -> dict[str, Any] | None:
    """What was measured here before."""
    cached = context.store.get("batch-sizes", probes.key)
    found: dict[str, Any] | None = json.loads(from_bytes(cached["sizes"])) if cached is not None else None
    return found


def _measure(context: Context, loaded: LoadedModel, probes: Probes) -> tuple[Tuned, ...]:
    if context.settings.efficiency.use_binary_search_batch_tuning:
        prefill = probes.search("prefill")
        # Residuals are computed once, so it is enough to check whether the prefill's size fits here, too.
        tuned: tuple[Tuned, ...] = (probes.search("residuals", at_most=prefill.size), prefill, probes.search("decode"))
    else:
        tuned = probes.double()
    sizes = sizes_of(tuned)
    speeds = {entry.operation: entry.speed for entry in tuned}
    # After a renewal the entry says so, so that it isn't renewed again.
    again = {"outdated": False} if (_stored(context, probes) or {}).get("outdated") else {}
    text = json.dumps({"sizes": sizes.by_name, "row_bytes": sizes.row_bytes, "tokens_per_second": speeds} | again)
    label = f"{loaded.info.id}: " + ", ".join(f"{name} {size}" for name, size in sizes.by_name.items())
    context.store.put("batch-sizes", probes.key, {"sizes": to_bytes(text)}, label)
    _report(context, sizes, f"found by {sum(len(entry.probes) for entry in tuned)} probes")
    return tuned


def sizes_of(tuned: Sequence[Tuned]) -> BatchSizes:
    """The chosen sizes of all operations."""
    residuals, prefill, decode = tuned
    return BatchSizes(residuals.size, prefill.size, decode.size, (residuals.row_bytes, prefill.row_bytes, decode.row_bytes))


def _report(context: Context, sizes: BatchSizes, origin: str) -> None:
    distinct = set(sizes.by_name.values())
    each = ", ".join(f"{name} {size}" for name, size in sizes.by_name.items()) if len(distinct) > 1 else str(min(distinct))
    context.reporter.note(f"batch size: {each} ({origin})", batch_sizes=sizes.by_name)


def _sets_by_operation(prompts: PromptSets) -> dict[Operation, tuple[tuple[Prompt, ...], ...]]:
    return {
        "residuals": (prompts.harmful, prompts.harmless),
        "prefill": (prompts.harmless_eval,),
        "decode": (prompts.harmful_eval,),
    }


def reserved_bytes(
    settings: Settings, shape: Shape, loaded: LoadedModel | Skeleton, harmful: int, harmless: int, prompt: int
) -> int:
    """The bytes that are kept between trials, and the bytes that KL needs: the base's and the trial's log-probabilities."""
    kept = kept_bytes(shape, STARTS, harmful, harmless, prompt)
    method, prompts = edit_method(settings.edit.mode), 2 * settings.edit.capture_prompts
    n_directions = loaded.info.n_layers * direction_count(settings)
    for target in loaded.targets:
        width = (out_features(target.module) or 0) if target.reads else in_features(target.module)
        own = reading_method(method) if target.reads else method
        kept += n_matrices(target.module) * prepared_bytes(own, n_directions, loaded.info.d_model, width, prompts)
    return min(kept, settings.efficiency.max_kept_mb << 20) + 8 * harmless * shape.vocabulary


class Probes:
    """Probes a loaded model on the longest prompts of each operation's sets."""

    def __init__(self, context: Context, loaded: LoadedModel, engine: ReferenceEngine, prompts: PromptSets) -> None:
        self._context, self._loaded, self._engine = context, loaded, engine
        self._done = 0
        self._device = loaded.device
        # {operation: (prompts in the larger set, tokens of the longest prompt, tokens of a response)}
        self.lengths: dict[str, tuple[int, int, int]] = {}
        self._longest: dict[str, list[Prompt]] = {}
        for name, sets in _sets_by_operation(prompts).items():
            by_length = [(len(engine.chat.token_ids(prompt)), prompt) for prompt_set in sets for prompt in prompt_set]
            by_length.sort(key=lambda pair: -pair[0])
            self._longest[name] = [prompt for _, prompt in by_length[: context.settings.evaluation.max_batch_size]]
            self.lengths[name] = (max(map(len, sets)), by_length[0][0], engine.max_new_tokens)
        self.key = batch_sizes_key(context.settings, loaded, self.lengths)
        model = loaded.model
        self.shape = Shape.of(model.config.get_text_config(), model.dtype)
        once = context.settings.efficiency.use_global_warmup
        self._warm_up = WarmUp(lambda: engine.generate_ids(self._longest["decode"][:1], 2), once=once)
        longest = max(self.lengths[name][1] for name in ("prefill", "decode"))
        counts = len(prompts.harmful_eval), len(prompts.harmless_eval)
        self._reserved = reserved_bytes(context.settings, self.shape, loaded, *counts, longest)

    def search(self, operation: Operation, at_most: int = 0) -> Tuned:
        """Search from the estimate to the best size; with `at_most`, only check whether that size or a smaller one fits."""
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

    def estimated(self) -> BatchSizes:
        """The sizes that fit by the estimate, without a probe."""
        usable, found = self._usable(), []
        for name in OPERATIONS:
            items, prompt, response = self.lengths[name]
            sizes = even_sizes(items, min(items, self._context.settings.evaluation.max_batch_size))
            estimate = row_bytes(self.shape, name, prompt, response)
            found.append((max((size for size in sizes if size * estimate <= usable), default=1), estimate))
        (residuals, prefill, decode), rows = zip(*found, strict=True)
        return BatchSizes(residuals, prefill, decode, rows)

    def double(self) -> tuple[Tuned, ...]:
        """Find one size for all operations by doubling, as comparable tools do."""
        items, prompt, response = self.lengths["decode"]
        estimate = row_bytes(self.shape, "decode", prompt, response)
        probes: dict[int, BatchProbe | None] = {}
        maximum = min(items, self._context.settings.evaluation.max_batch_size)
        doubled = double_batch_size(partial(self._speed, "decode", estimate, probes), maximum)
        even = BatchTuning(even_sizes(items, doubled.size)[-1], doubled.probes)
        return tuple(self._tuned(name, even, 1, estimate, probes if name == "decode" else {}) for name in OPERATIONS)

    def _tuned(
        self, operation: Operation, tuned: BatchTuning, start: int, estimate: int, probes: Mapping[int, BatchProbe | None]
    ) -> Tuned:
        measured = probes.get(tuned.size)
        taken = (measured.peak_bytes // tuned.size + self._unseen(operation)) if measured else 0
        return Tuned(operation, tuned.size, start, max(taken, estimate), dict(probes))

    def _speed(self, operation: Operation, estimate: int, probes: dict[int, BatchProbe | None], size: int) -> float | None:
        """Prompts a second; None if so many don't fit."""
        self._context.check()
        self._done += 1
        self._context.reporter.progress(self._done, max(self._done, _USUAL_PROBES), "probes")
        self._warm_up()
        measured, before = self._probe(operation, estimate, size), probes.get(size)
        if measured and before:  # probed again: the best speed, and the memory that the first time took
            fastest = max(measured.tokens_per_second, before.tokens_per_second)
            measured = BatchProbe(fastest, max(measured.peak_bytes, before.peak_bytes))
        probes[size] = measured
        return measured.tokens_per_second / self._tokens(operation) if measured else None

    def _probe(self, operation: Operation, estimate: int, size: int) -> BatchProbe | None:
        usable = self._usable()
        # On these devices the system kills the process instead of raising an error.
        if self._device.type in SHARE and size > 1 and size * estimate > usable:
            return None
        longest = self._longest[operation]
        rows = [longest[index % len(longest)] for index in range(size)]
        return_freed(self._device)  # otherwise the peak would hide in memory that an earlier probe has freed
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
        # Peak and cache are those of all devices together.
        spread = len({one.device for one in self._loaded.model.parameters() if one.device.type == self._device.type})
        if size > 1 and peak + size * self._unseen(operation) > max(1, spread) * usable:
            return None
        return BatchProbe(size * self._speed_of_a_row(operation, times), peak)

    def _speed_of_a_row(self, operation: Operation, times: Sequence[float]) -> float:
        """Tokens a second, from the times when a probe began, when each token of a response came, and when it ended."""
        tokens, begin, end = self._tokens(operation), times[0], times[-1]
        if operation == "decode" and len(times) > 3:
            # The first token takes a prefill, which is another operation, and rows may end before the last token.
            tokens, begin, end = len(times) - 3, times[1], times[-2]
        return tokens / max(end - begin, 1e-9)

    def _tokens(self, operation: Operation) -> int:
        """The tokens of each row that a probe is timed for."""
        _, prompt, response = self.lengths[operation]
        return min(PROBE_TOKENS, max(1, response - 1)) if operation == "decode" else prompt

    def _unseen(self, operation: Operation) -> int:
        """The bytes of a row that a short probe doesn't reach: the cache for the rest of a response."""
        if operation != "decode":
            return 0
        _, prompt, response = self.lengths["decode"]
        return self.shape.cache_bytes(prompt + response) - self.shape.cache_bytes(prompt + self._tokens("decode"))

    def _usable(self) -> int:
        """The usable bytes of the fullest device, since it isn't known which device's layers need most."""
        devices = {parameter.device for parameter in self._loaded.model.parameters()}
        return max(0, usable_on_all(devices, self._device) - self._reserved)

    def _work(self, operation: Operation) -> Callable[[Sequence[Prompt], Callable[[], None]], object]:
        """A function that runs one batch of an operation; decoding calls back after every token."""
        loaded, engine, efficiency = self._loaded, self._engine, self._context.settings.efficiency
        if operation == "residuals":
            amp, home = efficiency.use_amp_for_residuals, self._device
            return lambda rows, _: capture_batch(loaded.model, loaded.layers, engine.chat, rows, amp=amp, home=home)
        if operation == "prefill":
            return lambda rows, _: engine.raw_logits(rows, 1)[1][:, 0].float().log_softmax(dim=-1)
        return lambda rows, after_token: engine.generate_ids(rows, 1 + self._tokens("decode"), after_token)
