"""Tables as prompts: the column that holds them is named or the only one that can, and a header is never a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.errors import InputError
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.files import read_prompts
from abliterate.settings.schema import PromptSettings
from abliterate.settings.sources import load_settings
from abliterate.types import Prompt

# The form of AdvBench's file: 20 rows under a header, quotes where a text holds a comma.
ADVBENCH = "goal,target\n" + "".join(f'"Write guide {n}, in steps","Sure, here is guide {n}"\n' for n in range(20))
GOALS = [f"Write guide {n}, in steps" for n in range(20)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path | str, notes: list[str] | None = None) -> list[str]:
    found = load_prompts(str(path), PromptSettings(system=""), [].append if notes is None else notes.append)
    return [prompt.text for prompt in found]


def test_a_column_of_system_prompts_is_not_read_in_silence(tmp_path: Path) -> None:
    notes: list[str] = []
    assert texts(write(tmp_path, "own.csv", "prompt,system\nHello,Be brief.\n"), notes) == ["Hello"]
    (note,) = notes
    assert note == "The column 'system' of own.csv isn't read; give the prompts as .jsonl for system prompts of their own."


def test_advbench_is_its_goals(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write(tmp_path, "harmful.csv", ADVBENCH)
    assert texts(path, notes) == GOALS
    assert notes == ["The column 'goal' of harmful.csv holds the prompts (its columns: goal, target)."]
    assert texts(f"{path}:target", notes)[3] == "Sure, here is guide 3"
    assert len(notes) == 1, "a column that was named needs no note"
    assert texts(f"{path}:Goal") == GOALS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("excel.csv", "\ufeffid;prompt\r\n1;one, two\r\n2;three\r\n", ["one, two", "three"]),
        ("tabs.tsv", 'Behavior\tBehaviorID\nmake a "thing"\tx\n', ['make a "thing"']),
        ("bars.csv", "question|source\nWhy so?|a\n", ["Why so?"]),
        ("pandas.csv", ",forbidden_prompt\n0,How so?\n1,Why so?\n", ["How so?", "Why so?"]),
        ("spaced.csv", 'goal, target\n"a, b", "c, d"\n', ["a, b"]),
        ("lines.csv", 'text\n"one\n\ntwo"\n\n"a\u2028b"\n', ["one\n\ntwo", "a\u2028b"]),
        ("quoted.csv", 'text,n\n"say ""hello""",1\n', ['say "hello"']),
        ("alone.csv", "sentence_of_ours\nfirst\nsecond\n", ["first", "second"]),
        ("one_text.csv", "id,statement,harm\na1,Tell me more,0.5\na2,Tell me less,0.1\n", ["Tell me more", "Tell me less"]),
        ("both.csv", "text,prompt\nno,yes\n", ["yes"]),
        ("gaps.csv", "prompt,label\none,1\n,2\n,\nthree,3\n", ["one", "three"]),
        ("strings.json", '["one",\n "two"]', ["one", "two"]),
        ("objects.json", '[{"goal": "one", "target": "x"}, {"goal": "two", "target": "y"}]', ["one", "two"]),
        ("pretty.json", json.dumps([{"id": 1, "instruction": "one"}], indent=2), ["one"]),
        ("array.jsonl", '[{"prompt": "one"}]\n', ["one"]),
        ("rows.jsonl", '{"goal": "one", "n": 1}\n{"goal": "two", "n": 2}\n', ["one", "two"]),
        ("rows.ndjson", '{"prompt": "one"}\r{"prompt": "two"}', ["one", "two"]),
    ],
)
def test_the_only_plausible_column(name: str, content: str, expected: list[str], tmp_path: Path) -> None:
    assert texts(write(tmp_path, name, content)) == expected


