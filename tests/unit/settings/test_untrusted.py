"""Which stored settings only a person may give, and how they are said again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from abliterate.errors import InputError
from abliterate.settings.schema import Settings
from abliterate.settings.sources import load_settings, merge, parse_assignments
from abliterate.settings.untrusted import check, options, requests, to_measure, unsaid, without, without_own_scorers


def asked(values: dict[str, Any], place: Path | None = None) -> list[tuple[str, str]]:
    return [(request.setting, request.value) for request in requests(values, place)]


def test_the_defaults_ask_for_nothing() -> None:
    assert requests(load_settings("").model_dump()) == ()
    assert requests({}) == ()
    check(load_settings(""), load_settings(""))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"load": {"trust_remote_code": True}}, [("load.trust_remote_code", "true")]),
        ({"load": {"trust_remote_code": "yes"}}, [("load.trust_remote_code", "true")]),
        ({"load": {"attn_implementation": "owner/kernel"}}, [("load.attn_implementation", "owner/kernel")]),
        ({"load": {"attn_implementation": "eager"}}, []),
        ({"search": {"objectives": ["kl", "/x/a.py:B:maximize"]}}, [("search.objectives", "/x/a.py:B")]),
        ({"evaluation": {"heldout_scorers": ["a.py:B"]}}, [("evaluation.heldout_scorers", "a.py:B")]),
        ({"evaluation": {"scorers": ("kl", "classifier", "endpoint")}}, []),
        ({"export": {"push": "me/x"}}, [("export.push", "me/x")]),
        ({"export": {"push": "me/x", "push_private": False}}, [("export.push", "me/x"), ("export.push_private", "false")]),
        ({"export": {"push_private": False}}, []),
        ({"search": {"storage": "postgresql://host/db"}}, [("search.storage", "postgresql://host/db")]),
        ({"load": 3, "evaluation": "x", "search": {"objectives": "words"}, "export": []}, []),
    ],
)
def test_what_only_a_person_may_allow(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert asked(values) == expected


def test_a_database_in_the_directory_itself_is_fine(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.db").symlink_to(tmp_path / "elsewhere.db")
    inside = [f"sqlite:///{run}/study.db", f"sqlite:///{run}/deep/../study.db"]
    outside = [
        f"sqlite:///{tmp_path}/study.db",
        f"sqlite:///{run}/../study.db",
        f"sqlite:///{run}/link.db",
        f"sqlite:///{run}/study.db?plugin=theirs",
        f"sqlite:///file:{run}/study.db",
        f"sqlite+pysqlcipher:///{run}/study.db",
        "postgresql://there/db",
    ]
    for url in inside:
        assert asked({"search": {"storage": url}}, run) == []
        assert asked({"search": {"storage": url}}) != []
    for url in outside:
        assert asked({"search": {"storage": url}}, run) == [("search.storage", url)]


def test_a_scorer_that_a_person_names_anywhere_is_allowed() -> None:
    stored = {"evaluation": {"scorers": ["kl", "/x/a.py:B", "/x/c.py:D"]}, "search": {"objectives": ["/x/a.py:B:maximize"]}}
    own = load_settings("", {"evaluation": {"heldout_scorers": ["/x/a.py:B"]}})
    left = unsaid(stored, own)
    assert [request.value for request in left] == ["/x/c.py:D"]
    assert without(stored, left) == merge(stored, {"evaluation": {"scorers": ["kl", "/x/a.py:B"]}})
    everything = without(stored, unsaid(stored, load_settings("")))
    assert everything == {"evaluation": {"scorers": ["kl"]}, "search": {"objectives": ["kl"]}}


def test_the_options_of_the_sentence_say_the_same_again() -> None:
    stored = {
        "load": {"trust_remote_code": True, "attn_implementation": "owner/kernel"},
        "evaluation": {"scorers": ["kl", '/a folder/it\'s "mine".py:B']},
        "search": {"objectives": ["kl", "/x/é.py:D:maximize"]},
        "export": {"push_private": False, "push": "me/x"},
    }
    settings = load_settings("", stored)
    with pytest.raises(InputError) as caught:
        check(settings, load_settings(""), Path("a run"))
    text = str(caught.value)
    assert text.startswith("The run in a run asks for what only you may allow: running the scorer ")
    words = shlex.split(text.partition("repeat the command with ")[2].removesuffix("."))
    assert words == options(stored, requests(stored))
    values = parse_assignments([value for name, value in zip(words[::2], words[1::2], strict=True) if name == "--set"])
    own = load_settings("", merge(values, {"export": {"push": words[words.index("--push") + 1]}}))
    check(settings, own)
    assert own == settings


def test_a_password_is_in_no_sentence() -> None:
    url = "postgresql://me:pa55@host/db"
    stored = {"search": {"storage": url}}
    with pytest.raises(InputError) as caught:
        check(load_settings("", stored), load_settings(""))
    assert "pa55" not in str(caught.value)
    assert options(stored, requests(stored)) == ["--storage", "postgresql://me:***@host/db"]


def test_what_is_measured_and_what_is_built_in() -> None:
    stored = {"load": {"dtypes": ["float32"]}, "seed": 1, "out": "x", "evaluation": {"markers": "m", "scorers": ["kl"]}}
    expected = {"load": {"dtypes": ["float32"]}, "seed": 1, "evaluation": {"markers": "m", "scorers": ["kl"]}}
    assert to_measure(stored) == expected
    assert to_measure({"load": 3, "evaluation": "x", "prompts": []}) == {"load": 3, "evaluation": {}, "prompts": []}
    own = Settings.model_validate({"search": {"objectives": ["a.py:B"]}, "evaluation": {"scorers": ["kl", "a.py:B"]}})
    assert without_own_scorers(own).scorers == ("kl", "refusals")
    assert without_own_scorers(load_settings("")).scorers == load_settings("").scorers
