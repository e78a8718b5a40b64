"""The search: its space, its determinism, resuming, and what a study refuses."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from abliterate.errors import AbliterateError, InputError
from abliterate.search.space import Space
from abliterate.search.storage import open_storage
from abliterate.search.study import Asked, Study, open_study
from abliterate.settings.schema import SearchSettings
from abliterate.types import Trial, TrialParams
from support.refined import refined_trial

COMPONENTS = ("attn.o_proj", "mlp.down_proj")
SETTINGS = SearchSettings(trials=20, startup_trials=4, ei_candidates=8)
SPACE = Space(SETTINGS, 12, COMPONENTS)
IDENTITY = {"model": "m", "edit.mode": "full"}


def expected_space(n_layers: int) -> dict[str, BaseDistribution]:
    last = n_layers - 1
    space: dict[str, BaseDistribution] = {
        "scope": CategoricalDistribution(["global", "per layer"]),
        "direction_index": FloatDistribution(0.4 * last, 0.9 * last),
    }
    for component in COMPONENTS:
        low = -0.25 if component == "mlp.down_proj" else 0.8
        space |= {
            f"{component}.max_coeff": FloatDistribution(low, 1.5),
            f"{component}.position": FloatDistribution(0.6 * last, 1.0 * last),
            f"{component}.min_fraction": FloatDistribution(0.0, 1.0),
            f"{component}.distance": FloatDistribution(1.0, max(1.0, 0.6 * last)),
        }
    return space


def ask_alone(space: Space, seed: int) -> tuple[TrialParams, optuna.Trial]:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    return space.suggest(trial), trial


def test_a_journal_has_one_study_whatever_its_name(tmp_path: Path) -> None:
    """Journals of older runs hold the study `abliterate`; new ones hold one that is named after model and time."""
    journal = tmp_path / "study.journal"
    open_study("", journal, SPACE, 0, "abliterate").claim({"model": "m"})
    open_study("", journal, SPACE, 0, "demo-20260101-000000").claim({"model": "m"}, begun=True)
    assert optuna.get_all_study_names(open_storage("", journal)) == ["abliterate"]
    open_study("", tmp_path / "new.journal", SPACE, 0, "demo-20260101-000000")
    assert optuna.get_all_study_names(open_storage("", tmp_path / "new.journal")) == ["demo-20260101-000000"]


@pytest.mark.parametrize("n_layers", [1, 2, 12, 80])
def test_all_parameters_are_always_suggested_within_the_spaces_bounds(n_layers: int) -> None:
    for seed in range(5):
        _, trial = ask_alone(Space(SETTINGS, n_layers, COMPONENTS), seed)
        assert trial.distributions == expected_space(n_layers)


def test_suggestions_become_kernels() -> None:
    params, trial = ask_alone(SPACE, 3)
    raw = trial.params
    assert params.scope == raw["scope"]
    assert params.direction_index == raw["direction_index"]
    for component, kernel in params.kernels.items():
        assert kernel.max_coeff == max(0.0, raw[f"{component}.max_coeff"])
        assert kernel.min_coeff == raw[f"{component}.min_fraction"] * kernel.max_coeff
        assert (kernel.position, kernel.distance) == (raw[f"{component}.position"], raw[f"{component}.distance"])


def test_a_negative_mlp_coeff_is_off() -> None:
    found = [ask_alone(SPACE, seed) for seed in range(60)]
    clamped = [params for params, trial in found if trial.params["mlp.down_proj.max_coeff"] < 0]
    assert 1 <= len(clamped) <= 30
    assert {params.kernels["mlp.down_proj"].coeff(layer) for params in clamped for layer in range(12)} == {0.0}
    assert all(params.kernels["mlp.down_proj"].max_coeff >= 0 for params, _ in found)


def test_ranges_are_data() -> None:
    own = SearchSettings(max_coeff={"default": (0.0, 0.5), "attn.o_proj": (2.0, 3.0)}, direction_index=(0.0, 0.1))
    for seed in range(5):
        params, _ = ask_alone(Space(own, 11, ("attn.o_proj", "other")), seed)
        assert 2 <= params.kernels["attn.o_proj"].max_coeff <= 3
        assert params.kernels["other"].max_coeff <= 0.5
        assert params.direction_index <= 1


# Studies on fake scores that depend on the parameters.


def scores_of(params: TrialParams) -> dict[str, Any]:
    attn, mlp = (params.kernels[name] for name in COMPONENTS)
    kl = 0.1 * attn.max_coeff**2 + 0.2 * mlp.max_coeff + 0.01 * attn.distance
    refusals = round(100 * math.exp(-attn.max_coeff * attn.distance / 4) + 3 * abs(params.direction_index - 6))
    return {"kl": {"mean": kl}, "refusals": refusals, "unanswered": {"count": refusals}}


def finish(study: Study, asked: Asked, *, failed: bool = False) -> None:
    if failed:
        study.tell(asked, Trial(asked.number, asked.params, "failed", reason="no convergence"), 100)
        return
    trial = Trial(asked.number, asked.params, "complete", scores_of(asked.params))
    study.tell(asked, trial, 100)


def fresh(folder: Path, seed: int = 0, space: Space = SPACE) -> Study:
    folder.mkdir(exist_ok=True)
    study = open_study("", folder / "study.journal", space, seed)
    study.claim(IDENTITY)
    return study


def uninterrupted(folder: Path, count: int, seed: int = 0, failing: tuple[int, ...] = ()) -> tuple[Trial, ...]:
    study = fresh(folder, seed)
    for number in range(count):
        finish(study, study.ask(), failed=number in failing)
    return study.trials()


@pytest.mark.parametrize("before", [0, 1])
def test_a_study_that_began_without_a_search_has_its_random_trials_later(before: int, tmp_path: Path) -> None:
    """`run -n 0` only refines, and may be continued with a search."""
    fresh(
        tmp_path / "run",
        space=dataclasses.replace(SPACE, settings=SETTINGS.model_copy(update={"trials": before, "startup_trials": 0})),
    )
    many = SETTINGS.model_copy(update={"trials": 100, "startup_trials": 0})
    later = fresh(tmp_path / "run", space=dataclasses.replace(SPACE, settings=many))
    assert later.n_startup == 30
    more = SETTINGS.model_copy(update={"trials": 200, "startup_trials": 0})
    assert fresh(tmp_path / "run", space=dataclasses.replace(SPACE, settings=more)).n_startup == 30, "from then on it stays"


def test_same_seed_same_trials(tmp_path: Path) -> None:
    first, second, other = (uninterrupted(tmp_path / name, 8, seed) for name, seed in (("a", 5), ("b", 5), ("c", 6)))
    assert first == second
    assert [trial.number for trial in first] == list(range(8))
    assert {trial.params.direction_index for trial in first}.isdisjoint({trial.params.direction_index for trial in other})


def test_trials_differ_from_each_other(tmp_path: Path) -> None:
    assert len({trial.params.direction_index for trial in uninterrupted(tmp_path / "a", 8)}) == 8


def test_global_randomness_makes_no_difference(tmp_path: Path) -> None:
    import random

    import numpy as np

    first = uninterrupted(tmp_path / "a", 7)
    random.seed(99)
    np.random.seed(99)
    assert uninterrupted(tmp_path / "b", 7) == first


@pytest.mark.parametrize("leave", ["running", "given up", "record written"])
def test_resuming_after_every_trial_equals_the_uninterrupted_study(tmp_path: Path, leave: str) -> None:
    expected = uninterrupted(tmp_path / "whole", 9, failing=(2, 6))
    for number in range(9):
        study = fresh(tmp_path / "parts")
        assert study.fail_interrupted() == (1 if number and leave != "given up" else 0)
        assert len(study.trials()) == number
        finish(study, study.ask(), failed=number in (2, 6))
        lost = study.ask()
        if leave == "given up":
            study.give_up(lost)
        if leave == "record written":  # a kill between the record and Optuna being told
            lost.handle.set_user_attr("record", "{}")
    resumed = fresh(tmp_path / "parts")
    resumed.fail_interrupted()
    assert resumed.trials() == expected


def test_another_interruption_is_not_counted_again(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    study.ask()
    study.ask()
    assert (study.fail_interrupted(), study.fail_interrupted()) == (2, 0)
    assert study.trials() == ()
    assert study.ask().number == 0


def test_failed_trials_count_interrupted_ones_dont(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    finish(study, study.ask(), failed=True)
    study.give_up(study.ask())
    finish(study, study.ask())
    found = fresh(tmp_path).trials()
    assert [(trial.number, trial.state) for trial in found] == [(0, "failed"), (1, "complete")]
    assert found[0].reason == "no convergence"
    assert fresh(tmp_path).ask().number == 2


def test_a_stopped_trial_is_told_with_its_values(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    asked = study.ask()
    scores = {"kl": {"mean": 0.5}, "refusals": 60, "unanswered": {"count": 60}}
    study.tell(asked, Trial(0, asked.params, "stopped", scores), 100)
    assert [trial.state for trial in fresh(tmp_path).trials()] == ["stopped"]


def test_a_trial_comes_back_as_it_was(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    asked = study.ask()
    scores = {"kl": {"mean": 0.25}, "refusals": 1, "unanswered": {"count": 3}, "x": [1, "é"]}
    told = Trial(0, asked.params, "complete", scores, 1.5, "")
    study.tell(asked, told, 100)
    assert fresh(tmp_path).trials() == (told,)


def test_more_trials_dont_change_which_are_random(tmp_path: Path) -> None:
    short, long = (Space(SearchSettings(trials=trials, ei_candidates=8), 12, COMPONENTS) for trials in (10, 60))
    first, other = fresh(tmp_path / "a", space=short), fresh(tmp_path / "b", space=short)
    for number in range(8):
        finish(first, first.ask())
        other = fresh(tmp_path / "b", space=short if number < 3 else long)
        finish(other, other.ask())
    assert other.trials() == first.trials()


def test_a_record_is_strict_json(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    asked = study.ask()
    scores = {"kl": {"mean": math.nan}, "refusals": 0, "unanswered": {"count": 0}}
    with pytest.raises(ValueError):
        study.tell(asked, Trial(0, asked.params, "complete", scores), 100)


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (IDENTITY | {"edit.mode": "none"}, "edit.mode"),
        (IDENTITY | {"new": "x"}, "new"),
        ({"model": "m"}, "edit.mode"),
        ({"model": "n", "edit.mode": "pre"}, "edit.mode, model"),
    ],
)
def test_a_study_refuses_another_identity_by_name(tmp_path: Path, identity: dict[str, str], named: str) -> None:
    fresh(tmp_path)
    study = open_study("", tmp_path / "study.journal", SPACE, 0)
    study.claim(IDENTITY)
    with pytest.raises(InputError, match=f"another {named}:"):
        study.claim(identity)


def filled_journal(folder: Path) -> Path:
    uninterrupted(folder, 3)
    return folder / "study.journal"


@pytest.mark.parametrize("junk", [b"\x00\xff\xfe not a journal\n{}\n", b'{"op_code": 99}\n{}\n', b"[]\n[]\n", b"null\n1\n"])
def test_a_journal_that_is_none(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "study.journal").write_bytes(junk)
    with pytest.raises(InputError, match=r"can't be opened.*--restart"):
        open_study("", tmp_path / "study.journal", SPACE, 0)


def test_a_journal_damaged_in_the_middle(tmp_path: Path) -> None:
    journal = filled_journal(tmp_path)
    lines = journal.read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b'{"op_code": 5, "tri\n'
    journal.write_bytes(b"".join(lines))
    with pytest.raises(InputError, match=r"study\.journal"):
        open_study("", journal, SPACE, 0)


def test_a_journal_cut_within_its_last_line_goes_on_as_before(tmp_path: Path) -> None:
    """A full disk or a power cut may leave half a record; what comes after must not be glued to it."""
    expected = uninterrupted(tmp_path / "whole", 6)
    journal = filled_journal(tmp_path / "cut")
    journal.write_bytes(journal.read_bytes()[:-9])
    study = fresh(tmp_path / "cut")
    study.fail_interrupted()
    while len(study.trials()) < 6:
        finish(study, study.ask())
    assert fresh(tmp_path / "cut").trials() == expected


def test_an_empty_journal_is_a_new_study(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_bytes(b"")
    assert fresh(tmp_path).trials() == ()


@pytest.mark.parametrize("url", ["nonsense://x", "sqlite:////nowhere/at/all/study.db"])
def test_a_storage_that_cant_be_reached(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match="storage URL given can't be opened"):
        open_study(url, tmp_path / "study.journal", SPACE, 0)


def test_a_database_gives_the_same_trials(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "whole", 6)
    for _ in range(6):
        study = open_study(f"sqlite:///{tmp_path}/study.db", tmp_path / "run" / "study.journal", SPACE, 0)
        study.claim(IDENTITY)
        finish(study, study.ask())
    assert study.trials() == expected


# Refined trials, which the sampler neither suggests nor sees.


@pytest.mark.parametrize("url", ["", "sqlite"])
def test_the_sampler_goes_on_as_if_there_were_no_refined_trials(url: str, tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "plain", 12)
    (tmp_path / "run").mkdir()
    database = url and f"sqlite:///{tmp_path}/study.db"
    added = []
    for number in range(12):
        study = open_study(database, tmp_path / "run" / "study.journal", SPACE, 0)
        study.claim(IDENTITY)
        if number in (0, 3, 8):
            slot = study.free_slot(20)
            assert study.add(refined_trial(slot))
            added.append(slot)
        asked = study.ask(20)
        assert asked is not None
        finish(study, asked)
    assert added == [20, 21, 22]
    again = open_study(database, tmp_path / "run" / "study.journal", SPACE, 0)
    assert again.trials() == (*expected, *map(refined_trial, added))


def test_the_slots_of_refined_trials_stay_taken(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    for _ in range(4):
        finish(study, study.ask(4))
    assert study.ask(4) is None
    assert study.free_slot(4) == 4
    assert all(study.add(refined_trial(number)) for number in (4, 5, 7))
    study = fresh(tmp_path)  # more trials are wanted
    assert study.free_slot(4) == 6
    numbers = []
    while (asked := study.ask(10)) is not None:
        numbers.append(asked.number)
        finish(study, asked)
    assert numbers == [6, 8, 9]
    assert [trial.number for trial in fresh(tmp_path).trials()] == list(range(10))
    assert study.free_slot(10) == 10
    assert study.free_slot(0) == 10


def test_a_refined_trial_is_added_once_and_only_to_a_free_slot(tmp_path: Path) -> None:
    study, other = (open_study("", tmp_path / "study.journal", SPACE, 0, worker=name) for name in ("one", "other"))
    study.claim(IDENTITY)
    assert study.add(refined_trial(5))
    assert study.add(refined_trial(5))
    assert not other.add(refined_trial(5, kl=0.5))
    assert study.trials() == other.trials() == (refined_trial(5),)
    asked = study.ask(1)
    assert asked is not None
    assert not other.add(refined_trial(asked.number))  # a trial at work has the slot, too
    study.give_up(asked)
    assert other.add(refined_trial(asked.number))


@pytest.mark.parametrize("call", ["create_new_trial", "set_trial_user_attr", "set_trial_state_values"])
def test_a_kill_while_a_refined_trial_is_added(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = fresh(tmp_path)

    def kill(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study._storage, call, kill)
        with pytest.raises(KeyboardInterrupt):
            study.add(refined_trial(20))
    resumed = fresh(tmp_path)
    resumed.fail_interrupted()
    assert resumed.trials() == ()
    assert resumed.free_slot(20) == 20
    assert resumed.add(refined_trial(20))
    assert fresh(tmp_path).trials() == (refined_trial(20),)


def test_a_refined_trial_that_no_run_wrote_is_a_sentence(tmp_path: Path) -> None:
    study = fresh(tmp_path)
    trial = refined_trial(3)
    params = dataclasses.replace(trial.params, file="refined/../../elsewhere.safetensors")
    study.add(dataclasses.replace(trial, params=params))
    with pytest.raises(InputError, match="can't be read"):
        fresh(tmp_path).trials()


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = fresh(tmp_path)
    asked = study.ask()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AbliterateError, match=r"No space left.*--resume"):
        finish(study, asked)


def test_a_worker_that_is_taken_for_dead_while_it_asks_asks_again(tmp_path: Path) -> None:
    """Another worker ends its trial between two parameters: the slot is free again, and the search goes on."""
    slow, other = (open_study("", tmp_path / "study.journal", SPACE, 0, worker=name) for name in ("slow", "other"))
    suggest = slow._space.suggest

    class Interrupted(Space):
        def suggest(self, trial: optuna.Trial) -> TrialParams:
            trial.suggest_categorical("scope", ["global", "per layer"])
            assert other._interrupt(trial._trial_id)
            return suggest(trial)

    slow._space = Interrupted(SETTINGS, 12, COMPONENTS)
    assert slow.ask(1) is None
    slow._space = SPACE
    asked = slow.ask(1)
    assert asked is not None
    assert asked.number == 0


def test_an_interruption_while_a_trial_is_suggested_leaves_its_slot_free(tmp_path: Path) -> None:
    study = fresh(tmp_path / "run")
    space = study._space

    class Interrupted(Space):
        def suggest(self, trial: optuna.Trial) -> TrialParams:
            raise KeyboardInterrupt

    study._space = Interrupted(SETTINGS, 12, COMPONENTS)
    with pytest.raises(KeyboardInterrupt):
        study.ask(2)
    study._space = space
    asked = [study.ask(2) for _ in range(3)]
    assert [one and one.number for one in asked] == [0, 1, None]


def test_a_modes_own_range_of_coeffs_stands_for_those_that_nobody_gave() -> None:
    def highest(**max_coeff: Any) -> list[float]:
        given = SearchSettings().max_coeff | {name.replace("_", ".", 1): high for name, high in max_coeff.items()}
        space = Space(SearchSettings(max_coeff=given), 12, ("attn.o_proj", "mlp.down_proj"), coeffs=(1.0, 8.0))
        found = space.at(lambda name: 1 - 2**-53)
        return [round(float(found[f"{name}.max_coeff"]), 6) for name in ("attn.o_proj", "mlp.down_proj")]

    assert highest() == [8, 8]
    assert highest(default=(1, 6)) == [6, 6]
    assert highest(mlp_down_proj=(0, 4)) == [8, 4]
    assert highest(default=(1, 6), mlp_down_proj=(0, 4)) == [6, 4]


@pytest.mark.parametrize("coeffs", [None, (1.0, 8.0), (0.0, 2.0), (-0.25, 1.5), (-1.0, 0.0)])
def test_the_edit_of_the_self_check_has_an_effect(coeffs: tuple[float, float] | None) -> None:
    """In the middle of a mode's own range, whatever that is."""
    found = Space(SearchSettings(), 12, COMPONENTS, coeffs=coeffs).upper_half().kernels["attn.o_proj"]
    assert found.max_coeff >= 0.5
    assert coeffs != (1.0, 8.0) or found.max_coeff == pytest.approx(8**0.5)