def test_fields_of_json_are_named_like_columns(tmp_path: Path) -> None:
    objects = [{"q": "a b", "answer": "c d", "system": "s"}, {"q": "e f", "answer": "g h"}]
    for name, content in (("p.json", json.dumps(objects)), ("p.jsonl", "\n".join(map(json.dumps, objects)))):
        found = load_prompts(f"{write(tmp_path, name, content)}:q", PromptSettings(system="general"))
        assert found == (Prompt("a b", "s"), Prompt("e f", "general"))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    columns = {"goal": ["one", None, " ", "two"], "target": ["w", "x", "y", "z"], "n": [1, 2, 3, 4]}
    parquet.write_table(pyarrow.table(columns), path)
    assert texts(path) == ["one", "two"]
    assert texts(f"{path}:target") == ["w", "x", "y", "z"]
    with pytest.raises(InputError, match=r"'n' of .*p\.parquet holds int values, not text"):
        texts(f"{path}:n")
    with pytest.raises(InputError, match="has no column 'prompt'; name one of goal, target, n"):
        texts(f"{path}:prompt")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="is no parquet file"):
        texts(path)


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs the package pyarrow; install it with pip install pyarrow, or .* CSV\."):
        texts(write(tmp_path, "p.parquet", b"PAR1"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("jbb.csv", "Index,Goal,Behavior\n0,a b,c\n", r"which of its columns \(Index, Goal, Behavior\) .*jbb.csv:Goal"),
        ("two.csv", "statement,reply\nTell me more,I do so\n", r"two.csv:statement"),
        ("codes.csv", "id,kind\n1,a\n2,b\n", r"columns \(id, kind\) holds the prompts; name it as in codes.csv:goal"),
        ("headless.csv", "Tell me how to do this.\nAnd that.\n", "first row of .* can't be a header"),
        ("headless.csv", "1,Please tell me how to do this\n2,And that\n", "first row of .* can't be a header"),
        ("ragged.csv", "prompt\nTell me, please\n", "line 2 of .* has 2 cells, but the header has 1"),
        ("ragged.csv", "goal,target\na,b\nc\n", "line 3 of .* has 1 cells, but the header has 2"),
        ("open.csv", 'prompt\n"one\ntwo\n', r"no CSV \(unexpected end of data\); check its quotes"),
        ("empty.csv", "", "holds no prompts"),
        ("header.csv", "prompt\n", "holds no prompts"),
        ("nul.csv", "prompt\nthis\0\n", "Line 2 .* NUL"),
        ("latin.csv", b"prompt\ncaf\xe9\n", "not UTF-8"),
        ("cut.json", '["one", "tw', r"is not JSON .*array of strings or objects"),
        ("mixed.json", '["one", 2]', "Item 1 of .* has no text"),
        ("gap.json", '[{"prompt": "one"}, {"prompt": null}]', 'Item 2 of .* has no text under "prompt"'),
        ("blank.json", '["one", " "]', "Item 2 of .* is blank"),
        ("half.json", '["a\\ud800"]', "Item 1 of .* surrogate"),
        ("none.json", "[]", "holds no prompts"),
        ("object.json", '{\n "prompts": ["one"]\n}', "is one JSON object and no list of prompts; give a text file"),
        ("line.json", '{"data": [{"prompt": "one"}]}', "is one JSON object and no list of prompts; give a text file"),
        ("line.jsonl", '{"conversations": [{"value": "one"}]}', "is one JSON object and no list of prompts"),
        ("chats.json", '[{"messages": [{"role": "user", "content": "one"}]}]', "Item 1 of .* has no text"),
    ],
)
def test_what_is_no_column_is_one_sentence(name: str, content: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        texts(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("name", ["p.xlsx", "p.yaml", "p.csv.gz", "p.ARROW", "p.html"])
def test_other_tables_are_told_which_forms_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be read .*\.csv, \.tsv, \.json, \.jsonl or \.parquet.*name:split:column"):
        texts(write(tmp_path, name, "prompt: one\n"))


@pytest.mark.parametrize("header", ["goal,target", "prompt", "Text", '"id";"question"', "Behavior\tSemanticCategory"])
def test_a_header_in_a_text_file_is_no_prompt(header: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is the header of a table and no prompt; name the file \.csv"):
        texts(write(tmp_path, "p.txt", f"{header}\none,two\n"))
    assert texts(write(tmp_path, "p.txt", f"one\n{header}\n")) == ["one", header]


def test_a_text_file_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is text and has no column 'goal'"):
        texts(f"{write(tmp_path, 'p.txt', 'one')}:goal")
    with pytest.raises(InputError, match=r"There is no prompt file .*; give a text file"):
        texts(f"{tmp_path / 'gone.csv'}:goal")


def test_settings_keep_the_place_and_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "p.csv", ADVBENCH)
    monkeypatch.chdir(tmp_path)
    kept = load_settings("", {"prompts": {"harmful": "p.csv:goal", "harmless": "owner/name:train[:400]:text"}}).prompts
    assert kept.harmful == f"{tmp_path / 'p.csv'}:goal"
    assert kept.harmless == "owner/name:train[:400]:text"
    assert read_prompts(tmp_path / "p.csv", column="goal") == tuple(map(Prompt, GOALS))
