"""Standard streams: UTF-8 in pipes whatever the system says, and output that outlives its reader."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from abliterate.terminal import streams
from abliterate.terminal.json_lines import JsonReporter
from abliterate.terminal.reporters import PlainReporter


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[TextIO, int]]]:
    """Make `sys.stdout` or `sys.stderr` the writing end of a pipe, and return it, prepared, with the reading end."""
    ends: list[int] = []

    def make(name: str = "stdout", encoding: str = "latin-1") -> tuple[TextIO, int]:
        reading, writing = os.pipe()
        ends.extend((reading, writing))
        monkeypatch.setattr(sys, name, open(writing, "w", encoding=encoding, closefd=False))  # noqa: SIM115
        streams.prepare()
        return getattr(sys, name), reading

    yield make
    for name in ("stdout", "stderr"):
        getattr(sys, name).flush()
    for end in ends:
        with contextlib.suppress(OSError):  # the test closed it
            os.close(end)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp437", "ascii", "utf-8"])
def test_output_is_utf8(encoding: str, piped: Callable[..., tuple[TextIO, int]]) -> None:
    out, reading = piped(encoding=encoding)
    print("★ ≥ ü 😀 \udce9", file=out, flush=True)
    assert os.read(reading, 100).decode("utf-8") == "★ ≥ ü 😀 ?\n"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "cp437", "ascii", "utf-8"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_input_is_utf8(encoding: str, mark: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mark + "Grüße 😀\n".encode() + b"\xff\n"), encoding))
    streams.prepare()
    streams.prepare()
    assert sys.stdin.readline() == "Grüße 😀\n"
    streams.prepare()  # after the first read the encoding can't change any more
    assert sys.stdin.readline() == "\ufffd\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_who_goes(name: str, piped: Callable[..., tuple[TextIO, int]], capsys: pytest.CaptureFixture[str]) -> None:
    out, reading = piped(name)
    print("heard", file=out, flush=True)
    os.close(reading)
    for _ in range(3):
        print("unheard" * 10_000, file=out, flush=True)
    assert "Traceback" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("kind", [PlainReporter, JsonReporter])
def test_a_long_command_says_once_that_nobody_reads(
    kind: Callable[[TextIO], PlainReporter | JsonReporter],
    piped: Callable[..., tuple[TextIO, int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, reading = piped()
    reporter = kind(out)
    reporter.note("heard")
    assert capsys.readouterr().err == ""
    os.close(reading)
    for stage in ("residuals", "search", "export"):
        reporter.stage(stage)
    assert capsys.readouterr().err == f"{streams.UNREAD}\n"


def test_other_faults_of_the_output_are_errors(piped: Callable[..., tuple[TextIO, int]]) -> None:
    out, _ = piped()
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, out.fileno())
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        print("x", file=out, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    out.flush()


def test_closed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    streams.prepare()
    print("to nobody", flush=True)
    assert sys.stdin.read() == ""
    assert not sys.stdout.isatty()
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


def test_without_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONUNBUFFERED makes the text layer write to the file itself."""
    reading, writing = os.pipe()
    raw = open(writing, "wb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1", write_through=True))  # type: ignore[type-var]
    streams.prepare()
    print("ü", end="")
    assert os.read(reading, 9) == "ü".encode()
    os.close(reading)
    print("unheard")
