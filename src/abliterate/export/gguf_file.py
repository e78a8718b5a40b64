"""Read the header of a GGUF file, and write it again with some tensors and some metadata replaced.

The `gguf` library has a reader, but a file may come from anybody: an array that claims to be longer than the file keeps that
reader busy forever, and it doesn't keep the metadata's bytes. This module reads within the file's bounds, and copies.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from abliterate.errors import AbliterateError, InputError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _UINT32 = 8, 9, 4
# {type of a value: its format for `struct`}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DIMENSIONS = 4  # llama.cpp reads no tensor with more
_NESTING = 4
_PIECE = 2 << 20  # bytes copied at a time
# Bytes that are read into memory, at most: of a key or the name of a tensor, of a text of the metadata (chat templates are the
# longest), and of all metadata and tensor names together. The largest vocabularies take about 16 MiB (docs/decisions.md).
_NAME, _TEXT, _HEADER = 64 << 10, 16 << 20, 256 << 20
ALIGNMENT = "general.alignment"

# Bytes of a tensor, in pieces.
Pieces = Callable[[], Iterable[bytes]]


class _Damage(Exception):
    """The reason why a file isn't a sound GGUF file."""


@dataclass(frozen=True)
class Field:
    """An entry of the metadata. `raw` are its bytes with key and type; `value` is None for an array."""

    key: str
    raw: bytes
    value: Any = None


@dataclass(frozen=True)
class GgufTensor:
    """A tensor; `shape` ends with a row's length, `type` is ggml's number, and `start` is in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. Metadata and tensors are in the file's order."""

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, Field]
    tensors: Mapping[str, GgufTensor]

    def value(self, key: str) -> Any:
        """The value of an entry of the metadata; None if there is none, or if it is an array."""
        field = self.fields.get(key)
        return None if field is None else field.value

    def read(self, tensor: GgufTensor, start: int, count: int) -> bytes:
        """`count` bytes of a tensor from its byte `start` on. AbliterateError: the file can't be read, or is shorter now."""
        with self._opened() as file:
            file.seek(tensor.start + start)
            data = file.read(count)
        if len(data) < count:
            raise _shorter()
        return data

    def pieces(self, tensor: GgufTensor) -> Iterator[bytes]:
        """All bytes of a tensor. AbliterateError: the file can't be read, or is shorter now."""
        with self._opened() as file:
            file.seek(tensor.start)
            left = tensor.nbytes
            while left > 0:
                data = file.read(min(left, _PIECE))
                if not data:
                    raise _shorter()
                yield data
                left -= len(data)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """The file. Errors of the disk become sentences here, where they can't be taken for errors of a file being written."""
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise AbliterateError(
                f"The GGUF file {self.path.name} can't be read any more ({error.strerror or error}); check the file and its "
                "disk, and repeat the command."
            ) from error


