"""What is free, what was used at most, and which errors mean that memory ran out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abliterate import ranks
from abliterate.engine import batching
from abliterate.engine.batching import PATIENCE, Batches
from abliterate.errors import TrialError
from abliterate.model import memory
from abliterate.model.memory import PeakMeter, affordable, free_memory, memory_errors, total_memory, unless_full, usable_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
        RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 911360 bytes."),
        RuntimeError("Invalid buffer size: 19.45 GB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_devices_error_is_one(error: Exception) -> None:
    with pytest.raises(torch.OutOfMemoryError), memory_errors():
        raise error

    def work() -> int:
        raise error

    assert unless_full(work, CPU) is None


def test_the_cpus_own_error_is_known() -> None:
    """Not a made-up sentence: what torch says here."""
    with pytest.raises(torch.OutOfMemoryError), memory_errors():
        torch.empty(1 << 60)


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes do not match")
    with pytest.raises(ZeroDivisionError):
        unless_full(lambda: 1 / 0, CPU)


def test_free_memory_is_cleared_outside_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    inside: list[bool] = []
    monkeypatch.setattr(memory, "clear_device_cache", lambda device: inside.append(sys.exc_info()[0] is not None))

    def work() -> int:
        raise torch.OutOfMemoryError("full")

    assert unless_full(work, CPU) is None
    assert inside == [False]


def group(
    folder: Path, limit: str, used: int, stat: str = "", names: tuple[str, str] = ("memory.max", "memory.current")
) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n", encoding="ascii")
    (folder / names[1]).write_text(f"{used}\n", encoding="ascii")
    (folder / "memory.stat").write_text(stat, encoding="ascii")


def test_limits_of_containers_count(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/job\n", encoding="ascii")
    root = tmp_path / "fs"
    group(root, "max", 900)
    group(root / "user.slice", "1000", 400, "inactive_file 100\nother 7\n")
    group(root / "user.slice" / "job", "800", 500)
    assert sorted(memory._cgroups(root, own)) == [(800, 500), (1000, 300)]


def test_limits_of_version_1_containers_count(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:cpu,memory:/job\n3:cpuset:/\n0::/\n", encoding="ascii")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "memory", "9000", 700, "inactive_file 0\ntotal_inactive_file 300\n", names)
    assert memory._cgroups(tmp_path, own) == [(9000, 400)], "in a container, the group's own path isn't mounted"
    assert memory._cgroups(tmp_path, tmp_path / "none") == []


def test_memory_is_what_the_tightest_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=4000))
    monkeypatch.setattr(memory, "_cgroups", lambda: [(1500, 900), (9999, 0)])
    assert free_memory(CPU) == 600
    assert total_memory(CPU) == 1500
    assert usable_memory(CPU) == 300, "never near the killer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "on_this_machine", lambda: 3)
        assert usable_memory(CPU) == 100, "the ranks of a machine share its main memory"


@pytest.mark.parametrize(("size", "local", "sharing"), [(8, "4", 4), (2, "4", 2), (1, "4", 1), (8, None, 1)])
def test_ranks_of_other_machines_share_no_memory(
    size: int, local: str | None, sharing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_size", size)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert ranks.on_this_machine() == sharing


def test_an_accelerators_own_cache_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimpleNamespace(
        mem_get_info=lambda d: (1000, 8000), memory_reserved=lambda d: 500, memory_allocated=lambda d: 200
    )
    monkeypatch.setattr(memory, "_backend", lambda device: backend)
    cuda = torch.device("cuda")
    assert free_memory(cuda) == 1300
    assert total_memory(cuda) == 8000
    assert usable_memory(cuda) == int(0.9 * 1300)
    mps = SimpleNamespace(recommended_max_memory=lambda: 1000, current_allocated_memory=lambda: 400)
    monkeypatch.setattr(memory, "_backend", lambda device: mps)
    assert (free_memory(torch.device("mps")), total_memory(torch.device("mps"))) == (600, 1000)


def test_a_gpu_that_shares_the_machines_memory_may_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intel's integrated ones raise."""

    def refuse(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("The device doesn't support querying the available free memory.")

    monkeypatch.setattr(memory, "_backend", lambda device: SimpleNamespace(mem_get_info=refuse))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=4000))
    monkeypatch.setattr(memory, "_cgroups", list)
    assert (free_memory(torch.device("xpu")), total_memory(torch.device("xpu"))) == (1000, 4000)


