"""Two runs at the same time: with one cache, and in one directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from abliterate.search.space import Space
from abliterate.search.storage import open_storage
from abliterate.search.study import STUDY_NAME, Study
from abliterate.settings.schema import SearchSettings
from support.forked import Command, Lean, of_stage
from support.runs import outcomes

Whole = tuple[Path, Path, list[dict[str, Any]]]


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def test_two_runs_share_a_cache_at_the_same_time(whole: Whole, tmp_path: Path) -> None:
    config, alone, _ = whole
    options = ["--cache-dir", tmp_path / "cache", "--export", "none", "-n", "2", "--startup-trials", "2"]
    arguments = ["run", "demo", "-c", config, *options, "--json", "-o"]
    runs = [Command([*arguments, name], tmp_path, before=Lean()) for name in ("one", "two")]
    for command in runs:
        assert command.end() == 0, command.err
        assert not [event for event in command.events if event["event"] == "warning"]
    for name in ("one", "two"):
        assert outcomes(read(tmp_path / name)) == outcomes(read(alone))[:2]
    assert not list((tmp_path / "cache").rglob("*tmp*"))


def test_two_resumes_of_one_run_at_the_same_time(whole: Whole, tmp_path: Path) -> None:
    config, _, _ = whole
    arguments = ["run", "demo", "-c", config, "--export", "none", "-n", "500", "-o", "run", "--resume", "--json"]
    first = Command(arguments, tmp_path, before=Lean())
    assert first.wait_for(of_stage("search"))
    for second in [Command([*arguments, *more], tmp_path) for more in ([], ["--seed", "3"])]:
        assert second.end() == 2
        assert "Another run is at work in run; wait for it or stop it" in " ".join(second.err.split())
    assert first.process.is_alive()
    first.send(9)  # the kernel releases the lock
    first.end()
    third = Command([*arguments, "-n", "1"], tmp_path, before=Lean())
    assert third.end() in (0, 1), third.err  # one trial may have found nothing


@pytest.mark.filterwarnings("ignore:The value of `grace_period` might be too small")
def test_the_journals_lock_of_a_killed_run_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a relative path, as by default, and in a directory that was moved: Optuna alone would wait for ever."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    journal = Path("run") / "study.journal"
    space = Space(SearchSettings(), 12, ("attn.o_proj",))
    Study(open_storage("", journal, dead_lock=1), STUDY_NAME, space, 0).ask()
    for target in ("run/study.journal", "/nowhere/study.journal", str(journal.absolute())):
        os.symlink(target, "run/study.journal.lock")
        Study(open_storage("", journal, dead_lock=1), STUDY_NAME, space, 0).ask()
        assert not os.path.lexists("run/study.journal.lock")
