"""Ctrl+C and SIGTERM in every stage of a run: it stops, keeps what is done, says how to go on; the second one stops at once."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.forked import Command, NoPictures, Slow, Stuck, finish, of_stage
from support.runs import outcomes

Whole = tuple[Path, Path, list[dict[str, Any]]]
STAGES = ("load", "calibrate", "residuals", "prepare edits", "trial engine", "baseline", "search", "pick", "export", "verify")


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stages", [STAGES[::2], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_signal_in_any_stage_keeps_everything(stages: Sequence[str], whole: Whole, tmp_path: Path) -> None:
    """One run, interrupted in each stage and continued, is the uninterrupted one."""
    config, directory, _ = whole
    expected = read(directory)
    arguments = ["run", "demo", "-c", config, "--cache-dir", tmp_path / "cache", "-o", "run", "--resume", "--json"]
    for index, stage in enumerate(stages):
        number = (signal.SIGINT, signal.SIGTERM)[index % 2]
        command = Command(arguments, tmp_path, before=Slow(stage))
        assert command.wait_for(of_stage(stage)), command.err
        command.send(number)
        assert command.end(timeout=30) == 128 + number, (stage, command.out, command.err)
        message = " ".join(command.err.split())
        assert "Traceback" not in message
        assert "error: interrupted" in message
        assert [event["name"] for event in command.events if event["event"] == "stage"][-1] == stage, "not stages later"
        if STAGES.index(stage) >= STAGES.index("residuals"):  # from here on there is a study
            assert "--resume --out run" in message
        if stage in ("export", "verify", "pick"):
            assert f"--trial {expected['selected']}" in message
    resumed = finish(arguments, tmp_path, before=NoPictures())
    assert resumed.end() == 0, resumed.err
    found = read(tmp_path / "run")
    assert outcomes(found) == outcomes(expected)
    assert (found["selected"], found["export"]["verified"]) == (expected["selected"], True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in directory.iterdir()}


def test_the_second_signal_stops_at_once(whole: Whole, tmp_path: Path) -> None:
    config = whole[0]
    command = Command(["run", "demo", "-c", config, "-o", "run", "--json"], tmp_path, before=Stuck())
    assert command.wait_for(lambda events: events[-1:] == [{"event": "stuck"}])
    command.send(signal.SIGINT)
    time.sleep(0.3)
    assert command.process.is_alive()  # it waits for the pass
    command.send(signal.SIGINT)
    started = time.monotonic()
    assert command.end(timeout=10) == 130
    assert time.monotonic() - started < 5
    assert "--resume --out run" in " ".join(command.err.split())
    assert "Traceback" not in command.err


@pytest.mark.parametrize("stage", ["load", "export"])
def test_the_first_signal_ends_what_takes_minutes_at_once(stage: str, whole: Whole, tmp_path: Path) -> None:
    command = Command(["run", "demo", "-c", whole[0], "-n", "2", "-o", "run", "--json"], tmp_path, before=Slow(stage, 60))
    assert command.wait_for(of_stage(stage)), command.err
    command.send(signal.SIGINT)
    assert command.end(timeout=15) == 130
    assert "error: interrupted" in command.err
    assert not list(tmp_path.glob("run/*model*"))
