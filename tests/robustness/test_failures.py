"""What really makes a trial fail: it is recorded with its reason, the study goes on, and the others are as without."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from abliterate.model.editor import Editor
from abliterate.settings.schema import Settings
from support.runs import outcomes, quick_settings, run_in

Finished = tuple[Path, dict[str, Any], Settings]


class Failing:
    """In the given trials, `forward` or `svd_lowrank` does what makes them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, hows: Mapping[int, str]) -> None:
        self.trial, self.failed = -1, set[int]()
        apply, forward = Editor.apply, Qwen2ForCausalLM.forward

        def counted(editor: Editor, params: Any) -> None:
            if getattr(self, "last", None) is not params:  # a trial that is tried again is the same
                self.trial, self.last = self.trial + 1, params
            apply(editor, params)

        def odd_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            found = forward(model, *args, **kwargs)
            how = hows.get(self.trial)
            if how in ("memory", "nan"):
                self.failed.add(self.trial)
                if how == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                found.logits.fill_(torch.nan)
            return found

        def failing(real: Any) -> Any:
            def decompose(*args: Any, **kwargs: Any) -> Any:
                if hows.get(self.trial) == "svd":
                    self.failed.add(self.trial)
                    raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
                return real(*args, **kwargs)

            return decompose

        odd_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(Editor, "apply", counted)
        monkeypatch.setattr(torch, "svd_lowrank", failing(torch.svd_lowrank))
        monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd))  # tried next
        monkeypatch.setattr(Qwen2ForCausalLM, "forward", odd_forward)


REASONS = {"nan": "finite|NaN|number", "memory": "memory", "svd": "converge|decompos"}


@pytest.mark.parametrize(
    ("representation", "hows"), [("exact", {1: "nan", 2: "memory"}), ("svd", {1: "svd"})], ids=["nan, memory", "svd"]
)
@pytest.mark.usefixtures("lean")
def test_a_trial_that_fails_is_one_line_of_the_study(
    representation: str,
    hows: dict[int, str],
    finished: Finished,
    prompt_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, first, settings = finished
    search = {"trials": max(hows) + 2}
    over = {"export": {"kind": "none"}, "edit": {"representation": representation}, "search": search}
    own = quick_settings(prompt_files, Path(settings.cache_dir), **over)
    failing = Failing(monkeypatch, hows)
    result, recorder = run_in(tmp_path / "run", own)
    assert failing.failed == hows.keys()
    states = [trial["state"] for trial in result["trials"]]
    assert {number for number, state in enumerate(states) if state == "failed"} == hows.keys()
    assert len(states) == search["trials"]
    for number, how in hows.items():
        failed = result["trials"][number]
        assert re.search(REASONS[how], failed["reason"]), failed["reason"]
        assert "\n" not in failed["reason"]
        assert number not in result["front"]
        assert recorder.trials[number].reason == failed["reason"]
    if representation == "exact":
        assert outcomes(result)[0] == outcomes(first)[0]
