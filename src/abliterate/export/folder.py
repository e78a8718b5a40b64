"""The folder of an export: only a finished export carries the final name, and a killed one is continued or removed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from abliterate._version import __version__
from abliterate.errors import AbliterateError, InputError, disk_remedy
from abliterate.files import expanded, write_json

try:
    import fcntl
except ImportError:  # Windows: an export does not continue what a killed one left
    fcntl = None  # type: ignore[assignment]

# Every finished export holds this file. A later export may replace a folder that holds it; any other folder is a stranger's.
MARKER = "abliterate.json"

# An unfinished folder holds this file. The process that has locked it writes there.
LOCK = ".exporting"

# How the names of finished files with weights end, which a continued export keeps.
SHARDS = ".safetensors"

# What file managers leave in any folder.
_LEFT_ANYWHERE = {".DS_Store", "Thumbs.db", "desktop.ini"}

_MARK = {"format": 1, "abliterate": __version__}


def record_of(final: Path) -> dict[str, Any]:
    """The record that an export has in its folder; empty if there is none that can be read."""
    try:
        found = json.loads((final / MARKER).read_text(encoding="utf-8"))["export"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def leave_record(final: Path, record: Mapping[str, Any]) -> None:
    """Copy the record of an export from `result.json` into the export, which keeps it wherever the run goes."""
    own = _own_files(final)
    files = {} if own is None else {"files": own}
    write_json(final / MARKER, {**_MARK, **files, "trial": record["trial"], "export": record})


def check_output(final: Path, source: str = "") -> None:
    """InputError if an export to `final` would replace anything but an earlier export; changes nothing.

    `source`, the path or id of the model that the export is made from, may be an export itself, but not this one.
    """
    if source and os.path.isdir(expanded(source)):
        model = expanded(source).resolve()
        if final.resolve() in (model, *model.parents):
            raise InputError(f"The folder {final} holds the model that the export is made from; choose another --out.")
    if final.is_symlink():  # in a stranger's run it may lead to an export of one's own, which would be replaced
        raise InputError(f"The path {final} is a link; choose another --out, or name the folder that it leads to.")
    if os.path.ismount(final):  # no folder can take its name, and what is written beside it is on another disk
        raise InputError(
            f"The folder {final} is the top of a file system; choose a folder in it, such as --out {final / 'model'}."
        )
    if not final.exists() or (final / MARKER).is_file() or (final.is_dir() and not any(final.iterdir())):
        return
    raise InputError(
        f"The path {final} exists and is no export of abliterate, so it is not replaced; choose another --out, or move it away."
    )


@contextlib.contextmanager
def finished_folder(final: Path, key: str = "", warn: Callable[[str], None] = lambda text: None) -> Iterator[Path]:
    """A folder beside `final` that takes its name on success and vanishes on failure; an old export stays until then.

    An old export with files that no export wrote, such as a conversion that somebody put there, is kept under another name, and
    `warn` is told.

    After a kill the hidden folder stays, and the next export to `final` gets it. Its finished files stay, too, if that export
    has the same `key`, which stands for the export's content.

    Raises:
        InputError: `final` exists and is no export. AbliterateError: the disk is full or refuses to write.
    """
    check_output(final)
    final = final.resolve()  # "." and ".." have no name, so nothing can lie beside them
    try:
        with _claimed(final, key) as partial:
            yield partial
            written = sorted({*_files(partial), MARKER} - {LOCK})
            (partial / MARKER).write_text(json.dumps({**_MARK, "files": written}) + "\n", encoding="utf-8")
            _follow_umask(partial)
            kept = _rename(partial, final)
            if kept is not None:
                old, why = kept
                warn(f"{why}, so its folder is kept as {old.name}; remove it once you need nothing in it.")
            # After the rename: a kill in between leaves a finished export with a lock file in it, which does no harm. The other
            # way round it left a hidden folder that no export would take.
            with contextlib.suppress(OSError):
                (final / LOCK).unlink(missing_ok=True)
    except OSError as error:
        raise AbliterateError(disk_sentence(final, error)) from error
    except BaseException as error:
        # safetensors reports a full disk as its own kind of error, with the operating system's text in it.
        if "No space left" in str(error) or "os error 28" in str(error):
            raise AbliterateError(disk_sentence(final, OSError(errno.ENOSPC, "No space left on device"))) from error
        raise


@contextlib.contextmanager
def _claimed(final: Path, key: str) -> Iterator[Path]:
    """A locked, hidden folder beside `final`: empty, or with the finished weights of a killed export of the same `key`."""
    partial = final.with_name(f".{final.name}.partial")
    if fcntl is not None and _is_ours(partial):
        partial.mkdir(parents=True, exist_ok=True)
        with open(partial / LOCK, "a+", encoding="utf-8", opener=_no_link) as lock:
            if _locked(lock):
                lock.seek(0)
                if lock.read() != key:
                    empty(partial)
                    lock.truncate(0)
                    lock.write(key)
                    lock.flush()
                else:  # other files cost nothing to make again, and the base may no longer have them
                    empty(partial, keep=SHARDS)
                with _vanishing(partial):  # under the lock, because another export may be waiting for the name
                    yield partial
                return
    # Otherwise a new name: a stranger's folder is never written to or removed.
    partial = final.with_name(f".{final.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    with _vanishing(partial):
        yield partial


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _is_ours(partial: Path) -> bool:
    """Whether an export may take the hidden folder: it doesn't exist, is empty, or an export left it; never if it is a link."""
    if partial.is_symlink() or not partial.is_dir():
        return not os.path.lexists(partial)
    if (partial / LOCK).is_symlink():
        return False
    return (partial / LOCK).is_file() or (partial / MARKER).is_file() or not any(partial.iterdir())


