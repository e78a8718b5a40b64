"""What a run says at its start: who can't load its adapter, and that a method can't find or remove so many directions."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.pipeline.context import Context
from abliterate.pipeline.export_trial import export_trial
from abliterate.pipeline.preflight import check_export, check_names, check_refined_size, note_adapter
from abliterate.settings.schema import Settings
from support.models import make_loaded, make_model
from support.runs import Recorder


@pytest.mark.parametrize(
    ("kind", "edit", "said"),
    [
        ("adapter", {}, True),
        ("adapter", {"mode": "pre"}, False),
        ("adapter", {"mode": "none"}, False),
        ("adapter", {"representation": "svd"}, False),
        ("merged", {}, False),
        ("none", {}, False),
    ],
)
def test_dora_is_announced(kind: str, edit: dict[str, str], said: bool) -> None:
    settings = Settings.model_validate({"model": "demo", "export": {"kind": kind}, "edit": edit})
    recorder = Recorder()
    note_adapter(Context.of(settings, recorder))
    assert any("vLLM and llama.cpp don't" in note and "--set edit.mode=pre" in note for note in recorder.notes) is said
    assert len(recorder.notes) == int(said)


def test_an_adapter_of_scaled_columns_is_refused_before_the_search(tmp_path: Path) -> None:
    loaded = make_loaded(make_model("llama"))
    base = {"model": "demo", "export": {"kind": "adapter"}}
    settings = Settings.model_validate(base | {"edit": {"mode": "columns"}})
    with pytest.raises(InputError, match=r"'columns' scales columns, as neither LoRA nor DoRA does.*choose --export merged"):
        check_export(settings, loaded.model.config, loaded.targets)
    with pytest.raises(InputError, match=r"'columns' scales columns.*choose --kind merged"):
        export_trial(settings, Recorder(), RunDirectory(tmp_path), 0, tmp_path / "out")
    as_svd = Settings.model_validate(base | {"edit": {"mode": "columns", "representation": "svd"}})
    check_export(as_svd, loaded.model.config, loaded.targets)


@pytest.mark.parametrize(
    ("modules", "count", "words"),
    [
        (520, 8, r"8 refined directions for each of 520 modules take 65 MiB.*--set directions\.count, or give --no-refine"),
        (4000, 1, r"Refined directions of 4000 modules take 63 MiB.*; give --no-refine"),
        (520, 1, ""),
    ],
)
def test_directions_that_refinement_could_not_store_are_refused(modules: int, count: int, words: str) -> None:
    options = {"model": "demo", "directions": {"method": "kmeans", "count": count}}
    refined, plain = (Settings.model_validate(options | {"refine": {"enabled": on}}) for on in (True, False))
    check_refined_size(plain, modules, 4096)
    with pytest.raises(InputError, match=words) if words else nullcontext():
        check_refined_size(refined, modules, 4096)


@pytest.mark.parametrize(
    ("method", "count", "words"),
    [("projected", 2, "finds one direction a layer, not 2"), ("som", 17, "finds at most 16 directions a layer, not 17")],
)
def test_more_directions_than_a_method_finds_are_refused(method: str, count: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_names(Settings.model_validate({"model": "demo", "directions": {"method": method, "count": count}}))
