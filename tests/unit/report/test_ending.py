"""The end of a run names commands that can be typed as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.artifacts.result import Result
from abliterate.report.ending import next_lines, summary
from support.reports import made_run


@pytest.mark.parametrize(("model", "told"), [("demo", "demo"), ("owner/name", "owner/name"), ("local-folder", "BASE")])
def test_the_base_is_named_where_its_name_is_enough(tmp_path: Path, model: str, told: str) -> None:
    result = Result.read(made_run(tmp_path / "run", count=4))
    assert result.model is not None
    result = result.model_copy(update={"model": result.model.model_copy(update={"id": model})})
    assert any(f"abliterate evaluate {told} runs/mine " in line for line in next_lines(result, "runs/mine"))


def test_an_earlier_sessions_export_isnt_called_the_selected_trials(tmp_path: Path) -> None:
    result = Result.read(made_run(tmp_path / "run", count=4))
    assert result.selected is not None
    for trial, said in ((result.selected, "exported (merged): runs/mine/model"), (77, "exported (merged of trial 77): runs")):
        export = result.export.model_copy(update={"kind": "merged", "trial": trial, "path": "model", "verified": True})
        found = summary(result.model_copy(update={"export": export}), "runs/mine")
        assert any(isinstance(part, str) and part.startswith(said) for part in found)