def test_memory_of_several_devices_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most = [100, 20], [100, 20]
    backend = SimpleNamespace(device_count=lambda: 2, memory_allocated=now.__getitem__, max_memory_allocated=most.__getitem__)
    backend.reset_peak_memory_stats = lambda index: most.__setitem__(index, now[index])
    monkeypatch.setattr(memory, "_accelerator", lambda: backend)
    meter = PeakMeter()
    assert memory.used_memory(torch.device("cuda")) == meter.device() == 120
    most[1] = 500
    assert meter.device() == 600
    meter.restart()
    assert meter.device() == 120


@given(st.integers(1, 200), st.integers(0, 100), st.integers(0, 5000))
def test_affordable_stays_within_memory(size: int, row_bytes: int, free: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda device: free)
        rows = affordable(size, row_bytes, CPU)
        assert 1 <= rows <= size
        assert rows == 1 or row_bytes == 0 or rows * row_bytes <= free / 2
        assert rows == size or (rows + 1) * row_bytes > free / 2
        assert affordable(size, row_bytes, torch.device("cuda")) == size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets peaks")
def test_a_meters_peak_survives_another_ones_restart() -> None:
    outer = PeakMeter()
    before = outer.rss()
    large = torch.ones(20_000_000)
    del large
    inner = PeakMeter()
    assert outer.rss() >= before + 70e6
    assert inner.rss() <= outer.rss() - 60e6, "its own peak began later"


def test_a_halved_size_grows_back_step_by_step() -> None:
    """Other processes took memory for a while: three rows fit at first, then all."""
    capacity, tried = 3, list[int]()

    def work(part: list[int]) -> list[int]:
        tried.append(len(part))
        if len(part) > capacity:
            raise torch.OutOfMemoryError("full")
        return part

    sizes = Batches(8, CPU)
    sizes.run(list(range(8)), work)
    assert sizes.size == 2
    capacity = 100
    items = list(range(2000))
    assert sizes.run(items, work) == items
    assert sizes.size == 8
    assert tried[:4] == [8, 4, 2, 2]
    assert tried.count(2) == PATIENCE
    assert tried.count(4) - 1 == PATIENCE


def test_a_short_dip_costs_few_batches() -> None:
    """One cascade of halvings is one mistake, not five."""
    capacity = 6

    def work(part: list[int]) -> list[int]:
        if len(part) > capacity:
            raise torch.OutOfMemoryError("full")
        return part

    sizes, items = Batches(100, CPU), list(range(100))
    sizes.run(items, work)
    capacity, runs = 1000, 0
    while sizes.size < 100:
        sizes.run(items, work)
        runs += 1
    assert runs <= 40


def test_growing_back_into_the_wall_gets_rarer() -> None:
    """A size that will never fit again costs fewer and fewer attempts."""
    failed = 0

    def work(part: list[int]) -> list[int]:
        nonlocal failed
        if len(part) > 2:
            failed += 1
            raise torch.OutOfMemoryError("full")
        return part

    items = list(range(20_000))
    assert Batches(4, CPU).run(items, work) == items
    assert 2 <= failed <= 12


def test_batches_on_a_cpu_shrink_before_the_killer_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 100
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    tried: list[int] = []

    def work(part: list[int]) -> list[int]:
        nonlocal free
        tried.append(len(part))
        free = 1000
        return part

    assert Batches(6, CPU, row_bytes=20).run(list(range(14)), work) == list(range(14))
    assert tried == [2, 6, 6]


def test_longer_items_than_those_of_the_sizes_take_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are found with the evaluation prompts; training and held-out prompts are answered, too."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    batches = Batches(6, CPU, row_bytes=20, row_tokens=50)
    found = []
    for tokens in (10, 50, 400):
        batches.expect(tokens)
        found.append(batches.affordable())
    assert found == [6, 6, 3]
    without = Batches(6, CPU, row_bytes=20)
    without.expect(1000)
    assert without.affordable() == 6


def test_a_single_row_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cleared: list[int] = []
    monkeypatch.setattr(batching, "clear_device_cache", lambda device: cleared.append(1))

    def work(part: list[int]) -> list[int]:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(TrialError, match="single prompt"):
        Batches(4, CPU).run([1, 2, 3, 4], work)
    assert len(cleared) == 2
