"""Batch sizes on loaded models: what is probed, what is kept, and that no probe comes near the killer."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from abliterate.model import memory
from abliterate.model.footprint import row_bytes
from abliterate.model.loader import LoadedModel
from abliterate.pipeline import batch_size, from_settings, workbench
from abliterate.pipeline.batch_size import Tuned
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.tune_batch import tune
from abliterate.prompts.sets import PromptSets
from abliterate.settings.schema import Settings
from abliterate.types import OPERATIONS
from support.runs import Recorder, quick_settings

Files = dict[str, str]


class Machine:
    """Counts the rows of every pass through the demo model, and refuses those above a capacity."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capacity: int = 10**9) -> None:
        self.capacity = capacity
        self.rows: list[int] = []
        forward = Qwen2ForCausalLM.forward

        def counted(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            self.rows.append(len(input_ids))
            if len(input_ids) > self.capacity:
                raise torch.OutOfMemoryError("full")
            return forward(model, input_ids=input_ids, **kwargs)

        counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", counted)


def made(files: Files, folder: Path, **over: Any) -> tuple[Context, PromptSets, Settings]:
    """A context without a run."""
    settings = quick_settings(files, folder / "cache", **{"evaluation": {"batch_size": 0}, **over})
    context = Context.of(settings, Recorder())
    return context, read_prompts(context), settings


def measured(files: Files, folder: Path, **over: Any) -> dict[str, Tuned]:
    """What `tune-batch` measures."""
    _, _, settings = made(files, folder, **over)
    return {one.operation: one for one in tune(settings, Recorder())}


@pytest.fixture(scope="module")
def before(prompt_files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tuned]]:
    """What one measurement left: (the cache, what was measured)."""
    folder = tmp_path_factory.mktemp("tuned")
    found = measured(prompt_files, folder)
    return folder / "cache", found


@pytest.fixture
def tuned(before: tuple[Path, dict[str, Tuned]], tmp_path: Path) -> dict[str, Tuned]:
    """What was measured; it is in the test's own cache."""
    shutil.copytree(before[0], tmp_path / "cache")
    return before[1]


