"""A run that will export an adapter says at its start who can't load it."""

from __future__ import annotations

import pytest

from abliterate.pipeline.context import Context
from abliterate.pipeline.preflight import note_adapter
from abliterate.settings.schema import Settings
from support.runs import Recorder


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("adapter", {}, True),
        ("adapter", {"mode": "pre"}, False),
        ("adapter", {"mode": "none"}, False),
        ("adapter", {"representation": "svd"}, False),
        ("merged", {}, False),
        ("none", {}, False),
    ],
)
def test_dora_is_announced(kind: str, edit: dict[str, str], said: bool) -> None:
    settings = Settings.model_validate({"model": "demo", "export": {"kind": kind}, "edit": edit})
    recorder = Recorder()
    note_adapter(Context.of(settings, recorder))
    assert any("vLLM and llama.cpp don't" in note and "--set edit.mode=pre" in note for note in recorder.notes) is said
    assert len(recorder.notes) == int(said)
