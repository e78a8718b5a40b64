"""`~` in every path that comes in as a setting is the home directory, and one function knows that."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

import abliterate
from abliterate.cli import batch
from abliterate.errors import InputError
from abliterate.files import expanded, split_existing
from abliterate.settings.sources import absolute_database, load_settings, parse_assignments

PATHS = {
    "model": "~/model",
    "out": "~/runs/mine",
    "cache_dir": "~/cache",
    "load.chat_template": "~/template.jinja",
    "load.offload_folder": "~/offload",
    "prompts.harmful": "~/p.csv:goal",
    "prompts.harmless_eval": "~/p.csv",
    "prompts.over_refusal": "~/set:train[:4]:text",
    "evaluation.markers": "~/markers.txt",
    "evaluation.judge_model": "~/model",
    "efficiency.residual_cache_dir": "~/cache",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere, home / "model", home / "set"):
        folder.mkdir()
    for name in ("p.csv", "markers.txt", "template.jinja", "own.py"):
        (home / name).touch()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("ABLITERATE_CACHE_DIR")  # it would win over files
    monkeypatch.chdir(elsewhere)
    return home


def value(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part)
    return settings


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("source", ["option", "file", "environment", "list"])
def test_settings(name: str, source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse_assignments([f"{name}={PATHS[name]}"])
    assert value(_loaded(given, name, source, home, monkeypatch), name) == PATHS[name].replace("~", str(home))


def _loaded(given: dict[str, Any], name: str, source: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if source == "option":
        return load_settings("", given)
    if source == "list":
        return load_settings("", entry=given)
    if source == "environment":
        monkeypatch.setenv(f"ABLITERATE_{name.replace('.', '__').upper()}", PATHS[name])
        return load_settings()
    section, _, option = name.rpartition(".")
    heading = f"[{section}]\n" if section else ""
    (home / "own.toml").write_text(f'{heading}{option} = "{PATHS[name]}"\n', encoding="utf-8")
    return load_settings("~/own.toml")


def test_scorers_and_databases(home: Path) -> None:
    own = {"evaluation": {"scorers": ["~/own.py:Mine"]}, "search": {"storage": "sqlite:///~/study.db"}}
    settings = load_settings("", own)
    assert settings.evaluation.scorers == (f"{home}/own.py:Mine",)
    assert settings.search.storage == absolute_database("sqlite:///~/study.db") == f"sqlite:///{home}/study.db"


def test_runs_of_a_list(home: Path) -> None:
    def listed(*outs: str) -> None:
        runs = [f'[[run]]\nmodel = "demo"\nout = "{out}"\n' for out in outs]
        (home / "l.toml").write_text("\n".join(runs), encoding="utf-8")

    listed("~/one", "~/two")
    assert [run.options["out"] for run in batch.plan([], home / "l.toml", {}, "")] == [f"{home}/one", f"{home}/two"]
    listed("~/one", f"{home}/one")
    with pytest.raises(InputError, match="Runs 1 and 2 have the same directory"):
        batch.plan([], home / "l.toml", {}, "")


def test_what_is_no_home_stays(home: Path) -> None:
    assert load_settings("", {"out": "a/~/b"}).out == "a/~/b"
    assert load_settings("", {"out": "runs/mine"}).out == "runs/mine"
    assert expanded("~") == home
    assert split_existing("~/p.csv:goal") == (home / "p.csv", "goal")
    assert split_existing("owner/name:train:text") == (None, "owner/name:train:text")
    for path in ("~nobody-of-that-name/x", "~nobody-of-that-name"):
        with pytest.raises(InputError, match="no home directory on this machine"):
            load_settings("", {"out": path})
    assert not os.listdir(".")


def test_one_function_expands_paths() -> None:
    root = Path(abliterate.__file__).parent
    using = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "expanduser"
    }
    assert using == {"files.py"}
