"""scripts/gpu_check.py: what a step tells, also one that fails or takes too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check

ARGUMENTS = ["--device", "cpu", "--small"]


def test_a_run_in_numbers() -> None:
    trials = [
        {"state": "complete", "seconds": 3.0},
        {"state": "stopped", "seconds": 1.0},
        {"state": "complete", "seconds": 5.0},
    ]
    result = {
        "trials": trials,
        "timings": {"load": 2.0, "calibrate": 3.5, "search": 9.0, "report": 1.0},
        "batch_sizes": {"decode": 8},
        "memory": {"peak_rss_bytes": 3 * 2**30, "peak_device_bytes": 0},
    }
    found = gpu_check.summary(result)
    assert found["trials"] == {"complete": 2, "stopped": 1}
    assert (found["mean s"], found["mean s of complete"], found["start-up s"], found["peak GiB"]) == (3.0, 4.0, 5.5, 3.0)
    assert gpu_check.summary(result | {"trials": []})["mean s of complete"] is None


def test_ways_of_decoding_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way runs the same random trials; a trial that differs is told."""
    plan = gpu_check.plan_of(tmp_path, "cpu", small=True)
    asked: dict[str, list[str]] = {}

    def searched(plan: gpu_check.Plan, name: str, *more: str, trials: int) -> dict[str, object]:
        asked[name] = list(more)
        return {"mean s": 1.0, "mean s of complete": 2.0, "start-up s": 3.0, "peak device GiB": 0.0, "batch": {}}

    def read_result(run: Path) -> dict[str, object]:
        refusals = 4 if run.name == "static-static" else 5
        trial = {"state": "complete", "scores": {"refusals": refusals, "kl": {"mean": 0.5}}}
        return {"trials": [trial, {**trial, "scores": {"refusals": 5, "kl": {"mean": 0.1 * refusals}}}]}

    monkeypatch.setattr(gpu_check, "searched", searched)
    monkeypatch.setattr(gpu_check, "read_result", read_result)
    found = gpu_check.static(plan)
    assert all("search.startup_trials=3" in more for more in asked.values())
    assert [("efficiency.use_static_cache=true" in more) for more in asked.values()] == [False, False, True]
    assert found["plain"]["mean s of complete"] == 2.0
    assert found["drafts and plain"]["same refusals"] == found["drafts and plain"]["complete"] == 2
    assert found["static and plain"]["same refusals"] == 1
    assert found["static and plain"]["largest difference of KL"] == pytest.approx(0.1)


def test_a_step_that_takes_too_long_or_fails_is_told(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), *ARGUMENTS]
    assert "took more than" in gpu_check.run_step("machine", 0, arguments, tmp_path)["failed"]
    assert "ended with 1 (see export.log)" in gpu_check.run_step("export", 60, arguments, tmp_path)["failed"]
    assert "result.json" in (tmp_path / "export.log").read_text(encoding="utf-8")


def test_what_a_step_began_ends_with_it(tmp_path: Path) -> None:
    """A process that holds memory would go on, and take it from later steps."""
    inner = "import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    log = tmp_path / "log"
    with log.open("w", encoding="utf-8") as errors, pytest.raises(subprocess.TimeoutExpired):
        gpu_check.within(2, [sys.executable, "-c", outer], dict(os.environ), errors)
    process = int(log.read_text(encoding="utf-8"))
    for _ in range(100):  # it is ended by a signal, and gone when its new parent has looked at it
        if not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it goes on")


@pytest.mark.slow
def test_steps_leave_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "machine", "inflate", "--out", str(tmp_path), *ARGUMENTS])
    gpu_check.main()
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert found["machine"]["TFLOP/s"] > 0
    assert found["inflate"]["parameters"] > 8e6
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 2
    assert table in capsys.readouterr().out


def test_an_unknown_step_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "nonsense", "--out", str(tmp_path), *ARGUMENTS])
    with pytest.raises(SystemExit):
        gpu_check.main()
