"""What really makes a trial fail: it is recorded with its reason, the study goes on, and the others are as without."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM

from abliterate.model.editor import Editor
from abliterate.settings.schema import Settings
from support.runs import outcomes, quick_settings, run_in

Finished = tuple[Path, dict[str, Any], Settings]
FAILED = 1  # the trial that fails


class Failing:
    """In that trial, `forward` or `svd_lowrank` does what makes it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
        self.trial, self.calls = -1, 0
        apply, forward = Editor.apply, Qwen2ForCausalLM.forward

        def counted(editor: Editor, params: Any) -> None:
            if getattr(self, "last", None) is not params:  # a trial that is tried again is the same
                self.trial, self.last = self.trial + 1, params
            apply(editor, params)

        def odd_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
            found = forward(model, *args, **kwargs)
            if self.trial == FAILED:
                self.calls += 1
                if how == "memory":
                    raise torch.OutOfMemoryError("CUDA out of memory")
                found.logits.fill_(torch.nan)
            return found

        def failing(real: Any) -> Any:
            def decompose(*args: Any, **kwargs: Any) -> Any:
                if self.trial == FAILED:
                    self.calls += 1
                    raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
                return real(*args, **kwargs)

            return decompose

        odd_forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(Editor, "apply", counted)
        if how == "svd":
            monkeypatch.setattr(torch, "svd_lowrank", failing(torch.svd_lowrank))
            monkeypatch.setattr(torch.linalg, "svd", failing(torch.linalg.svd))  # tried next
        else:
            monkeypatch.setattr(Qwen2ForCausalLM, "forward", odd_forward)


@pytest.mark.parametrize(("how", "reason"), [("nan", "finite|NaN|number"), ("memory", "memory"), ("svd", "converge|decompos")])
def test_a_trial_that_fails_is_one_line_of_the_study(
    how: str, reason: str, finished: Finished, prompt_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first, settings = finished
    over = {"export": {"kind": "none"}, "edit": {"representation": "svd" if how == "svd" else "exact"}}
    own = quick_settings(prompt_files, Path(settings.cache_dir), **over)
    failing = Failing(monkeypatch, how)
    result, recorder = run_in(tmp_path / "run", own)
    assert failing.calls > 0
    states = [trial["state"] for trial in result["trials"]]
    assert states[FAILED] == "failed"
    assert states.count("failed") == 1
    failed = result["trials"][FAILED]
    assert re.search(reason, failed["reason"]), failed["reason"]
    assert "\n" not in failed["reason"]
    assert FAILED not in result["front"]
    assert len(states) == 4
    if how != "svd":
        assert outcomes(result)[0] == outcomes(first)[0]
    assert recorder.trials[FAILED].reason == failed["reason"]
