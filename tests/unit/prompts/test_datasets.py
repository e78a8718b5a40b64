"""Data sets from the Hub, with the package's loader replaced: no network in tests."""

from __future__ import annotations

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