@pytest.fixture(scope="module")
def loaded(prompt_files: Files, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The demo model, which no measurement changes."""
    context, _, _ = made(prompt_files, tmp_path_factory.mktemp("loaded"))
    return workbench.open_workbench(context).loaded


def test_every_operation_has_a_size_and_few_probes(
    prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    found = measured(prompt_files, tmp_path)
    assert tuple(found) == OPERATIONS
    for one in found.values():
        assert 1 <= len(one.probes) <= 8
        assert one.probes[one.size] is not None
        assert one.row_bytes > 0
    assert len(found["residuals"].probes) == 1, "done once: one look"
    assert found["residuals"].size <= found["prefill"].size
    passes = len(machine.rows)
    # A decoding probe is a prefill and a pass a token, the others are one pass; two warm up, and one is the test at load. Two
    # sizes that decide are probed again, at most twice.
    decoding = len(found["decode"].probes) + 4
    assert passes <= decoding * (1 + batch_size.PROBE_TOKENS) + len(found["prefill"].probes) + 1 + 2 + 1


@pytest.mark.parametrize(
    "capacity", [1, 2, pytest.param(3, marks=pytest.mark.slow), 5, pytest.param(7, marks=pytest.mark.slow)]
)
def test_what_is_chosen_fits(capacity: int, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, capacity)
    for one in measured(prompt_files, tmp_path).values():
        assert one.size <= capacity
        assert all((probe is None) == (size > capacity) for size, probe in one.probes.items())
        assert len(one.probes) <= 8
    assert max(machine.rows) > capacity, "it did run out"


def test_a_cpu_is_never_asked_for_more_than_it_has(
    loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error would come: a process that takes too much is killed."""
    context, prompts, _ = made(prompt_files, tmp_path)
    engine = from_settings.plain_engine(context, loaded)
    probes = batch_size.Probes(context, loaded, engine, prompts)
    row = {name: row_bytes(probes.shape, name, *probes.lengths[name][1:]) for name in OPERATIONS}
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * (3 * row["decode"] + probes._reserved))
    machine = Machine(monkeypatch)
    tuned = {one.operation: one for one in batch_size.tune(context, loaded, engine, prompts)}
    assert 3 <= max(machine.rows) <= 3 * row["decode"] / min(row.values())
    for name, one in tuned.items():
        assert one.start == min(3 * row["decode"] // row[name], {"residuals": tuned["prefill"].size}.get(name, 12))
    assert tuned["decode"].size <= 3
    assert tuned["decode"].probes.get(4) is None


def test_the_end_of_a_response_counts_though_no_probe_gets_there(
    loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompts, _ = made(prompt_files, tmp_path, response={"max_new_tokens": 4000, "detect_prefix": False})
    engine = from_settings.plain_engine(context, loaded)
    probes = batch_size.Probes(context, loaded, engine, prompts)
    per_token = 12 * 2 * 2 * 32 * 4  # layers, keys and values, heads, head size, float32
    assert probes._unseen("decode") == (4000 - batch_size.PROBE_TOKENS) * per_token
    assert probes._unseen("prefill") == 0
    room = 5 * 4000 * per_token
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * (room + probes._reserved))
    found = probes.search("decode")
    assert found.size <= 5
    assert found.row_bytes >= 4000 * per_token


def test_sizes_are_kept_for_the_next_run(
    tuned: dict[str, Tuned], loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompts, _ = made(prompt_files, tmp_path)
    engine = from_settings.plain_engine(context, loaded)
    machine = Machine(monkeypatch)
    sizes = batch_size.batch_sizes(context, loaded, engine, prompts)
    assert machine.rows == []
    assert sizes.by_name == {name: one.size for name, one in tuned.items()}
    assert sizes.row_bytes == tuple(one.row_bytes for one in tuned.values())
    assert workbench.load_calibrated(context, prompts).record()["batch_sizes"] == sizes.by_name
    reporter = context.reporter
    assert isinstance(reporter, Recorder)
    assert any("batch size" in note and "from the cache" in note for note in reporter.notes)
    assert not any(unit == "probes" for _, unit in reporter.units)


def test_probes_show_progress(prompt_files: Files, tmp_path: Path) -> None:
    settings, recorder = made(prompt_files, tmp_path)[2], Recorder()
    tune(settings, recorder)
    assert any(unit == "probes" for _, unit in recorder.units)


@pytest.mark.usefixtures("tuned")
@pytest.mark.parametrize(
    "over",
    [
        {"response": {"max_new_tokens": 5, "detect_prefix": False}},
        {"evaluation": {"batch_size": 0, "max_batch_size": 3}},
        {"efficiency": {"max_kept_mb": 1}},
        {"prompts": {"suffix": " and then some more words, please"}},
        {"efficiency": {"use_binary_search_batch_tuning": False}},
        {"efficiency": {"use_amp_for_residuals": True}},
    ],
)
def test_another_question_is_measured_anew(
    over: dict[str, Any], loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompts, _ = made(prompt_files, tmp_path, **over)
    machine = Machine(monkeypatch)
    batch_size.batch_sizes(context, loaded, from_settings.plain_engine(context, loaded), prompts)
    assert machine.rows


@pytest.mark.usefixtures("tuned")
def test_another_machine_is_measured_anew(
    loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abliterate.pipeline.cache_keys.total_memory", lambda device: 1 << 30)
    context, prompts, _ = made(prompt_files, tmp_path)
    machine = Machine(monkeypatch)
    batch_size.batch_sizes(context, loaded, from_settings.plain_engine(context, loaded), prompts)
    assert machine.rows


def test_sizes_found_on_a_busy_machine_are_found_anew(
    tuned: dict[str, Tuned], loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials show it: they decode far faster than the probe of their size did."""
    context, prompts, _ = made(prompt_files, tmp_path)
    engine = from_settings.plain_engine(context, loaded)
    speed = tuned["decode"].speed
    assert speed > 0
    for slower, outdated in ((1.9, False), (2.1, True), (2.1, False)):  # the third time it is known already
        assert batch_size.renew_if_slow(context, loaded, engine, prompts, slower * speed) == outdated
    machine = Machine(monkeypatch)
    batch_size.batch_sizes(context, loaded, engine, prompts)
    assert machine.rows
    machine.rows.clear()
    batch_size.batch_sizes(context, loaded, engine, prompts)
    assert machine.rows == [], "and kept again"


def test_a_given_size_is_not_measured(
    loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompts, _ = made(prompt_files, tmp_path, evaluation={"batch_size": 7})
    machine = Machine(monkeypatch)
    sizes = batch_size.batch_sizes(context, loaded, from_settings.plain_engine(context, loaded), prompts)
    assert set(sizes.by_name.values()) == {7}
    assert machine.rows == []


@pytest.mark.usefixtures("tuned")
def test_other_prompts_of_the_same_lengths_take_the_same_sizes(
    loaded: LoadedModel, prompt_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prompts say doesn't matter, only how long they are."""
    swapped = dict(prompt_files)
    path = tmp_path / "reversed.jsonl"
    lines = Path(prompt_files["harmful_eval"]).read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[::-1]) + "\n", encoding="utf-8")
    swapped["harmful_eval"] = str(path)
    context, prompts, _ = made(swapped, tmp_path)
    machine = Machine(monkeypatch)
    batch_size.batch_sizes(context, loaded, from_settings.plain_engine(context, loaded), prompts)
    assert machine.rows == []
