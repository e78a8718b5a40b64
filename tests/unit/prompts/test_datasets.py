"""Data sets from the Hub, with the package's loader replaced: no network in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import InputError
from abliterate.prompts import datasets as prompts_datasets
from abliterate.settings.schema import PromptSettings
from abliterate.types import Prompt

datasets = pytest.importorskip("datasets")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The columns of the data set that will be loaded."""
    columns: dict[str, list[Any]] = {}
    monkeypatch.setattr(prompts_datasets, "skip_retries_without_network", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_dict(columns))
    return columns


def test_null_and_blank_rows_are_no_prompts(rows: dict[str, list[Any]]) -> None:
    rows["text"] = ["one", None, "  ", "two"]
    found = prompts_datasets.load_prompts("owner/name:train:text", PromptSettings(system="s", suffix="!"))
    assert found == (Prompt("one!", "s"), Prompt("two!", "s"))


def test_nothing_but_null_rows_is_bad_input(rows: dict[str, list[Any]]) -> None:
    rows["text"] = [None, None]
    with pytest.raises(InputError, match="holds no prompts"):
        prompts_datasets.load_prompts("owner/name:train:text", PromptSettings())


@pytest.mark.parametrize(("values", "kind"), [([None, 3], "int"), ([["a"], ["b"]], "list")])
def test_rows_that_are_not_text_are_bad_input(rows: dict[str, list[Any]], values: list[Any], kind: str) -> None:
    rows["text"] = ["x"] * len(values)
    rows["other"] = values
    with pytest.raises(InputError, match=f"'other' of the data set owner/name holds {kind} values, .* of text, other"):
        prompts_datasets.load_prompts("owner/name:train:other", PromptSettings())


ROWS = {"goal": [f"goal {n}" for n in range(6)], "n": [*range(6)]}


@pytest.mark.parametrize("form", ["files", "saved", "saved with splits"])
def test_a_data_set_in_a_folder(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    folder, rows = tmp_path / "set", datasets.Dataset.from_dict(ROWS)
    folder.mkdir()
    if form == "files":
        rows.to_csv(folder / "train.csv", index=False)
    else:
        (datasets.DatasetDict({"train": rows}) if "splits" in form else rows).save_to_disk(str(folder))
    settings = PromptSettings(system="s")
    assert prompts_datasets.load_prompts(f"{folder}:train:goal", settings) == tuple(Prompt(t, "s") for t in ROWS["goal"])
    assert prompts_datasets.load_prompts(f"{folder}:train[2:4]:goal", settings) == (
        Prompt("goal 2", "s"),
        Prompt("goal 3", "s"),
    )
    with pytest.raises(InputError, match="has no column 'text'; name one of goal, n"):
        prompts_datasets.load_prompts(f"{folder}:train:text", settings)
    with pytest.raises(InputError, match="holds int values, not text"):
        prompts_datasets.load_prompts(f"{folder}:train:n", settings)
    if form != "saved":
        with pytest.raises(InputError, match=r"\(split test\) can't be loaded: .*; name a split that it has"):
            prompts_datasets.load_prompts(f"{folder}:test:goal", settings)
