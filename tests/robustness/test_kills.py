"""kill −9 at random moments of a run, in every stage, then resume: nothing is lost (docs/design.md §6)."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from support.forked import Command, NoPictures, durations, finish, of_stage
from support.runs import outcomes

Whole = tuple[Path, Path, list[dict[str, Any]]]
STAGES = (
    *("startup", "prompts", "load", "calibrate", "residuals", "directions", "geometry", "prepare edits"),
    *("trial engine", "baseline", "search", "pick", "answers", "export", "verify", "report"),
)
SHORT = ("startup", "residuals", "search", "answers", "export")
STARTUP = 0.7  # seconds before the first line, about


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def kill_in(command: Command, stage: str, moment: float, length: float) -> str:
    """Kill a run `moment` (0 to 1) of the way through a stage; what was going on then."""
    if stage != "startup" and not command.wait_for(of_stage(stage)):
        return "at the end"
    time.sleep(moment * length)
    command.send(signal.SIGKILL)
    command.end()
    found = [event["name"] for event in command.events if event["event"] == "stage"]
    return found[-1] if found else "startup"


def kill_and_resume(seed: int, stages: tuple[str, ...], whole: Whole, folder: Path) -> list[str]:
    """One run, killed in one stage after the other; what it becomes is compared with the whole one. Where it was killed."""
    config, expected, events = whole
    lengths = durations(events) | {"startup": STARTUP}
    draw = random.Random(seed)
    arguments = ["run", "demo", "-c", config, "--cache-dir", folder / "cache", "-o", "run", "--resume", "--json"]
    hit, told = [], 0
    for stage in stages:
        command = Command(arguments, folder)
        hit.append(kill_in(command, stage, draw.random(), lengths[stage]))
        numbers = [event["trial"]["number"] for event in command.events if event["event"] == "trial"]
        told = max([told, *(number + 1 for number in numbers)])
        if (folder / "run" / "result.json").exists():
            read(folder / "run")  # whole at any moment
    last = finish(arguments, folder, before=NoPictures())
    assert last.end() == 0, last.err
    kept = [event["fields"]["resumed"] for event in last.events if event["event"] == "note" and "resumed" in event["fields"]]
    assert max([*kept, 0]) >= told  # no trial that was told is done again
    found, result = read(folder / "run"), read(expected)
    assert outcomes(found) == outcomes(result)
    assert (found["front"], found["selected"]) == (result["front"], result["selected"])
    assert found["export"]["verified"] is True
    for name in ("directions.safetensors", "geometry.json", "answers.json", "model/adapter_model.safetensors"):
        assert (folder / "run" / name).read_bytes() == (expected / name).read_bytes()
    assert {path.name for path in (folder / "run").iterdir()} == {path.name for path in expected.iterdir()}  # nothing half done
    return hit


def test_killed_in_each_stage_and_resumed_equals_uninterrupted(whole: Whole, tmp_path: Path) -> None:
    hit = kill_and_resume(0, SHORT, whole, tmp_path)
    print("killed in:", ", ".join(hit))
    assert len(hit) == 5
    assert len(set(hit)) >= 3


@pytest.mark.slow
def test_killed_at_fifty_moments_and_resumed_equals_uninterrupted(whole: Whole, tmp_path: Path) -> None:
    hit: list[str] = []
    for seed in range(10):
        stages = tuple(STAGES[(5 * seed + index) % len(STAGES)] for index in range(5))
        if seed % 2:  # in any order, too: most finds little left to do
            stages = tuple(random.Random(seed).sample(stages, 5))
        (tmp_path / str(seed)).mkdir()
        hit += kill_and_resume(seed, stages, whole, tmp_path / str(seed))
    counts = {stage: hit.count(stage) for stage in (*STAGES, "at the end")}
    print("killed in:", counts)
    assert sum(counts.values()) == 50
    assert counts["at the end"] <= 10
    for stage in ("startup", "load", "residuals", "trial engine", "search", "export", "verify"):
        assert counts[stage] > 0