@contextlib.contextmanager
def _vanishing(partial: Path) -> Iterator[None]:
    """Remove the folder on failure, its lock last; not, however, if it has its final name and another folder has this name."""
    original = os.stat(partial)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.samestat(original, os.stat(partial)):
                empty(partial)
                (partial / LOCK).unlink(missing_ok=True)
                partial.rmdir()
        raise


def _locked(file: IO[str]) -> bool:
    """Take the lock; False if another process has it or the file has lost its name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except OSError:  # another export is at work there or has just finished, or the file system has no locks
        return False


def empty(partial: Path, keep: str = "") -> None:
    """Remove everything from an unfinished folder except its lock, and files whose names end with `keep`."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK and (path.is_symlink() or not (keep and path.name.endswith(keep))):
            path.unlink()


def _follow_umask(partial: Path) -> None:
    """Give every file the mode of a new file; safetensors writes under temporary names, which only their owner can read."""
    mode = (partial / MARKER).stat().st_mode & 0o777
    for path in partial.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


def _files(folder: Path) -> list[str]:
    """The names of the files in a folder and its folders, and of links."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _own_files(export: Path) -> list[str] | None:
    """The files that an export consists of, by its own record; None if there is none, as in earlier versions."""
    try:
        found = json.loads((export / MARKER).read_text(encoding="utf-8"))["files"]
        return [str(name) for name in found]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _rename(partial: Path, final: Path) -> tuple[Path, str] | None:
    """Give `partial` the name `final`; an old export is removed only once the new one has its name.

    Returns the name under which an old export is kept because it has files that no export wrote, and the sentence's beginning.
    """
    check_output(final)  # again, because time has passed since the first check
    if not final.exists():
        partial.rename(final)
        return None
    # Not a hidden name: after a kill between the two renames this is the last whole export, and a person must find it.
    old = final.with_name(f"{final.name}.old-{uuid.uuid4().hex[:8]}")
    final.rename(old)
    try:
        partial.rename(final)
    except BaseException:
        if not final.exists():
            old.rename(final)
        raise
    found, own = {*_files(old)} - _LEFT_ANYWHERE, _own_files(old)
    if found and own is None:
        return old, f"It isn't recorded which files of the earlier export in {final.name} abliterate wrote"
    if found - {*(own or ()), LOCK}:
        return old, f"The earlier export in {final.name} has files that abliterate didn't write"
    shutil.rmtree(old, ignore_errors=True)
    return None


def disk_sentence(final: Path, error: OSError) -> str:
    """The sentence for a disk that refuses to take an export."""
    return (
        f"The export to {final.name} could not be written ({error.strerror or error}); nothing half-written is left there: "
        f"{disk_remedy(error)} and repeat the command (a run continues with --resume), or choose another --out."
    )
