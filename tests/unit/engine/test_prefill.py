"""What the engine keeps of the base model: within its budget and the device's memory, with the same numbers for less of it."""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.engine.batching import Batches
from abliterate.engine.kv_cache import layer_bytes
from abliterate.engine.prefill import KeptStates, Prefill
from abliterate.engine.self_check import EngineSetup, check
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import TrialError
from abliterate.settings.schema import EfficiencySettings
from support.engine import HARMFUL, HARMLESS, Lab, assert_same, make_lab, make_setup, trials, trusted, whole
from support.models import make_params

# One family for each way of sharing a prefix: between, left (twice), none (twice).
FAMILIES = ("llama", "mistral", "gemma3", "qwen3_5", "lfm2")
# On a device with room for so many at once.
ROWS = pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])

# Of the base model: hidden states and cache layers.


def engine_with(lab: Lab, room: float) -> TrialEngine:
    """An engine that may keep so many bytes, with every layer as a possible start."""
    lab.editor.clear()
    starts = range(len(lab.loaded.layers))
    setup = EngineSetup(lab.reference, lab.loaded.layers, lab.editor.hooks, None, HARMFUL, HARMLESS, starts, room)
    return setup.engine(EfficiencySettings())


def parts_of(engine: TrialEngine) -> Iterator[KeptStates]:
    """Everything that is kept of the base model."""
    for prompts in engine._sets.values():
        for group in prompts.groups:
            yield group.kept
            yield group.prefix


