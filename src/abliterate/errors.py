"""The errors that a user may see: each is one sentence with the cause and the remedy, and has an exit code.

The command line prints that sentence and exits with that code.
"""

from __future__ import annotations

import errno
import shlex

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
# The disk errors that more free space would solve.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_remedy(error: OSError) -> str:
    """What a person can do about a disk that refuses, as the middle of a sentence."""
    if error.errno in NO_ROOM:
        return "free some space"
    if error.errno == errno.EROFS:
        return "make the disk writable"
    return "get permission to write there" if error.errno in (errno.EACCES, errno.EPERM) else "fix the cause"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def as_command(*words: object) -> str:
    """An `abliterate` command for a sentence, quoted so that it can be pasted into a shell."""
    return shlex.join(["abliterate", *map(str, words)])


def install_extra(name: str) -> str:
    """How an extra is installed. The package is on no index yet, and somebody else may take its name there."""
    return f"pip install '.[{name}]' in your clone of abliterate"


class AbliterateError(Exception):
    """The work could not be finished (exit code 1). `str(error)` is one sentence with the remedy."""

    exit_code = FAILED


class InputError(AbliterateError):
    """The usage or the input is wrong (exit code 2)."""

    exit_code = BAD_INPUT


class TrialError(AbliterateError):
    """One trial could not be evaluated; the study records it as failed and continues. `str(error)` is the reason."""


class ScorerUnavailable(TrialError):
    """A scorer's server or model can't be had, whatever the trial: a search ends there, and repeats it when continued."""


class Interrupted(AbliterateError):
    """Ctrl+C or SIGTERM stopped the work at a safe point; all finished work is on disk."""

    def __init__(self, exit_code: int = INTERRUPTED, message: str = "interrupted; finished trials are kept") -> None:
        super().__init__(message)
        self.exit_code = exit_code

    @staticmethod
    def by(error: KeyboardInterrupt, message: str) -> Interrupted:
        """The interruption by a second signal, with the exit code of the first one, which `Interrupts` puts into the error."""
        return Interrupted(error.args[0] if error.args else INTERRUPTED, message)
