"""The long count: a run killed at random moments and resumed is the uninterrupted run (DESIGN §6)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OPTIONS = [
    *("-n", "8", "--startup-trials", "4", "--export", "none", "--set", "response.max_new_tokens=40", "--batch-size", "50"),
    *("--set", "evaluation.heldout=false"),
]


def command(out: Path, *more: str) -> list[str]:
    """A short run of the demo into `out`."""
    return [sys.executable, "-m", "abliterate", "run", "demo", *OPTIONS, "--out", str(out), *more]


def trials_of(out: Path) -> list[dict[str, Any]]:
    """Finished trials without their times."""
    records = json.loads((out / "result.json").read_text(encoding="utf-8"))["trials"]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_and_resumed_equals_uninterrupted(seed: int, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ABLITERATE_CACHE_DIR": str(tmp_path / "cache")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # A front may stay empty after 8 trials; then the run ends with 1, and its trials count all the same.
    subprocess.run(command(whole, "--seed", str(seed)), env=environment, capture_output=True, check=False)
    moments = random.Random(seed)
    for _ in range(4):
        process = subprocess.Popen(
            command(killed, "--seed", str(seed), "--resume"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=moments.uniform(4, 12))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run(command(killed, "--seed", str(seed), "--resume"), env=environment, capture_output=True, check=False)
    assert len(trials_of(whole)) == 8
    assert trials_of(killed) == trials_of(whole)