def storages(engine: TrialEngine) -> int:
    """Bytes of all storages behind what is kept, counted apart from the package."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif isinstance(value, (list, tuple)):
            for part in value:
                visit(part)

    for kept in parts_of(engine):
        visit(kept.hidden)
        for layer in kept.layers:
            visit(vars(layer))
    return sum(found.values())


def starts_of(engine: TrialEngine) -> list[set[int]]:
    """Layers at which each group's passes may begin above the first."""
    return [set(group.kept.hidden) for prompts in engine._sets.values() for group in prompts.groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_trials_are_the_same_whatever_the_room(family: str) -> None:
    lab = make_lab(family)
    ample = engine_with(lab, float("inf"))
    everything = storages(ample)
    assert everything == ample._prefill.nbytes
    assert starts_of(ample)[0] == {1, 2}
    assert ample.left_out == {}
    kept = []
    for room in (0, 1000, everything // 2, everything - 1, everything):
        engine = engine_with(lab, room)
        assert storages(engine) <= room
        assert engine._prefill.nbytes == storages(engine)
        kept.append(starts_of(engine)[0])
        assert all(starts == kept[-1] for starts in starts_of(engine)), "the same for all prompts"
        assert ("budget" in engine.left_out) == (room < everything)
        for params in trials(lab, 3):
            expected = lab.expected(params)
            assert_same(whole(engine), expected)
    assert kept[0] == set()
    assert kept[-2:] == [{1}, {1, 2}], "the highest goes first"


def test_the_first_chunk_tells_what_all_of_them_take() -> None:
    """So that no more than there is room for is ever kept, even on the way."""
    lab = make_lab("gemma3", batch_size=2)
    ample = engine_with(lab, float("inf"))
    engine = engine_with(lab, ample._prefill.nbytes - 1)
    assert starts_of(engine)[0] == {1}
    peak = 0
    merged = KeptStates.merged

    def watched(parts: list[KeptStates], starts: Sequence[int]) -> KeptStates:
        nonlocal peak
        peak = max(peak, sum(part.nbytes(list(part.hidden)) for part in parts))
        return merged(parts, starts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptStates, "merged", staticmethod(watched))
        again = engine_with(lab, ample._prefill.nbytes - 1)
    assert 0 < peak <= again._prefill.budget_bytes


def test_bytes_of_a_layer() -> None:
    class Layer:
        def __init__(self) -> None:
            self.keys, self.states, self.more = torch.zeros(2, 3), [torch.zeros(4)], {0: torch.zeros(1).double()}
            self.length = 7

    assert layer_bytes(Layer()) == 24 + 16 + 8


# A device that is too small.


def limit_rows(model: PreTrainedModel, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make any pass of more than `most` rows run out of memory; returns the rows of each pass tried."""
    sizes: list[int] = []
    forward = type(model).forward

    @functools.wraps(forward)  # the engine looks at its parameters
    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].shape[0])
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    return sizes


@ROWS
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_on_a_small_device_gives_the_same_numbers(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab(family, batch_size=5)
    some = trials(lab, 4)
    expected = []
    for params in some:
        lab.editor.apply(params)
        expected.append(whole(lab.reference))
    ample = engine_with(lab, float("inf"))
    assert {"llama": "between", "mistral": "left", "gemma3": "left"}.get(family, "none") == ample.sharing
    if ample.sharing == "left":
        assert max(len(g.layout.prefix_ids) for s in ample._sets.values() for g in s.groups) > 3, "prefix rows don't fit"
    sizes = limit_rows(lab.loaded.model, rows, monkeypatch)
    engine = engine_with(lab, float("inf"))
    assert max(sizes) > rows, "it did run out"
    assert starts_of(engine) == starts_of(ample), "and kept everything"
    assert engine.left_out == {}
    for one, other in zip(parts_of(engine), parts_of(ample), strict=True):
        for start, hidden in one.hidden.items():
            torch.testing.assert_close(hidden, other.hidden[start], rtol=0, atol=1e-4)
    for params, numbers in zip(some, expected, strict=True):
        lab.editor.apply(params)
        assert_same(whole(engine), numbers)


@ROWS
@pytest.mark.parametrize("family", FAMILIES)
def test_the_self_check_on_a_small_device(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, warnings = make_lab(family, batch_size=5), list[str]()
    sizes = limit_rows(lab.loaded.model, rows, monkeypatch)
    engine = trusted(lab, warnings)
    assert isinstance(engine, TrialEngine)
    assert warnings == []
    assert max(sizes) > rows


def test_the_self_check_sees_every_row_on_a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong number in one row must not hide in the other half."""
    lab = make_lab("llama", batch_size=5)
    engine = engine_with(lab, float("inf"))
    forced = TrialEngine.forced_logits
    seen: list[int] = []

    def wrong(self: TrialEngine, prompts: Any, rows: list[int], tokens: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend(rows)
        before, together = forced(self, prompts, rows, tokens)
        return before, together + (3 * torch.randn_like(together) if 4 in rows else 0)

    monkeypatch.setattr(TrialEngine, "forced_logits", wrong)
    limit_rows(lab.loaded.model, 1, monkeypatch)
    verdict = check(engine, make_setup(lab))
    assert not verdict.ok
    assert len(set(seen)) == 4


def test_the_self_check_needs_memory_for_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = make_lab("llama", batch_size=2)
    engine = lab.engine(use_layer_skip=False)
    sizes = limit_rows(lab.loaded.model, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        check(engine, make_setup(lab))
    assert sizes == [4, 2, 1]


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_a_group_that_cannot_be_kept_is_left_out(fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `fits` rows nothing more fits, however few: what was captured is freed, and trials give the same numbers."""
    lab = make_lab("llama", batch_size=2)
    captured: list[weakref.ref[Tensor]] = []
    kept: list[int] = []
    inside: list[bool] = []
    monkeypatch.setattr(
        "abliterate.engine.prefill.clear_device_cache", lambda device: inside.append(sys.exc_info()[0] is not None)
    )

    def keep_rows(self: Any, group: Any, some: Tensor, starts: Any, with_cache: bool) -> KeptStates:
        if with_cache and (sum(kept) + len(some) > fits):
            raise torch.OutOfMemoryError("out of memory")
        kept.append(len(some))
        part = real(self, group, some, starts, with_cache)
        captured.extend(weakref.ref(hidden) for hidden in part.hidden.values())
        return part

    real = Prefill._keep_rows
    monkeypatch.setattr(Prefill, "_keep_rows", keep_rows)
    engine = engine_with(lab, float("inf"))
    gc.collect()
    harmful, *harmless = (group for prompts in engine._sets.values() for group in prompts.groups)
    assert (harmful.kept, harmful.prefix) == (KeptStates(), KeptStates())
    assert all(group.kept.hidden for group in harmless)
    assert f"{len(HARMFUL)} prompts" in engine.left_out["memory"]
    assert len(captured) > 0
    kept_now = {id(hidden) for part in parts_of(engine) for hidden in part.hidden.values()}
    assert all(ref() is None or id(ref()) in kept_now for ref in captured)
    assert inside
    assert not any(inside), "within the `except` block the traceback keeps tensors alive"
    for params in trials(lab, 3):
        lab.editor.apply(params)
        assert_same(whole(engine), whole(lab.reference))


def test_a_cache_that_cannot_be_merged_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def merged(parts: Any, starts: Any) -> KeptStates:
        raise torch.OutOfMemoryError("out of memory")

    lab = make_lab("llama", batch_size=2)
    monkeypatch.setattr(KeptStates, "merged", staticmethod(merged))
    engine = engine_with(lab, float("inf"))
    assert engine._prefill.nbytes == 0
    assert f"{len(HARMFUL) + len(HARMLESS)} prompts" in engine.left_out["memory"]
    lab.editor.apply(make_params(1))
    assert_same(whole(engine), whole(lab.reference))


def test_a_prefix_is_split_in_trials_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the layers that are skipped, under an edit."""
    lab = make_lab("gemma3", batch_size=5)
    engine = engine_with(lab, float("inf"))
    for params in trials(lab, 6):
        lab.editor.apply(params)
        expected = whole(lab.reference)
        with pytest.MonkeyPatch.context() as patch:
            sizes = limit_rows(lab.loaded.model, 2, patch)
            assert_same(whole(engine), expected)
            assert max(sizes) > 2


def test_groups_that_begin_alike_keep_one_prefix() -> None:
    lab = make_lab("llama", batch_size=1)
    engine = engine_with(lab, float("inf"))
    groups = [group for prompts in engine._sets.values() for group in prompts.groups]
    assert len(groups) == 1 + len(HARMLESS)
    assert len({id(group.prefix) for group in groups}) == 1
    assert groups[0].prefix.hidden


def test_what_can_be_made_again_is_freed_before_a_single_row_is_given_up() -> None:
    """Once by the rows that wait, or a buffer: then the row is tried again."""
    batches, tried = Batches(4, torch.device("cpu")), list[int]()
    held = [True]
    batches.free = lambda: held.pop() if held else False

    def work(items: Sequence[int]) -> Sequence[int]:
        tried.append(len(items))
        if held:
            raise torch.OutOfMemoryError("out of memory")
        return items

    assert batches.run([7], work) == [7]
    assert tried == [1, 1]
    batches.free = lambda: True  # what is freed is made again in each try
    held[:] = [True]
    tried.clear()
    with pytest.raises(TrialError, match="even for a single prompt"):
        batches.run([7], work)
    assert tried == [1, 1]
