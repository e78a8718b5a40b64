"""First trials from another run: which of its trials, at which depth, and what a stranger's run may do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.files import write_json
from abliterate.objectives import DEFAULT, vector
from abliterate.pipeline.seeds import check_continued, seed_trials, seed_values
from abliterate.search.space import Space
from abliterate.settings.schema import SearchSettings
from abliterate.types import Trial, TrialParams
from support.reports import made_run, made_trials

COMPONENTS = ("attn plain", "mlp plain")
MODE = "full"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made-up run of a model with 10 layers, whose last trial was refined and is selected."""
    return made_run(tmp_path_factory.mktemp("runs") / "other", refined=True).path


def taken(run: Path, trials: int, **settings: Any) -> tuple[Trial, ...]:
    return seed_trials(SearchSettings(seed_from=str(run), trials=trials, **settings)).trials


def front_of(run: Path) -> list[int]:
    """The trials of the run's front that a sampler suggested."""
    record = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return [number for number in record["front"] if number != record["selected"]]


def test_the_front_is_measured_again_without_refined_trials(other: Path) -> None:
    front = front_of(other)
    assert len(front) > 2
    numbers = [trial.number for trial in taken(other, trials=2 * len(front), startup_trials=1)]
    assert sorted(numbers) == sorted(front)
    costs = [vector(trial, DEFAULT) for trial in taken(other, trials=40, startup_trials=1)]
    assert costs == sorted(costs)


def test_a_long_front_is_thinned_to_half_of_the_budget_with_its_ends(other: Path) -> None:
    front = [trial.number for trial in taken(other, trials=40, startup_trials=1)]
    half = taken(other, trials=4, startup_trials=1)
    assert [trial.number for trial in half] == [front[0], front[-1]]
    assert len(taken(other, trials=1)) == 1


def test_a_short_front_is_filled_up_to_the_start_up_trials(other: Path) -> None:
    front = front_of(other)
    complete = [trial.number for trial in made_trials(40) if trial.state == "complete"]
    some = taken(other, trials=40, startup_trials=len(front) + 3)
    assert set(front) < {trial.number for trial in some} < set(complete)
    assert len(some) == len(front) + 3
    assert {trial.number for trial in taken(other, trials=200, startup_trials=100)} == set(complete)


def test_another_depth_scales_what_is_measured_in_layers(other: Path) -> None:
    settings = SearchSettings(
        seed_from=str(other), position=(0, 1), direction_index=(0, 1), distance=9, max_coeff={"default": (0, 9)}
    )
    seeds = seed_trials(settings)
    same = seed_values(Space(settings, 10, COMPONENTS), MODE, seeds)
    twice = seed_values(Space(settings, 19, COMPONENTS), MODE, seeds)
    for trial, ours, deeper in zip(seeds.trials, same, twice, strict=True):
        assert isinstance(trial.params, TrialParams)
        kernel = trial.params.kernels["attn plain"]
        assert ours["scope"] == deeper["scope"] == trial.params.scope
        assert ours["attn plain.position"] == kernel.position
        assert deeper["attn plain.position"] == pytest.approx(2 * kernel.position)
        assert deeper["attn plain.distance"] == pytest.approx(2 * kernel.distance)
        assert deeper["direction_index"] == pytest.approx(2 * trial.params.direction_index)
        assert deeper["attn plain.max_coeff"] == kernel.max_coeff
        assert "mlp plain.min_fraction" not in ours  # this kernel is off, so nobody knows its edge


def test_values_are_clamped_and_other_components_are_left_to_the_sampler(other: Path) -> None:
    settings = SearchSettings(seed_from=str(other))
    space = Space(settings, 10, ("attn plain", "experts.down_proj"))
    seeds = seed_trials(settings)
    for values in seed_values(space, MODE, seeds):
        assert 0.8 <= values["attn plain.max_coeff"] <= 1.5  # type: ignore[operator]
        assert 0.6 * 9 <= values["attn plain.position"] <= 9  # type: ignore[operator]
        assert not any(name.startswith(("mlp", "experts")) for name in values)
    with pytest.raises(InputError, match="same components"):
        seed_values(Space(settings, 10, ("experts.down_proj",)), MODE, seeds)


@pytest.mark.parametrize(
    ("settings", "kept"), [('edit = {mode = "full"}', True), ('edit = {mode = "none"}', False), ("", True)]
)
def test_coeffs_of_another_edit_mode_are_left_to_the_sampler(settings: str, kept: bool, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run").path
    (run / "settings.toml").write_text(settings, encoding="utf-8")
    space = Space(SearchSettings(seed_from=str(run)), 10, COMPONENTS)
    seeds = seed_trials(space.settings)
    run.rename(tmp_path / "aside")  # as --restart does to the run that is named, before its trials are used
    for values in seed_values(space, MODE, seeds):
        assert ("attn plain.max_coeff" in values, "mlp plain.max_coeff" in values) == (kept, kept)
        assert "attn plain.position" in values


def changed(record: dict[str, Any], how: str) -> dict[str, Any]:
    """The content of a result.json that no run leaves so."""
    if how == "only refined":
        record["trials"] = record["trials"][-1:]
        record["front"] = [record["selected"]]
    if how == "wild":
        record["trials"][0]["params"]["kernels"]["attn plain"]["position"] = 1e300
    if how == "no depth":
        record["model"]["n_layers"] = 0
    return record


@pytest.mark.parametrize("how", ["missing", "junk", "only refined", "wild", "no depth"])
def test_a_run_that_gives_nothing_is_told_in_a_sentence(other: Path, how: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if how == "junk":
        (run / "result.json").write_bytes(b"\xff[")
    elif how != "missing":
        write_json(run / "result.json", changed(json.loads((other / "result.json").read_text(encoding="utf-8")), how))
    with pytest.raises(InputError) as caught:
        taken(run, trials=10)
    text = str(caught.value)
    assert str(run) in text
    assert text.count(". ") == 0


@pytest.mark.parametrize(
    ("began", "asked", "said"),
    [
        ('seed_from = "/runs/a"', "/runs/a", ""),
        ('seed_from = "/runs/a"', "/runs/b", "has begun with trials of /runs/a and can't"),
        ('seed_from = "/runs/a"', "", "give this one"),
        ('seed_from = ""', "/runs/b", "has begun without search.seed_from"),
        ("trials = 3", "/runs/b", "leave --seed-from out"),  # of an earlier version
        ("trials = 3", "", ""),
    ],
)
def test_a_run_is_continued_with_the_trials_that_it_began_with(began: str, asked: str, said: str, tmp_path: Path) -> None:
    directory, settings = RunDirectory(tmp_path), SearchSettings(seed_from=asked)
    directory.settings.write_text(f"[search]\n{began}\n", encoding="utf-8")
    check_continued(settings, directory)  # no run is there yet
    directory.journal.touch()
    if not said:
        check_continued(settings, directory)
        return
    with pytest.raises(InputError, match=said):
        check_continued(settings, directory)
