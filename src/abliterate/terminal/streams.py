"""Make the three standard streams fit for pipes: they are UTF-8 whatever the system's encoding, and output outlives its reader.

When a reader has gone (`| head`, q in `less`, a closed terminal), every command goes on to its end and its output goes nowhere.
As light at import as `cli`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any, Literal, TextIO

UNREAD = "note: nobody reads the output any more; the command goes on without it (Ctrl+C ends it)."


def prepare() -> None:
    """Set up the standard streams of this process; a second call changes nothing."""
    # A closed stream is None in Python, and the next file that is opened would get its descriptor.
    sys.stdin = _readable(sys.stdin or _nowhere("r"))
    sys.stdout = _lasting(_writable(sys.stdout or _nowhere("w")))
    sys.stderr = _lasting(_writable(sys.stderr or _nowhere("w")))


def say_if_unread(out: TextIO) -> None:
    """Say once on standard error that the reader of `out` has gone, for commands that go on for long."""
    raw = _raw(out)
    if isinstance(raw, _Lasting) and raw.is_lost and not raw.was_said:
        raw.was_said = True
        print(UNREAD, file=sys.stderr, flush=True)


class _Lasting(io.FileIO):
    """The lowest layer of an output stream: once its reader has gone, it writes to nowhere."""

    def __init__(self, replaced: TextIO) -> None:
        super().__init__(replaced.fileno(), "w", closefd=False)
        self._replaced = replaced  # it would close the descriptor when nobody holds it any more
        self._at_terminal = replaced.isatty()
        self.is_lost = False
        self.was_said = False

    def write(self, data: Any, /) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            if not self._reader_has_gone(error):
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        self.is_lost = True
        return memoryview(data).nbytes

    def _reader_has_gone(self, error: OSError) -> bool:
        if error.errno == errno.EINVAL:  # Windows says this of a closed pipe
            return os.name == "nt"
        return error.errno == errno.EPIPE or (error.errno == errno.EIO and self._at_terminal)


def _readable(stream: TextIO) -> TextIO:
    # The mark at the start of a file that Windows saved as UTF-8 is no part of its first line.
    return _with_encoding(stream, "utf-8-sig")


def _writable(stream: TextIO) -> TextIO:
    return _with_encoding(stream, "utf-8")


def _with_encoding(stream: TextIO, encoding: str) -> TextIO:
    """The stream in this encoding, but at a terminal in the terminal's own; a character that it lacks becomes a `?`."""
    if isinstance(stream, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # something was read from it already
            stream.reconfigure(encoding=None if stream.isatty() else encoding, errors="replace")
    return stream


def _lasting(stream: TextIO) -> TextIO:
    """The same stream on a layer that outlives its reader; a stream that is no file of the system stays as it is."""
    raw = _raw(stream)
    if not isinstance(stream, io.TextIOWrapper) or type(raw) is not io.FileIO:
        return stream
    stream.flush()
    lasting: Any = _Lasting(stream)
    return io.TextIOWrapper(
        lasting if stream.buffer is raw else io.BufferedWriter(lasting),  # PYTHONUNBUFFERED leaves the layer between out
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: TextIO) -> Any:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _nowhere(mode: Literal["r", "w"]) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8")
