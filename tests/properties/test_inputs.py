"""Properties of what reads anybody's input: settings, prompts, cache keys, names, journals."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abliterate.artifacts.cache import key_digest
from abliterate.artifacts.run_directory import default_path
from abliterate.errors import InputError
from abliterate.files import digest_of, safe_name
from abliterate.prompts.columns import is_header
from abliterate.prompts.files import digest, read_prompts
from abliterate.search.storage import CheckedJournal, check_journal, drop_torn_line
from abliterate.settings.schema import Settings
from abliterate.settings.sources import dump_settings, load_settings, option_names, parse_assignments, without_password
from abliterate.types import LARGEST_COUNT, Prompt

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(max_examples=300, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NO_NUL = TEXT.filter(lambda text: "\0" not in text and not text.startswith("~"))
FRACTION = st.floats(0, 1)
INTERVAL = st.tuples(FRACTION, FRACTION).map(sorted)
NAME = st.text(string.ascii_letters + "._-", min_size=1, max_size=20)
VALID = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("demo") | NO_NUL.map(lambda text: "no-such-folder-" + text[:20].replace("/", "")),
        "seed": st.integers(0, LARGEST_COUNT),
        "device": NO_NUL,
        "prompts": st.fixed_dictionaries({}, optional={"system": TEXT, "prefix": TEXT, "suffix": TEXT}),
        "response": st.fixed_dictionaries(
            {}, optional={"max_new_tokens": st.integers(1, 10**9), "prefix": TEXT, "answer_tags": st.lists(TEXT.filter(bool))}
        ),
        "load": st.fixed_dictionaries(
            {},
            optional={
                "max_memory": st.dictionaries(NAME, TEXT, max_size=3),
                "template_options": st.dictionaries(NAME, st.booleans() | st.integers(-9, 9) | st.floats(0, 9), max_size=3),
            },
        ),
        "search": st.fixed_dictionaries(
            {},
            optional={
                "trials": st.integers(1, 10**6),
                "direction_index": INTERVAL,
                "max_coeff": st.dictionaries(NAME, INTERVAL, max_size=3).map(lambda given: {"default": [0, 1], **given}),
                "distance": st.floats(1e-300, 1000),
            },
        ),
        "evaluation": st.fixed_dictionaries({}, optional={"batch_size": st.integers(0, 10**6)}),
        "efficiency": st.fixed_dictionaries({}, optional={"use_drafts": st.booleans()}),
    },
)


@FEW
@given(VALID)
def test_settings_survive_being_written(given: dict[str, Any]) -> None:
    loaded = load_settings("", given)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.toml"
        path.write_text(dump_settings(loaded), encoding="utf-8")
        assert load_settings(str(path)) == loaded


@MANY
@given(st.lists(st.text(max_size=30) | st.tuples(st.sampled_from([*option_names()]), TEXT).map("=".join), max_size=4))
def test_no_assignment_crashes(assignments: list[str]) -> None:
    try:
        assert isinstance(load_settings("", parse_assignments(assignments)), Settings)
    except InputError as error:
        text = str(error)
        assert len(text) > 20


@MANY
@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30), min_size=1, max_size=8))
def test_lines_come_back_as_prompts(lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.txt"
        for end in ("\n", "\r\n"):
            path.write_bytes((end.join(lines)).encode())
            expected = tuple(Prompt(line.strip()) for line in lines if line.strip().lstrip("\ufeff").strip())
            if lines[0].startswith("\ufeff") or not expected or is_header(expected[0].text):
                continue
            assert read_prompts(path) == tuple(prompt for prompt in expected)


@MANY
@given(st.lists(st.tuples(TEXT.filter(str.strip), TEXT), min_size=1, max_size=6))
def test_json_lines_come_back_as_prompts(pairs: list[tuple[str, str]]) -> None:
    prompts = tuple(Prompt(*pair) for pair in pairs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        for ascii_only in (True, False):
            lines = [json.dumps({"prompt": one.text, "system": one.system}, ensure_ascii=ascii_only) for one in prompts]
            path.write_text("\n".join(lines), encoding="utf-8")
            assert read_prompts(path) == prompts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@MANY
@given(st.binary(max_size=200) | st.lists(JSON.map(json.dumps), max_size=4).map(lambda lines: "\n".join(lines).encode()))
def test_no_file_crashes(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("p.txt", "p.jsonl"):
            path = Path(folder) / name
            path.write_bytes(content)
            try:
                found = read_prompts(path)
            except InputError as error:
                assert name in str(error)  # noqa: PT017
                continue
            assert all(prompt.text for prompt in found)
            json.dumps([prompt.text for prompt in found], ensure_ascii=False).encode("utf-8")
            digest(found)


def same(one: Any, other: Any) -> bool:
    """Equal values of equal types: 1, 1.0, "1" and True are four."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


ODD = st.sampled_from([1, "1", True, 1.0, None, "None", [], {}, ""])
KEY = st.dictionaries(st.sampled_from(["a", "b", "ab"]), JSON | ODD, max_size=3)


@MANY
@given(KEY, KEY)
def test_keys_are_equal_where_all_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (key_digest(one) == key_digest(other)) == same(one, other)
    assert (digest_of(one) == digest_of(other)) == same(one, other)
    assert key_digest(dict(reversed(one.items()))) == key_digest(one)
    assert key_digest(json.loads(json.dumps(one))) == key_digest(one)


def test_no_two_kinds_of_value_share_a_key() -> None:
    values = [1, "1", True, 1.0, None, "null", "None", False, 0, -0.0, "", [], {}, [1], ["1"], [[]], {"1": 1}, [None], "[1]"]
    assert len({key_digest({"x": value}) for value in values}) == len(values)
    assert len({key_digest({"x": {"a": 1}, "b": 2}), key_digest({"x": {"a": 1, "b": 2}})}) == 2


@MANY
@given(st.text(max_size=120) | st.lists(st.sampled_from(["..", "/", "\\", "con", ".", "-", "\n"]), max_size=9).map("".join))
def test_names_never_leave_their_folder(text: str) -> None:
    name = safe_name(text)
    assert safe_name(name) == name
    assert set(name) <= set(string.ascii_letters + string.digits + "._-")
    assert name[0] not in ".-"
    assert name[-1] not in ".-"
    assert 0 < len(name) <= 86
    assert default_path(text).parent == Path("runs")


@MANY
@given(st.text(string.ascii_letters + "@:/#?&=%", max_size=20), st.sampled_from(["u", ""]))
def test_no_password_is_shown(password: str, user: str) -> None:
    secret = f"SECRET{password}SECRET"
    assert "SECRET" not in without_password(f"postgresql+psycopg://{user}:{secret}@host:5432/db?x=1")


RECORD = st.dictionaries(st.text(max_size=6).filter(lambda name: name != "sha256"), JSON, max_size=3)


@FEW
@given(st.lists(st.lists(RECORD, min_size=1, max_size=3), min_size=1, max_size=4), st.data())
def test_journals_keep_whole_records(batches: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    """Cut anywhere, a journal is its first whole records; and what is written behind them is not glued to a half one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.journal"
        journal = CheckedJournal(path)
        for batch in batches:
            journal.append_logs(batch)
        records = [record for batch in batches for record in batch]
        content = path.read_bytes()
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        drop_torn_line(path)
        check_journal(path)
        again = CheckedJournal(path)
        again.append_logs([{"last": 1}])
        check_journal(path)
        found = [{name: value for name, value in one.items() if name != "sha256"} for one in again.read_logs(0)]
        assert found[-1] == {"last": 1}
        assert all(map(same, found[:-1], json.loads(json.dumps(records))))
