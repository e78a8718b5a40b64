"""Every error a person may see: one sentence with the cause and the remedy, and an exit code.

Knows nothing of how errors are shown; `cli/app.py` turns them into a line and an exit code.
"""

import errno

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
# Of the errors of a disk, those that more room on it would mend.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class AbliterateError(Exception):
    """A run that could not be finished (exit code 1). `str(error)` is one sentence with the remedy."""

    exit_code = FAILED


class InputError(AbliterateError):
    """Bad usage or bad input (exit code 2)."""

    exit_code = BAD_INPUT


class TrialError(AbliterateError):
    """One trial could not be evaluated; the study records it as failed and goes on. `str(error)` is the reason."""


class Interrupted(AbliterateError):
    """Ctrl+C or SIGTERM was seen at a safe point; all finished work is on disk."""

    def __init__(self, exit_code: int = INTERRUPTED, message: str = "interrupted; finished trials are kept") -> None:
        super().__init__(message)
        self.exit_code = exit_code
