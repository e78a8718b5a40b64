"""A run for another behaviour than refusal: a preset on a model that doesn't show the behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import AbliterateError
from abliterate.pipeline.run import run
from abliterate.settings.sources import load_settings
from support.runs import Recorder

pytestmark = pytest.mark.usefixtures("lean")


def test_a_model_without_the_behaviour_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo agrees with nobody. It answers shortly, since markers are all that is counted here."""
    monkeypatch.chdir(tmp_path)
    short = {"response": {"max_new_tokens": 6, "detect_prefix": False}, "search": {"objectives": ["refusals", "kl"]}}
    plain = {"evaluation": {"batch_size": 32}, "efficiency": {"use_trial_engine": False}, **short}
    settings = load_settings("sycophancy", {"model": "demo", "cache_dir": "cache", **plain})
    recorder = Recorder()
    with pytest.raises(AbliterateError, match=r"None of the model's 32 answers .* doesn't show the behaviour"):
        run(settings, recorder, RunDirectory(tmp_path / "run"))
    assert "0 of 32 answers to harmful prompts have a marker" in recorder.notes
    assert "held out: 32 harmful-heldout, 32 harmless-heldout, 24 over-refusal prompts" in recorder.notes
