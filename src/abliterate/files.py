"""Files that survive a crash: atomic writes, lock files, hashes of JSON, and names that are safe on every system.

The kernel releases a lock when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import tomllib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from abliterate.errors import AbliterateError, InputError, disk_remedy

try:
    import fcntl
except ImportError:  # on Windows, locks keep nobody out
    fcntl = None  # type: ignore[assignment]

# Half of a surrogate pair is no character. Python has one for each byte of the command line, the environment or a file name
# that isn't UTF-8.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
# Seconds to wait before each further try to take a lock: `is_locked` holds it for an instant in every process that polls it.
_PAUSES = (0.02, 0.03)
IS_WINDOWS = os.name == "nt"
# Seconds to wait before each further try to replace a file that another process reads.
_READERS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def take_lock(path: Path) -> IO[bytes]:
    """Create, open and lock the lock file; release it with `drop_lock`. On a file system without locks it is only opened.

    Raises:
        BlockingIOError: another process holds the lock, and for longer than `is_locked` does. OSError: the file can't be
            created.
    """
    for pause in _PAUSES:
        try:
            return _try_lock(path)
        except BlockingIOError:
            time.sleep(pause)
    return _try_lock(path)


def _try_lock(path: Path) -> IO[bytes]:
    while True:
        file = path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
            file.close()  # its holder has just removed it, so another file has the name now
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file


def drop_lock(file: IO[bytes], path: Path) -> None:
    """Remove the file and release the lock."""
    if fcntl is None:  # Windows can't remove an open file; elsewhere another process could take it before it is removed
        file.close()
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    file.close()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file. Where a file system has no locks, its existence counts."""
    try:
        with path.open("rb") as file:
            if fcntl is not None:
                # Shared and given back at once, so that it keeps nobody out for longer than this call.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        pass
    return path.exists()


# The checksum of everything else in a JSON file; a file written by hand has none.
DIGEST = "sha256"
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def safe_name(text: str) -> str:
    """A file name made from the last part of a model id or path: letters, digits, dots, dashes and underscores."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/\\]", text.rstrip("/\\"))[-1]).strip(".-")[:80].strip(".-")
    # Windows opens a device by a reserved name, whatever ending follows.
    return f"model-{name}" if _RESERVED.match(name) else name or "model"


def expanded(path: str | Path) -> Path:
    """A path as a person gives it, with `~` replaced. The shell leaves a `~` behind `=`, and TOML has no shell.

    Raises:
        InputError: this machine doesn't know the home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"The path {path} has no home directory on this machine; write the path in full.") from error


def check_new_file(path: Path) -> None:
    """InputError if anything has a name that is to become a new file's, be it a link to nowhere."""
    if os.path.lexists(path):  # False for a name that is too long
        raise InputError(f"The file {path} exists and is not replaced; choose another --out, or move it away.")


def split_existing(text: str) -> tuple[Path | None, str]:
    """The path in `path:column` or `path:split:column`, and the text behind its colon; (None, text) if nothing is there.

    Of several paths that exist the longest is meant, since names may hold colons.
    """
    ends = [index for index, character in enumerate(text) if character == ":"]
    for end in reversed(ends):
        if text[:end] and os.path.exists(path := expanded(text[:end])):  # False for a name that is too long
            return path, text[end + 1 :]
    return None, text


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name and rename, so that a reader sees the old content or the new content.

    Raises:
        AbliterateError: the disk refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    # A new file of a name that nobody can guess: in a stranger's folder a link of that name could lead to any file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only disk refuses this, too
            temporary.unlink(missing_ok=True)
        raise AbliterateError(
            f"The file {path} can't be written: {error.strerror}; {disk_remedy(error)} and repeat the command (a run continues "
            "with --resume)."
        ) from error


def _replace(temporary: Path, path: Path) -> None:
    """Give the file its name; Windows refuses while another process has the old file open, which is read in an instant."""
    for pause in _READERS if IS_WINDOWS else ():
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(pause)
    temporary.replace(path)


def digest_of(record: Mapping[str, Any]) -> str:
    """A hash of a JSON file's content that doesn't depend on its order and layout."""
    content = json.loads(json.dumps({name: value for name, value in record.items() if name != DIGEST}))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """`record` as strict JSON (no NaN), atomically."""
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file. InputError: it can't be read, or doesn't parse (the sentence gives the position)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"The configuration file {path} can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The configuration file {path} is not valid TOML: {error}.") from error