def read_gguf(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufFile:
    """The header of a GGUF file. `sizes`: {ggml's number of a type: (entries of a block, bytes of a block)}.

    Raises:
        InputError: there is no such file, or it isn't a sound GGUF file of a version that is read.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size, sizes)
    except OSError as error:
        raise InputError(f"The GGUF file {path} can't be read: {error.strerror or error}; name another with --gguf.") from error
    except _Damage as reason:
        raise InputError(f"The file {path} can't be read as GGUF: {reason}; fetch it again, or name another.") from reason


def string_field(key: str, value: str) -> Field:
    """An entry with a text."""
    return Field(key, _packed(key) + struct.pack("<I", _STRING) + _packed(value), value)


def number_field(key: str, value: int) -> Field:
    """An entry with a number, as uint32."""
    return Field(key, _packed(key) + struct.pack("<II", _UINT32, value), value)


def size_of(base: GgufFile, fields: Mapping[str, Field], tensors: Iterable[GgufTensor]) -> int:
    """The bytes of the file that `write_gguf` would write."""
    header, ends = _header(base, fields, list(tensors))
    return len(header) + ends


def write_gguf(
    path: Path, base: GgufFile, fields: Mapping[str, Field], tensors: Mapping[str, GgufTensor], edited: Mapping[str, Pieces]
) -> None:
    """Write a file with these entries and tensors. The bytes of tensors that aren't in `edited` are those of `base`.

    The file must not exist. `tensors` have the names and the order of the base's; their `start` isn't used.
    """
    header, _ = _header(base, fields, list(tensors.values()))
    with path.open("xb") as file:
        file.write(header)
        for name, tensor in tensors.items():
            written = 0
            for data in edited[name]() if name in edited else base.pieces(base.tensors[name]):
                written += file.write(data)
            assert written == tensor.nbytes, name
            file.write(bytes(_padding(written, base.alignment)))
        file.flush()
        os.fsync(file.fileno())  # after a crash, a file with its final name counts as finished


def _header(base: GgufFile, fields: Mapping[str, Field], tensors: list[GgufTensor]) -> tuple[bytes, int]:
    """Everything before the first tensor's bytes, and the number of bytes that follow."""
    parts = [_MAGIC, struct.pack("<IQQ", base.version, len(tensors), len(fields)), *(field.raw for field in fields.values())]
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts.append(_packed(tensor.name) + dimensions + struct.pack("<IQ", tensor.type, offset))
        offset += tensor.nbytes + _padding(tensor.nbytes, base.alignment)
    header = b"".join(parts)
    return header + bytes(_padding(len(header), base.alignment)), offset


def _packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _padding(size: int, alignment: int) -> int:
    return -size % alignment


def _shorter() -> AbliterateError:
    return AbliterateError("The GGUF file became shorter while it was read; put it back and repeat the command.")


def _read(path: Path, file: BinaryIO, size: int, sizes: Mapping[int, tuple[int, int]]) -> GgufFile:
    cursor = _Cursor(file, size)
    if cursor.take(4) != _MAGIC:
        raise _Damage("it doesn't begin as such a file does")
    version = cursor.number("I")
    if version not in _VERSIONS:  # of the other byte order, it is a huge number
        raise _Damage(f"its version is {version}, and only versions {_VERSIONS[0]} and {_VERSIONS[1]} are read")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    fields: dict[str, Field] = {}
    for _ in range(n_fields):
        field = _field(cursor)
        if field.key in fields:
            raise _Damage(f"it has {field.key} twice")
        fields[field.key] = field
    alignment = fields[ALIGNMENT].value if ALIGNMENT in fields else 32
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise _Damage(f"its {ALIGNMENT} isn't a power of two")
    tensors: dict[str, GgufTensor] = {}
    for _ in range(n_tensors):
        tensor = _tensor(cursor, sizes)
        if tensor.name in tensors:
            raise _Damage(f"it has the tensor {tensor.name} twice")
        tensors[tensor.name] = tensor
    begin = cursor.position + _padding(cursor.position, alignment)
    tensors = {name: replace(tensor, start=begin + tensor.start) for name, tensor in tensors.items()}
    _check_places(tensors, size)
    return GgufFile(path, version, alignment, fields, tensors)


def _field(cursor: _Cursor) -> Field:
    start = cursor.position
    key, kind = cursor.text(_NAME), cursor.number("I")
    value = _value(cursor, kind, 0)
    return Field(key, cursor.again(start), value)


def _value(cursor: _Cursor, kind: int, depth: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text(_TEXT)
    if kind != _ARRAY or depth == _NESTING:
        raise _Damage(f"its metadata have a value of the unknown type {kind}")
    items, count = cursor.number("I"), cursor.number("Q")
    if items in _SCALARS:
        cursor.skip(count * struct.calcsize(_SCALARS[items]))
    elif items == _STRING:
        for _ in range(count):
            cursor.skip(cursor.number("Q"))
    else:
        for _ in range(count):
            _value(cursor, items, depth + 1)
    return None


def _tensor(cursor: _Cursor, sizes: Mapping[int, tuple[int, int]]) -> GgufTensor:
    """A tensor whose `start` is still in bytes from the first tensor on."""
    name, n_dimensions = cursor.text(_NAME), cursor.number("I")
    if not 1 <= n_dimensions <= _DIMENSIONS:
        raise _Damage(f"its tensor {name} has {n_dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(n_dimensions)]))
    kind, start = cursor.number("I"), cursor.number("Q")
    if kind not in sizes:
        raise _Damage(f"its tensor {name} has the type {kind}, which the installed package gguf doesn't know")
    entries, nbytes = sizes[kind]
    if shape[-1] % entries:
        raise _Damage(f"its tensor {name} has rows of {shape[-1]} entries in blocks of {entries}")
    return GgufTensor(name, shape, kind, start, prod(shape) // entries * nbytes)


def _check_places(tensors: Mapping[str, GgufTensor], size: int) -> None:
    """Every tensor lies in the file, and no two share bytes."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise _Damage(f"its tensor {tensor.name} shares bytes with another")
        end = tensor.start + tensor.nbytes
        if end > size:
            raise _Damage(f"it ends within the tensor {tensor.name}")


class _Cursor:
    """Reads a file's header from its start, never beyond the file's end, and only so far as a header may reach."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self.position = file, size, 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self._expect(count)
        data = self._file.read(count)
        self.position += len(data)
        if len(data) < count:
            raise _Damage("it became shorter while it was read")
        return data

    def skip(self, count: int) -> None:
        """Go on without reading."""
        self._expect(count)
        self.position += count
        self._file.seek(self.position)

    def again(self, start: int) -> bytes:
        """The bytes from `start` up to the position."""
        count = self.position - start
        self._file.seek(start)
        self.position = start
        return self.take(count)

    def number(self, form: str) -> Any:
        """The next number, in a format of `struct`."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self, limit: int) -> str:
        """The next text, after its length, which may be `limit` bytes."""
        count = self.number("Q")
        self._expect(count)
        if count > limit:
            raise _Damage(f"it has a name or text of {count} bytes, and at most {limit} are read")
        data = self.take(count)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise _Damage("it has a text that isn't UTF-8") from error

    def _expect(self, count: int) -> None:
        if count > self._size - self.position:
            raise _Damage("it ends within its header")
        if self.position + count > _HEADER:
            raise _Damage(f"its header is longer than {_HEADER >> 20} MiB")
