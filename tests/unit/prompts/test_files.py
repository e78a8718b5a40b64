"""Prompt files and the grammar of data set names."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.errors import InputError
from abliterate.pipeline.reproduce.recipe_settings import _is_dataset
from abliterate.prompts.files import (
    DatasetName,
    FileColumn,
    FolderColumn,
    digest,
    parse_source,
    public_source,
    read_prompts,
    wrap,
)
from abliterate.types import Prompt


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "  one \r\n\n\t\nzwei \u00fc\u2028still two\nthree")
    assert [prompt.text for prompt in read_prompts(path)] == ["one", "zwei \u00fc\u2028still two", "three"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.txt", b"\xef\xbb\xbfone\n")) == (Prompt("one"),)


def test_prefix_suffix_and_system(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "one\n")
    assert read_prompts(path, prefix="<", suffix=">", system="be kind") == (Prompt("<one>", "be kind"),)
    assert wrap([Prompt("a", "s")], "1", "2") == (Prompt("1a2", "s"),)


def test_jsonl_with_its_own_system(tmp_path: Path) -> None:
    lines = '{"prompt": "a\\nb", "other": 1}\n\n{"prompt": "c", "system": ""}\n{"prompt": "d", "system": "own"}\n'
    found = read_prompts(write(tmp_path, "p.jsonl", lines), system="general")
    assert found == (Prompt("a\nb", "general"), Prompt("c", ""), Prompt("d", "own"))


def test_the_ending_decides_without_case(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "p.JSONL", '{"prompt": "x"}')) == (Prompt("x"),)
    assert read_prompts(write(tmp_path, "p.md", '"x"')) == (Prompt('"x"'),)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json}", "not JSON"),
        ('"just text"', 'no text under "prompt"'),
        ("[1]", 'no text under "prompt"'),
        ("{}", 'no text under "prompt"'),
        ('{"prompt": 3}', 'no text under "prompt"'),
        ('{"prompt": "  "}', 'no text under "prompt"'),
        ('{"prompt": "a", "system": 3}', '"system" that is not text'),
        ('{"prompt": "a", "system": null}', '"system" that is not text'),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = write(tmp_path, "p.jsonl", '{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(path)
    assert str(caught.value).startswith("Line 3 of ")


def test_nul_in_text_is_named_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Line 2 .*NUL"):
        read_prompts(write(tmp_path, "p.txt", b"one\ntw\0o\n"))


@pytest.mark.parametrize(
    ("name", "content"), [("p.txt", ""), ("p.txt", " \n\n"), ("p.jsonl", "\n"), ("p.txt", b"\xef\xbb\xbf")]
)
def test_an_empty_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path, name, content))


@pytest.mark.parametrize("content", [b"caf\xe9\n", "sechzehn".encode("utf-16")])
def test_a_file_that_is_not_utf8(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(write(tmp_path, "p.txt", content))


def test_a_file_that_cant_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(tmp_path / "gone.txt")
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(tmp_path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mlabonne/harmless_alpaca:train[:400]:text", ("mlabonne/harmless_alpaca", "train[:400]", "text")),
        ("a/b:test[10:20]:col", ("a/b", "test[10:20]", "col")),
        ("a/b:train[:10%]:col", ("a/b", "train[:10%]", "col")),
        ("a/b:train+test:col", ("a/b", "train+test", "col")),
        ("a/b:train[:10]+test[10:20]:col", ("a/b", "train[:10]+test[10:20]", "col")),
        ("squad:validation:question", ("squad", "validation", "question")),
        ("a-b/c.d_e:train:two words", ("a-b/c.d_e", "train", "two words")),
    ],
)
def test_data_set_names(source: str, expected: tuple[str, str, str]) -> None:
    assert parse_source(source) == DatasetName(*expected)


@pytest.mark.parametrize(
    "source",
    ["nowhere.txt", "a/b", "a/b:train", "a/b::col", "a/b:train:", "a/b/c:train:col", "", "a/b:train[:4:col", ":train:col"],
)
def test_what_is_no_source(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        parse_source(source)
    assert caught.value.exit_code == 2


def test_an_existing_file_wins_over_a_data_set_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "odd:train:text", "one\n")
    assert parse_source("odd:train:text") == Path("odd:train:text")


def test_a_directory_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        parse_source(str(tmp_path))


def test_digest_depends_on_text_system_and_order() -> None:
    sets = [[Prompt("a"), Prompt("b")], [Prompt("b"), Prompt("a")], [Prompt("ab")], [Prompt("a", "b")], []]
    assert len({digest(prompts) for prompts in sets}) == len(sets)
    assert digest(tuple(sets[0])) == digest(sets[0])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a\\ud800b"}', "surrogate"),
        ('{"prompt": "a", "system": "\\udfff"}', "surrogate"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON"),
        ('{"prompt": 1e999}', "no text"),
        ('{"prompt": ["a"]}', "no text"),
        ('{"prompt": {"text": "a"}}', "no text"),
        ("null", "no text"),
        ('{"prompt": "a"} {"prompt": "b"}', "not JSON"),
        ('{"a": ' * 50_000, "not JSON"),
    ],
)
def test_hostile_json_is_one_sentence(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(write(tmp_path, "p.jsonl", line))
    assert str(caught.value).startswith("Line 1 of ")
    assert "\n" not in str(caught.value)


def test_binary_files_are_one_sentence(tmp_path: Path) -> None:
    """Pictures, archives, UTF-16, and what is random."""
    import random

    draw = random.Random(0)
    contents = [b"\x89PNG\r\n\x1a\n\0\0", b"PK\x03\x04\x14\0", "zwei\n".encode("utf-16"), b"\0" * 100]
    contents += [draw.randbytes(500) for _ in range(20)]
    for content in contents:
        for name in ("p.txt", "p.jsonl"):
            with pytest.raises(InputError, match=r"UTF-8|NUL|JSON") as caught:
                read_prompts(write(tmp_path, name, content))
            assert "\n" not in str(caught.value)


def test_a_line_of_a_megabyte_is_a_prompt(tmp_path: Path) -> None:
    text = "word " * 200_000
    assert read_prompts(write(tmp_path, "p.txt", f"one\n{text}\n"))[1].text == text.strip()


def test_ten_thousand_prompts_take_ten_times_as_long_as_a_thousand(tmp_path: Path) -> None:
    """Reading, tokenizing and hashing: linear in the number of prompts."""
    import time

    from support.models import make_chat

    chat, times = make_chat(), {}
    for count in (1000, 10_000):
        path = write(tmp_path, f"{count}.txt", "".join(f"Tell me how to do thing number {index}.\n" for index in range(count)))
        started = time.process_time()
        prompts = read_prompts(path)
        assert len({digest(prompts), digest(prompts[:-1])}) == 2
        assert sum(len(chat.token_ids(prompt)) for prompt in prompts) > 10 * count
        times[count] = time.process_time() - started
    assert times[10_000] < 25 * times[1000] + 0.5


def test_what_may_be_shared_of_a_source(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "goal\none\n")
    for source, shared in (
        (str(path), "p.csv"),
        (f"{path}:goal", "p.csv:goal"),
        (f"{tmp_path}/gone.csv:goal", "gone.csv:goal"),
        ("owner/name:train:text", "owner/name:train:text"),
    ):
        assert public_source(source) == shared
    folder = public_source(f"{tmp_path}:train[:5]:text")
    assert folder == f"./{tmp_path.name}:train[:5]:text"
    assert not _is_dataset(folder), "a recipe must not take it for a data set of the Hub"


def test_columns_of_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "p.csv", "a:b\none\n")
    monkeypatch.chdir(tmp_path)
    assert parse_source("p.csv:a:b") == FileColumn(Path("p.csv"), "a:b")
    (tmp_path / "set").mkdir()
    assert parse_source(f"{tmp_path}/set:train[:5]:text") == FolderColumn(tmp_path / "set", "train[:5]", "text")
    assert parse_source("set:train:text") == FolderColumn(Path("set"), "train", "text")
    with pytest.raises(InputError, match="names no column of the folder"):
        parse_source("set:train")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_source("~/p.csv") == path
    assert parse_source("~/p.csv:goal") == FileColumn(path, "goal")


@pytest.mark.parametrize(
    "content", ['{"prompt": "tell me"}\n{"prompt": "and me"}\n', '["one", "two"]', '[\n  {"prompt": "one"}\n]\n', '{"a": [1]}']
)
def test_json_in_a_text_file_is_no_prompt(content: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="holds JSON"):
        read_prompts(tmp_path / "p.txt")


@pytest.mark.parametrize("line", ["{}", "[1, 2] what comes next?", "[3]", '"quoted"', "{ is a brace"])
def test_texts_that_look_like_json_stay_prompts(line: str, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(line, encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "p.txt")] == [line]
