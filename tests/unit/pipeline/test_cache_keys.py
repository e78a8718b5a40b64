"""Every input that an artifact depends on is part of its key: a key without it would give wrong values in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from abliterate.model.chat_template import PromptEncoder
from abliterate.model.loader import LoadedModel
from abliterate.objectives import ASKING, BY_MARKERS, DEFAULT
from abliterate.pipeline import cache_keys
from abliterate.pipeline.cache_keys import (
    OBJECTIVES_PART,
    SCORERS_PART,
    baseline_key,
    batch_sizes_key,
    means_key,
    prefix_key,
    residuals_key,
    study_identity,
    yardstick_key,
)
from abliterate.scorers.endpoint import MODEL
from abliterate.settings.schema import EditSettings, SearchSettings, Settings
from abliterate.types import Prompt
from support.models import CPU, PROMPTS, make_loaded, make_model, make_tokenizer

OTHERS = (Prompt("Another prompt", "You are a helpful assistant."),)
Key = Callable[[Settings, LoadedModel, PromptEncoder, tuple[Prompt, ...]], dict[str, Any]]
KEYS: dict[str, Key] = {
    "residuals": residuals_key,
    "means": means_key,
    "yardstick": yardstick_key,
    "baseline": lambda settings, loaded, chat, prompts: baseline_key(settings, loaded, chat, (prompts, PROMPTS)),
}


def chat(prefix: str = "") -> PromptEncoder:
    return PromptEncoder(make_tokenizer(), CPU, prefix)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return make_loaded(make_model("llama"))


@pytest.mark.parametrize("name", KEYS)
def test_keys_know_the_prompts_and_the_prefix(name: str, loaded: LoadedModel) -> None:
    key, settings = KEYS[name], Settings()
    first = key(settings, loaded, chat(), PROMPTS)
    assert first == key(settings, loaded, chat(), PROMPTS)
    assert first != key(settings, loaded, chat("Sure"), PROMPTS)
    assert first != key(settings, loaded, chat(), (*PROMPTS[:-1], *OTHERS)), "as many prompts, with other texts"
    assert first != key(settings, loaded, chat(), (PROMPTS[1], PROMPTS[0], *PROMPTS[2:])), "the same prompts in another order"


@pytest.mark.parametrize("name", ["baseline", "yardstick"])
def test_keys_know_how_the_model_generates(name: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = KEYS[name](Settings(), loaded, chat(), OTHERS)
    monkeypatch.setattr(loaded.model.generation_config, "repetition_penalty", 1.3)
    assert KEYS[name](Settings(), loaded, chat(), OTHERS) != first


def test_batch_sizes_know_what_is_kept_between_trials(loaded: LoadedModel) -> None:
    def key(**sections: Any) -> dict[str, Any]:
        edit = {"mode": "auto"} | sections.pop("edit", {})  # the default, which the tests' environment replaces
        return batch_sizes_key(Settings(edit=EditSettings(**edit), **sections), loaded, {"decode": (3, 9, 20)})

    several = {"method": "kmeans", "count": 2}
    found = [
        *(key(), key(directions=several), key(directions={**several, "count": 3})),
        *(key(load={"readers": True}), key(load={"components": {"attn": "o_proj"}})),
        *(key(edit={"mode": "columns"}), key(edit={"mode": "arbitrary-rank"}), key(edit={"capture_prompts": 9})),
    ]
    assert all(one not in found[:place] for place, one in enumerate(found))
    assert "kept" not in found[0], "so sizes that were found before are found again"


def test_a_yardstick_of_another_definition_is_no_use(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first = yardstick_key(Settings(), loaded, chat(), PROMPTS)
    monkeypatch.setattr(cache_keys, "VERSION", cache_keys.VERSION + 1)
    assert yardstick_key(Settings(), loaded, chat(), PROMPTS) != first


def test_a_search_by_markers_has_the_identity_it_always_had(loaded: LoadedModel) -> None:
    """So runs of earlier versions, which searched so by default, go on."""
    by_markers = Settings(search={"objectives": ("refusals", "kl")})  # type: ignore[arg-type]
    old = study_identity(by_markers, loaded, chat(), (PROMPTS,), BY_MARKERS)
    new = study_identity(Settings(), loaded, chat(), (PROMPTS,), DEFAULT)
    assert OBJECTIVES_PART not in old
    assert {name for name in new if new[name] != old.get(name)} == {OBJECTIVES_PART, SCORERS_PART}


@pytest.mark.parametrize(
    "search", [{"kernel": "cosine"}, {"sampler": "gp"}, {"startup": "sobol"}, {"prior": "silhouette"}, {"seed_from": "runs/x"}]
)
def test_a_study_knows_how_it_looks_and_not_which_run_it_was_seeded_from(search: dict[str, str], loaded: LoadedModel) -> None:
    """Settings that the first versions lacked leave the identity as it was where they have their defaults."""
    old = study_identity(Settings(), loaded, chat(), (PROMPTS,))
    space = SearchSettings()
    ranges = [space.direction_index, space.max_coeff, space.position, space.min_fraction, space.distance]
    assert old["search space"] == cache_keys._digest([ranges, space.ei_candidates])
    new = study_identity(Settings(search=search), loaded, chat(), (PROMPTS,))  # type: ignore[arg-type]
    assert {name for name in new if new[name] != old[name]} == (set() if "seed_from" in search else {"search space"})


def test_a_study_knows_what_is_protected_and_one_without_it_has_the_identity_it_always_had(loaded: LoadedModel) -> None:
    plain = study_identity(Settings(), loaded, chat(), (PROMPTS,))

    def identity(protected: tuple[tuple[Prompt, ...], ...], ridge: float = 0.01) -> dict[str, str]:
        # Its prompts count, and not the paths from which they came.
        directions = {"protect": ("/some/where.txt",) if protected else (), "protect_ridge": ridge}
        return study_identity(Settings(directions=directions), loaded, chat(), (PROMPTS,), protected=protected)  # type: ignore[arg-type]

    assert identity(()) == identity((), ridge=0.5) == plain
    one, other, ridged = identity((OTHERS,)), identity((PROMPTS,)), identity((OTHERS,), ridge=0.5)
    part = "set of protected capabilities"
    assert {name: value for name, value in one.items() if name != part} == plain
    assert len({one[part], other[part], ridged[part]}) == 3


def test_the_prefixs_key_knows_how_responses_are_read(loaded: LoadedModel) -> None:
    sets = (PROMPTS, OTHERS)
    keep = Settings(response={"thinking": "keep"})  # type: ignore[arg-type]
    assert prefix_key(Settings(), loaded, chat(), sets) != prefix_key(keep, loaded, chat(), sets)


def test_a_study_knows_which_model_judges(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names the endpoint's model, so the settings alone don't tell it."""

    def scorers(names: tuple[str, ...], model: str) -> str:
        monkeypatch.setenv(MODEL, model)
        settings = Settings(evaluation={"scorers": names})  # type: ignore[arg-type]
        return study_identity(settings, loaded, chat(), (PROMPTS,))[SCORERS_PART]

    for judge in ASKING:
        assert scorers((judge,), "a") != scorers((judge,), "b")
    assert scorers((), "a") == scorers((), "b"), "no judge is asked"
