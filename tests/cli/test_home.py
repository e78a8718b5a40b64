"""`~` in the options and arguments of commands: the shell leaves it as it is behind `=`, and nothing called `~` is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.report import draw
from support.cli import Finished, Invoke, assert_sentence, filled_cache
from support.runs import copy_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Finished) -> Path:
    """The home directory, with a run in it; the current directory is another."""
    home = tmp_path / "home"
    home.mkdir()
    copy_run(finished[0], home / "run")
    monkeypatch.setenv("HOME", str(home))
    return home


def test_every_command_expands_its_paths(
    home: Path, invoke: Invoke, tmp_path: Path, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "png", lambda specs: dict.fromkeys(specs, b""))
    selected = finished[1]["selected"]
    assert str(home / "there") in invoke("report", "~/run", "--png=~/there", "--no-terminal").out
    assert list((home / "there").glob("*.png"))
    assert f"All {len(finished[1]['trials'])} trials" in invoke("trials", "~/run").out
    done = invoke("export", "~/run", "--trial", selected, "--kind=adapter", "--out=~/adapter")
    assert (done.code, (home / "adapter" / "adapter_config.json").is_file()) == (0, True), done
    assert_sentence(invoke("run", "demo", "--out=~/run"), 2, f"{home}/run already holds a run")
    assert_sentence(invoke("run", "--list=~/none.toml"), 2, f"{home}/none.toml can't be read")
    assert_sentence(invoke("run", "demo", "--config=~/none.toml"), 2, "no configuration file '~/none.toml'")
    assert_sentence(invoke("worker", "~/none"), 2, f"no run in {home}/none")
    assert_sentence(invoke("reproduce", "~/none.json"), 2, f"{home}/none.json")
    assert_sentence(invoke("evaluate", "demo", "~/run:999"), 2, "no finished trial 999")
    (home / "empty").mkdir()
    assert_sentence(invoke("chat", "~/empty"), 2, "The directory ~/empty holds neither a run")
    assert invoke("cache", "path", "--cache-dir=~/c").out.strip() == str(home / "c")
    filled_cache(home / "c")
    assert "deleted 2 entries" in invoke("cache", "clear", "--yes", "--cache-dir=~/c").out
    assert not [path for path in (tmp_path, home) for path in path.iterdir() if "~" in path.name]
