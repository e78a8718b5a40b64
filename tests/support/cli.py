"""Run the command line in this process or in a process of its own, and check how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from abliterate.artifacts.cache import ArtifactStore
from abliterate.cli import app

Finished = tuple[Path, dict[str, Any], Any]
# A port where nothing listens: the Hub is unreachable, with or without a network.
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
QUICK = [
    *("--set", "evaluation.heldout=false"),
    *("--set", "response.max_new_tokens=12", "--set", "response.detect_prefix=false", "--batch-size", "12"),
    *("--set", "search.max_coeff={default = [1.2, 1.5]}", "--set", "search.position=[0.3, 0.6]"),
    *("--set", "search.direction_index=[0.4, 0.7]", "--startup-trials", "2", "--set", "search.ei_candidates=8"),
]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


class Invoke:
    """Runs the command line within this process: `main`, as the entry point calls it."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture

    def __call__(self, *arguments: object) -> Outcome:
        self._patch.setattr(sys, "argv", ["abliterate", *map(str, arguments)])
        self._capture.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = self._capture.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)


def spawn(arguments: Sequence[object], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Run the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "abliterate", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def prompt_options(files: dict[str, str]) -> list[str]:
    """The four prompt sets as options."""
    return [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]


def assert_sentence(outcome: Outcome, code: int, *parts: str) -> None:
    """Standard error has one sentence with these parts, and no traceback."""
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err + outcome.out
    message = " ".join(outcome.err.split())
    assert message.startswith("error: ")
    assert message.endswith((".", "?"))
    for part in parts:
        assert part in message


def forbidden(*args: Any, **kwargs: Any) -> Any:
    """A stand-in for a function that must not be called."""
    raise AssertionError("must not be called")


def assert_json_lines(text: str) -> list[dict[str, Any]]:
    """Every line parses as JSON; returns the records."""
    return [json.loads(line) for line in text.splitlines()]


def filled_cache(root: Path) -> ArtifactStore:
    """A cache with entries of two models and a file of another program."""
    store = ArtifactStore(root, warn=print)
    for model in ("one", "two"):
        store.put("residuals", {"model": model}, {"residuals": torch.ones(3)}, f"{model}: 3 prompts")
    (root / "residuals" / "notes.txt").write_text("not ours", encoding="utf-8")
    return store
