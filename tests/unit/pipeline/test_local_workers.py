"""The devices of `--gpus`: as many as there are, and their number where there are fewer; what workers say of the markers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abliterate.errors import InputError
from abliterate.pipeline.local_workers import devices_of, own_places
from abliterate.pipeline.run import run
from abliterate.pipeline.stages import own_markers
from abliterate.settings.presets import config_path
from abliterate.settings.schema import Settings


@pytest.mark.parametrize(("there", "said"), [(1, "1 device of type cuda, not 3; give --gpus 1"), (2, "2 devices of type cuda")])
def test_more_than_there_are_is_refused_with_their_number(there: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: there)
    with pytest.raises(InputError, match=said):
        devices_of(3, torch.device("cuda", 0))


def test_the_other_devices_get_a_worker_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert devices_of(3, torch.device("cuda", 1)) == ["cuda:0", "cuda:2"]
    assert devices_of(1, torch.device("cuda", 1)) == []


def test_a_cpu_is_shared_only_if_it_is_named() -> None:
    assert devices_of(3, torch.device("cpu"), "cpu") == ["cpu", "cpu"]
    with pytest.raises(InputError, match=r"no GPU that torch can use, so --gpus 3 finds none; .* --device cpu"):
        devices_of(3, torch.device("cpu"), "auto")


def test_workers_of_this_machine_use_the_runs_caches() -> None:
    assert own_places(Settings(cache_dir="")) == []
    settings = Settings(cache_dir="/scratch/c", efficiency={"residual_cache_dir": "/big"})  # type: ignore[arg-type]
    assert own_places(settings) == ["--cache-dir", "/scratch/c", "--set", "efficiency.residual_cache_dir=/big"]


def test_a_model_on_all_devices_leaves_none_for_workers() -> None:
    with pytest.raises(InputError, match="device_map the model lies on several devices, so --gpus has none left"):
        run(Settings(model="demo", device="cpu", load={"device_map": "auto"}), gpus=2)  # type: ignore[arg-type]


def test_a_workers_copy_of_the_default_markers_tells_refusals(tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_bytes(config_path("markers.txt").read_bytes())
    other.write_text("great question\n", encoding="utf-8")
    found = [own_markers(Settings(evaluation={"markers": name})) for name in ("", str(copy), str(other))]  # type: ignore[arg-type]
    assert found == ["", "", str(other)]
