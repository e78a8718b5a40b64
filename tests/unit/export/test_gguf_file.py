"""GGUF files from anybody: whatever is wrong with one is a sentence, in no time and no memory; sound ones keep their bytes."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import pytest

from abliterate.errors import InputError
from abliterate.export.gguf_file import read_gguf, size_of, write_gguf
from abliterate.export.gguf_library import block_sizes
from support.gguf_files import write_gguf as write_model
from support.models import make_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(make_model("llama"), tmp_path_factory.mktemp("sound") / "sound.gguf", "F16")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def tensor(name: str, dimensions: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


HOSTILE = {
    "empty": (b"", "it ends within its header"),
    "another format": (b"PK\3\4" + bytes(100), "it doesn't begin as such a file does"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its version is 50331648"),
    "old": (header(version=1), "its version is 1"),
    "endless entries": (header(fields=1 << 60), "it ends within its header"),
    "endless tensors": (header(tensors=1 << 60), "it ends within its header"),
    "an endless array": (header(fields=1) + text("a") + struct.pack("<IIQ", 9, 0, 1 << 60), "it ends within its header"),
    "endless texts": (
        header(fields=1) + text("a") + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(80),
        "it ends within its header",
    ),
    "an endless text": (header(fields=1) + struct.pack("<Q", 1 << 60), "it ends within its header"),
    "arrays in arrays": (header(fields=1) + text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50, "unknown type 9"),
    "an unknown value": (header(fields=1) + text("a") + struct.pack("<I", 77), "unknown type 77"),
    "no text": (header(fields=1) + struct.pack("<Q", 2) + b"\xff\xfe", "isn't UTF-8"),
    "twice": (header(fields=2) + (text("a") + struct.pack("<IB", 0, 1)) * 2, "it has a twice"),
    "odd alignment": (header(fields=1) + text("general.alignment") + struct.pack("<II", 4, 3), "isn't a power of two"),
    "many dimensions": (header(1) + tensor("t", (1,) * 9), "9 dimensions"),
    "unknown tensor type": (header(1) + tensor("t", (1,), 999), "which the installed package gguf doesn't know"),
    "half a block": (header(1) + tensor("t", (33,), 8) + bytes(99), "rows of 33 entries in blocks of 32"),
    "a huge tensor": (header(1) + tensor("t", (1 << 60, 1 << 60)), "it ends within the tensor t"),
    "one tensor in another": (header(2) + tensor("a", (8,)) + tensor("b", (8,)) + bytes(99), "shares bytes with another"),
    "equal names": (header(2) + tensor("a", (8,)) + tensor("a", (8,), 0, 32) + bytes(199), "has the tensor a twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence(case: str, tmp_path: Path) -> None:
    content, part = HOSTILE[case]
    (tmp_path / "file.gguf").write_bytes(content)
    with pytest.raises(InputError, match=part) as caught:
        read_gguf(tmp_path / "file.gguf", block_sizes())
    assert str(caught.value).endswith("; fetch it again, or name another.")


# The beginning of a file that goes on with zeros, and the reason why it is refused.
LONG = {
    "a key": (header(fields=1) + struct.pack("<Q", 1 << 27), "a name or text of 134217728 bytes, and at most 65536 are read"),
    "the name of a tensor": (header(1) + struct.pack("<Q", 65537), "a name or text of 65537 bytes, and at most 65536 are read"),
    "a text": (header(fields=1) + text("a") + struct.pack("<IQ", 8, 1 << 27), "134217728 bytes, and at most 16777216 are read"),
    "an array": (header(fields=1) + text("a") + struct.pack("<IIQ", 9, 0, 1 << 28), "its header is longer than 256 MiB"),
    "a text in an array": (
        header(fields=1) + text("a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 28),
        "its header is longer than 256 MiB",
    ),
}


@pytest.mark.parametrize("case", LONG)
def test_a_long_header_is_not_read_into_memory(case: str, tmp_path: Path) -> None:
    content, part = LONG[case]
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    os.truncate(path, 1 << 29)  # a file with a hole, which takes no room
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=part):
            read_gguf(path, block_sizes())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_long_names_and_texts_within_the_limits_are_read(tmp_path: Path) -> None:
    key, template = "k" * 65536, "t" * (16 << 20)
    path = tmp_path / "file.gguf"
    path.write_bytes(header(fields=1) + text(key) + struct.pack("<I", 8) + text(template))
    assert read_gguf(path, block_sizes()).value(key) == template


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read: Is a directory"):
        read_gguf(tmp_path, block_sizes())


def test_every_cut_is_noticed(sound: Path, tmp_path: Path) -> None:
    content, path, draw = sound.read_bytes(), tmp_path / "file.gguf", random.Random(0)
    tensors = read_gguf(sound, block_sizes()).tensors.values()
    begin, end = min(tensor.start for tensor in tensors), max(tensor.start + tensor.nbytes for tensor in tensors)
    path.write_bytes(content)
    cuts = {0, 1, begin - 1, begin, end - 1, *draw.sample(range(begin), 90), *draw.sample(range(begin, end), 10)}
    for cut in sorted(cuts, reverse=True):
        os.truncate(path, cut)
        with pytest.raises(InputError, match="it ends within"):
            read_gguf(path, block_sizes())


def test_garbled_headers_are_refused_or_read(sound: Path, tmp_path: Path) -> None:
    content, path, draw = sound.read_bytes(), tmp_path / "file.gguf", random.Random(0)
    end = read_gguf(sound, block_sizes()).tensors["token_embd.weight"].start
    refused = 0
    for number in range(100):
        changed = bytearray(content)
        place = draw.randrange(min(2000, end)) if number % 2 else draw.randrange(end)
        changed[place] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        try:
            read_gguf(path, block_sizes())
        except InputError:
            refused += 1
    assert 0 < refused < 100


def test_a_copy_without_edits_has_the_same_bytes(sound: Path, tmp_path: Path) -> None:
    base, out = read_gguf(sound, block_sizes()), tmp_path / "out.gguf"
    write_gguf(out, base, base.fields, base.tensors, {})
    assert out.read_bytes() == sound.read_bytes()
    assert size_of(base, base.fields, base.tensors.values()) == out.stat().st_size
    with pytest.raises(FileExistsError):
        write_gguf(out, base, base.fields, base.tensors, {})


def test_the_header_is_as_the_library_reads_it(sound: Path) -> None:
    mine, theirs = read_gguf(sound, block_sizes()), gguf.GGUFReader(sound)
    assert [field for field in theirs.fields if not field.startswith("GGUF.")] == list(mine.fields)
    assert {tensor.name: tensor.data_offset for tensor in theirs.tensors} == {t.name: t.start for t in mine.tensors.values()}
    assert {tensor.name: tensor.n_bytes for tensor in theirs.tensors} == {t.name: t.nbytes for t in mine.tensors.values()}
    assert mine.value("general.architecture") == "llama"
    assert mine.value("tiny.empty") == ""
    assert mine.value("llama.block_count") == 3
    assert mine.value("tokenizer.ggml.add_bos_token") is False
    assert mine.value("tokenizer.ggml.tokens") is None
    base = {tensor.name: tensor.data.tobytes() for tensor in theirs.tensors}
    assert {name: b"".join(mine.pieces(tensor)) for name, tensor in mine.tensors.items()} == base
