"""Directions that spare capabilities, from the settings to the workbench: against residuals captured anew, and cached."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate.directions import Directions, compute_directions, direction_method
from abliterate.errors import AbliterateError
from abliterate.export.card import commands
from abliterate.model.residuals import capture_residuals
from abliterate.pipeline import stages, workers
from abliterate.pipeline.workbench import Workbench, load
from abliterate.settings.schema import Settings
from abliterate.types import Baseline
from support.runs import Recorder, quick_settings

Files = dict[str, str]
NAMES = ("code", "verse.txt")


@pytest.fixture(scope="module")
def settings(prompt_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("protected")
    (folder / "verse.txt").write_text("Write a rhyme about a snail.\nWrite a limerick.\nSing me a song.\n", encoding="utf-8")
    over = {"response": {"max_new_tokens": 4, "detect_prefix": False}, "search": {"objectives": ["refusals", "kl"]}}
    directions = {"protect": ["code", str(folder / "verse.txt")], "protect_ridge": 0.0}
    return quick_settings(prompt_files, folder / "cache", directions=directions, **over)


@pytest.fixture(scope="module")
def bench(settings: Settings) -> Iterator[Workbench]:
    with load(settings, Recorder()) as bench:
        yield bench


@pytest.fixture(scope="module")
def residuals(bench: Workbench) -> stages.Residuals:
    return stages.residuals(bench)


def mean_of(bench: Workbench, name: str) -> Tensor:
    """The mean (n_layers+1, d_model) float64 of a protected set's residuals, fed plainly."""
    prompts, loaded = bench.prompts.protected[name], bench.loaded
    return capture_residuals(loaded.model, loaded.layers, bench.chat, prompts, batch_size=5).double().mean(dim=0)


def test_capabilities_are_unit_differences_of_means(bench: Workbench, residuals: stages.Residuals) -> None:
    assert residuals.capabilities is not None
    assert list(bench.prompts.protected) == ["plain", *NAMES]
    plain = mean_of(bench, "plain")
    for place, name in enumerate(NAMES):
        raw = (mean_of(bench, name) - plain)[1:]
        assert torch.allclose(residuals.capabilities[1:, place], raw / raw.norm(dim=-1, keepdim=True), atol=1e-4)


def test_directions_are_orthogonal_to_them_and_without_them_as_before(bench: Workbench, residuals: stages.Residuals) -> None:
    assert residuals.capabilities is not None
    recorder = Recorder()
    context = replace(bench.context, reporter=recorder)
    found = stages.directions(context, residuals)
    assert (residuals.capabilities @ found.vectors.double()[..., None]).abs().max() < 1e-6
    assert torch.allclose(found.vectors[1:].norm(dim=-1), torch.ones(found.n_layers), atol=1e-6)
    assert any(note.startswith("code, verse.txt protected: the directions keep 0.") for note in recorder.notes)
    plain = compute_directions(direction_method("projected"), residuals.harmful, residuals.harmless)
    assert torch.equal(stages.directions(context, replace(residuals, capabilities=None)).vectors, plain.vectors)
    assert not torch.allclose(plain.vectors, found.vectors, atol=1e-3)


def test_nothing_left_is_told(bench: Workbench, residuals: stages.Residuals) -> None:
    plain = compute_directions(direction_method("projected"), residuals.harmful, residuals.harmless).vectors
    with pytest.raises(AbliterateError, match="nothing is left to remove"):
        stages.directions(bench.context, replace(residuals, capabilities=plain.double()[:, None]))


def test_they_come_from_the_cache_with_the_same_bits(bench: Workbench, residuals: stages.Residuals) -> None:
    assert residuals.capabilities is not None
    misses = bench.context.store.counts("residuals")["misses"]
    again = stages.residuals(bench).capabilities
    assert again is not None
    assert torch.equal(again, residuals.capabilities)
    assert bench.context.store.counts("residuals")["misses"] == misses


def test_workers_are_given_the_prompts_and_no_path(
    bench: Workbench, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run's own settings, whatever the worker's environment says, but for what every machine has of its own."""
    left: dict[str, bytes] = {}

    class Storage:
        share, shared = staticmethod(left.__setitem__), staticmethod(left.get)

    directions = Directions(torch.eye(2, 3))
    workers.publish(bench, Storage(), Baseline(1, 2), directions, bench.identity())  # type: ignore[arg-type]
    setup = workers.SharedSetup.of_bytes(left["setup"])
    assert setup.prompts == bench.prompts
    assert str(Path(settings.directions.protect[1]).parent) not in left["setup"].decode()
    monkeypatch.setenv("ABLITERATE_SEED", str(settings.seed + 1))
    monkeypatch.setenv("ABLITERATE_SEARCH__TRIALS", str(settings.search.trials + 1))
    with workers.settings_of(setup, {"device": "cpu"}) as own:
        assert own.directions.protect == ()
        assert (own.seed, own.search.trials) == (settings.seed, settings.search.trials)
        assert own.cache_dir == os.environ["ABLITERATE_CACHE_DIR"]
        assert own.prompts.system == settings.prompts.system
        assert bench.identity(own) == bench.identity()


def test_the_cards_command_names_no_folder(settings: Settings) -> None:
    record = {"model": {"id": "demo", "revision": "", "dtype": "float32"}, "startup_trials": 1}
    run, _ = commands(settings, record, "merged", 0)
    assert '--set \'directions.protect=["code", "verse.txt"]\'' in run
