"""Refusal detection: normalization, markers, matching, and what counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.errors import InputError
from abliterate.scorers import SCORERS, Making, Observation, Response, make_scorers
from abliterate.scorers.refusals import AutomatonMatcher, PlainMatcher, Refusals, normalize, read_markers
from abliterate.settings.sources import config_path

DOTTED_I = "\u0130"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I **cannot** do that", "i cannot do that"),
        ("I can\u2019t", "i can't"),
        ("I can\u2018t \u02bc \u00b4 \u0060 \uff07", "i can't ' ' ' '"),
        ("  I \t\n\n cannot\u00a0\u2003go  ", "i cannot go"),
        (DOTTED_I, "i\u0307"),
        ("\u039f\u0394\u039f\u03a3 \u03a3", "\u03bf\u03b4\u03bf\u03c3 \u03c3"),  # never the final sigma of str.lower()
        ("", ""),
        (" * ** \n", ""),
        ("*I* *c*annot", "i cannot"),
    ],
)
def test_normalization(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_normalizing_again_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@given(st.text(), st.text())
@settings(max_examples=200, deadline=None)
def test_normalization_doesnt_depend_on_where_a_text_is_cut(head: str, tail: str) -> None:
    pieces = [normalize(head + "x"), normalize("x" + tail)]
    assert normalize(head + "xx" + tail) == "".join(pieces)


LETTERS = st.sampled_from(["a", "b", " ", "'", "\u00e9", "\U0001f600", "\u4e2d"])
WORDS = st.text(LETTERS, min_size=1, max_size=4)


@given(st.lists(WORDS, min_size=1, max_size=6), st.text(LETTERS, max_size=30))
@settings(max_examples=300, deadline=None)
def test_automaton_equals_plain_matching(markers: list[str], text: str) -> None:
    assert AutomatonMatcher(markers).matches(text) == PlainMatcher(markers).matches(text)


@given(st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=4), st.text(max_size=20), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_automaton_finds_what_is_there(markers: list[str], text: str, place: int) -> None:
    assert AutomatonMatcher(markers).matches(text[:place] + markers[-1] + text[place:])


def test_overlapping_markers() -> None:
    matcher = AutomatonMatcher(["abcd", "bc", "bcx"])
    assert [matcher.matches(text) for text in ("abce", "bxc", "zabcd", "")] == [True, False, True, False]


def observation(*responses: Response) -> Observation:
    return Observation(responses, torch.zeros(1, 2))


@pytest.mark.parametrize("efficient", [True, False])
def test_what_counts_as_a_refusal(efficient: bool) -> None:
    scorer = Refusals(("i can't", "as an ai"), efficient=efficient)
    counted = ["Sorry, I CAN\u2019T.", "As an **AI**, no", "", " \n", "***", "I\ncan't"]
    free = ["Of course!", "I can", "As an owl"]
    assert [scorer.is_refusal(Response(text)) for text in counted] == [True] * 6
    assert [scorer.is_refusal(Response(text)) for text in free] == [False] * 3


def test_an_open_thinking_block_is_never_compliant() -> None:
    scorer = Refusals(("no",))
    assert scorer.is_refusal(Response("Sure, here it is", thinking_open=True))
    assert not scorer.is_refusal(Response("Sure, here it is"))


def test_score_is_a_share_and_its_record_a_count() -> None:
    score = Refusals(("no",)).score(observation(Response("No."), Response("yes"), Response(""), Response("fine")))
    assert (score.name, score.value, score.record, score.goal) == ("refusals", 0.5, 2, "minimize")


def test_unfinished_thinking_is_counted_apart() -> None:
    scorer = SCORERS["unfinished_thinking"](Making(()))
    score = scorer.score(observation(Response("a", True), Response("b"), Response("", True)))
    assert (score.record, score.goal) == (2, "none")


def test_scorers_by_name() -> None:
    assert [scorer.name for scorer in make_scorers(["refusals", "kl", "refusals"], ("no",))] == ["refusals", "kl"]
    with pytest.raises(InputError, match=r"'nonsense'.*refusals, unanswered, kl"):
        make_scorers(["refusals", "kl", "nonsense"], ("no",))
    with pytest.raises(InputError, match="must contain 'kl'"):
        make_scorers(["refusals"], ("no",))


def test_shipped_markers_load_normalized() -> None:
    markers = read_markers(config_path("markers.txt"))
    assert len(markers) > 50
    assert "i cannot" in markers
    assert "i can't" in markers
    assert all(marker == normalize(marker) and not marker.startswith("#") for marker in markers)
    assert len(set(markers)) == len(markers)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can\u2019t help with that.", True),
        ("I cannot assist with this request.", True),
        ("As an AI language model, I must decline.", True),
        ("Sure! First, gather some flour and water.", False),
        ("Here is a short poem about the sea.", False),
    ],
)
def test_shipped_markers_at_work(text: str, refusal: bool) -> None:
    assert Refusals(read_markers(config_path("markers.txt"))).is_refusal(Response(text)) is refusal


def test_marker_file_with_comments_blanks_and_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "m.txt"
    path.write_text("\ufeff# comment\nI Can\u2019t\n\n  i can't  \n*no*\n", encoding="utf-8")
    assert read_markers(path) == ("i can't", "no")


@pytest.mark.parametrize("content", [b"", b"# only comments\n\n", b"***\n", b"\xff\xfe\x00"])
def test_marker_files_that_are_of_no_use(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.txt"):
        read_markers(path)


def test_a_missing_marker_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        read_markers(tmp_path / "nowhere.txt")
