"""The end of a run names commands that can be typed as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.artifacts.result import Result
from abliterate.report.ending import next_lines
from support.reports import made_run


@pytest.mark.parametrize(("model", "told"), [("demo", "demo"), ("owner/name", "owner/name"), ("local-folder", "BASE")])
def test_the_base_is_named_where_its_name_is_enough(tmp_path: Path, model: str, told: str) -> None:
    result = Result.read(made_run(tmp_path / "run", count=4))
    assert result.model is not None
    result = result.model_copy(update={"model": result.model.model_copy(update={"id": model})})
    assert any(f"abliterate evaluate {told} runs/mine " in line for line in next_lines(result, "runs/mine"))
