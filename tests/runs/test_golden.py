"""A run's `result.json` is the one that this seed gave when the file was written: its format exactly, its numbers nearly.

The file's format is public, so a change of a name, a type or the order shows here. Update support/golden/result.json only on
purpose: from the `finished` run's file, with times, memory, versions and checksums emptied as they are there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abliterate.files import read_toml
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings
from support.cli import Invoke
from support.paths import TESTS
from support.runs import copy_run, run_in

GOLDEN = json.loads((TESTS / "support" / "golden" / "result.json").read_text(encoding="utf-8"))
# Numbers and texts below these names differ from run to run or from machine to machine; names and types must not.
VARYING = {"timings", "memory", "seconds", "environment", "sha256", "vectors_sha256"}
# Another CPU sums in another order: KL is right to about 1e-6, and differences of two models are such noise altogether.
RELATIVE, ABSOLUTE = 1e-3, 2e-6


def differences(found: Any, golden: Any, at: str = "result", *, varying: bool = False) -> Iterator[str]:
    """Each place where a JSON value is not the golden one."""
    if type(found) is not type(golden):
        yield f"{at} is {found!r} instead of {golden!r}"
    elif isinstance(golden, dict):
        if list(found) != list(golden):
            yield f"{at} has the names {list(found)} instead of {list(golden)}"
        for name in golden.keys() & found.keys():
            yield from differences(found[name], golden[name], f"{at}.{name}", varying=varying or name in VARYING)
    elif isinstance(golden, list):
        if len(found) != len(golden):
            yield f"{at} has {len(found)} entries instead of {len(golden)}"
        for index, pair in enumerate(zip(found, golden, strict=False)):
            yield from differences(*pair, f"{at}[{index}]", varying=varying)
    elif not varying and not (
        math.isclose(found, golden, rel_tol=RELATIVE, abs_tol=ABSOLUTE) if isinstance(golden, float) else found == golden
    ):
        yield f"{at} is {found!r} instead of {golden!r}"


def test_a_seeds_result_is_the_golden_one(finished: tuple[Path, dict[str, Any], Settings]) -> None:
    found = json.loads((finished[0] / "result.json").read_text(encoding="utf-8"))
    assert list(differences(found, GOLDEN)) == []


def test_a_resumed_run_changes_nothing_in_it(finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path) -> None:
    path, _, settings = finished
    run_in(copy_run(path, tmp_path / "run"), settings, resume=True)
    found = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    # Residuals come from the cache, and no trial was made again.
    assert list(differences(found, GOLDEN | {"caches": found["caches"]})) == []


def test_a_run_of_the_former_default_goes_on_in_its_mode(
    finished: tuple[Path, dict[str, Any], Settings], tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings.toml says full, which was the default when it began."""
    run = copy_run(finished[0], tmp_path / "run")
    monkeypatch.delenv("ABLITERATE_EDIT__MODE")
    assert load_settings("", {}).edit.mode == "auto"
    done = invoke("run", "--resume", "-o", str(run), "--yes")
    assert (done.code, "module inputs" in done.out + done.err) == (0, False)
    assert read_toml(run / "settings.toml")["edit"]["mode"] == "full"
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert list(differences(found, GOLDEN | {"caches": found["caches"]})) == []
