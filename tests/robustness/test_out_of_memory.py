"""A whole run on a device whose memory comes and goes: the same results as without."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from abliterate.pipeline import export as pipeline_export
from abliterate.settings.schema import Settings
from support.runs import copy_run, quick_settings, run_in

FAILURES = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
)


class FlakyDevice:
    """Holds so many rows of the demo model at once, another number at every pass: between 1 and `most`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, most: int) -> None:
        self.passes = self.failed = 0
        draw = random.Random(seed)
        forward = Qwen2ForCausalLM.forward

        def limited(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            self.passes += 1
            if len(input_ids) > draw.randint(1, most):
                self.failed += 1
                raise draw.choice(FAILURES)
            return forward(model, input_ids=input_ids, **kwargs)

        limited.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", limited)


def settings_in(files: dict[str, str], cache: Path, batch_size: int) -> Settings:
    """A short run with an export that is verified."""
    over = {"response": {"max_new_tokens": 8}, "search": {"trials": 2}, "export": {"kind": "adapter"}}
    return quick_settings(files, cache, evaluation={"batch_size": batch_size}, **over)


@pytest.fixture(scope="module")
def undisturbed(prompt_files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run with all the memory it wants."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_in(folder / "run", settings_in(prompt_files, folder / "cache", 12))[0]


@pytest.mark.usefixtures("lean")
def test_an_export_that_memory_doesnt_hold_is_written_and_not_checked(
    finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a model that ran quantized: for its check an export is loaded dense."""
    path, _, settings = finished

    def full(*given: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(pipeline_export, "_verify", full)
    more = settings.model_copy(update={"export": settings.export.model_copy(update={"kind": "adapter"})})
    result, recorder = run_in(copy_run(path, tmp_path / "run"), more, resume=True)
    assert (result["export"]["kind"], result["export"]["verified"]) == ("adapter", None)
    assert any("written but not checked, because the memory of cpu doesn't hold it" in text for text in recorder.warnings)
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "recipe.json").exists()


# A given size, and one that is tuned on the flaky device itself.
@pytest.mark.parametrize(
    ("seed", "most", "batch_size"),
    [pytest.param(0, 16, 12, marks=pytest.mark.slow), pytest.param(1, 3, 12, marks=pytest.mark.slow), (2, 12, 0)],
)
def test_a_run_survives_running_out_of_memory(
    seed: int,
    most: int,
    batch_size: int,
    undisturbed: dict[str, Any],
    prompt_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = FlakyDevice(monkeypatch, seed, most)
    result, recorder = run_in(tmp_path / "run", settings_in(prompt_files, tmp_path / "cache", batch_size))
    assert device.failed > 10
    assert recorder.warnings == []
    assert result["baseline"] == undisturbed["baseline"]
    for found, expected in zip(result["trials"], undisturbed["trials"], strict=True):
        assert (found["params"], found["state"]) == (expected["params"], expected["state"])
        assert found["scores"]["refusals"] == expected["scores"]["refusals"]
        for name, value in expected["scores"]["kl"].items():
            assert found["scores"]["kl"][name] == pytest.approx(value, abs=1e-5)
    assert (result["front"], result["selected"]) == (undisturbed["front"], undisturbed["selected"])
    assert result["export"]["verified"] is True
