"""Where markers stand, which parameters mattered, and what a run leaves to look at."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from abliterate.scorers.refusals import _with_places, marker_spans, normalize
from abliterate.search.importance import ENOUGH, importances
from abliterate.types import Trial
from support.reports import made_trials

TEXTS = st.text(alphabet=st.sampled_from("aIİßΣ' ’*\n\t\u2003x😀i") | st.characters(), max_size=40)


@given(TEXTS)
def test_places_belong_to_the_normalized_text(text: str) -> None:
    normalized, places = _with_places(text)
    assert normalized == normalize(text)
    assert len(places) == len(normalized)
    assert places == sorted(places)
    assert all(0 <= place < len(text) for place in places)


def test_markers_are_found_where_they_were_written() -> None:
    text = "Well. I’m  *sorry*,\nbut I CAN'T. I'm sorry!"
    spans = marker_spans(text, ("i'm sorry", "sorry, but", "can't", "absent"))
    assert [text[start:end] for start, end in spans] == ["I’m  *sorry*,\nbut", "CAN'T", "I'm sorry"]
    assert marker_spans("", ("x",)) == []
    assert marker_spans("İİ sorry", ("sorry",)) == [(3, 8)]


def test_importance_names_what_mattered_and_repeats() -> None:
    trials = made_trials(120)
    found = importances(trials, 100)
    assert next(iter(found["KL"])) == "attn max"
    assert next(iter(found["unanswered"])) == "attn position"
    assert all(abs(sum(part.values()) - 1) < 1e-6 for part in found.values())
    assert "mlp distance" not in found["KL"]  # it never changed
    assert importances(trials, 100) == found
    assert importances(trials[: ENOUGH - 1], 100) == {}


def test_importance_names_numbers_beside_kernels() -> None:
    """An edit method's parameters and the weights of several directions are searched like a kernel's numbers."""
    trials = [
        replace(trial, params=replace(trial.params, extra={"steer": trial.kl, "preserve": 0.5})) for trial in made_trials(60)
    ]
    found = importances(trials, 100)["KL"]
    assert list(found)[:2] in (["steer", "attn max"], ["attn max", "steer"])
    assert "preserve" not in found


def test_importance_without_differences_is_none() -> None:
    trials = [Trial(n, made_trials(1)[0].params, "complete", made_trials(1)[0].scores) for n in range(30)]
    assert importances(trials, 100) == {}
