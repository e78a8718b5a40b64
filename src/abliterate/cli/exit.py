"""How a command ends: every error becomes one sentence and an exit code, and with `--json` a last line on standard output.

Imports nothing heavy at the top, and nothing that could itself fail where no memory is left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

from abliterate import ranks
from abliterate.errors import BAD_INPUT, FAILED, INTERRUPTED, AbliterateError, Interrupted
from abliterate.terminal import json_lines
from abliterate.terminal.interrupts import Interrupts
from abliterate.types import Reporter

# Not every command is a run, so these sentences must be true of every command.
_KEPT = "a run keeps its finished trials and continues with --resume"


def run_to_its_end(command: Callable[[], object]) -> None:
    """Run `command`; any error in it ends the process with a sentence and an exit code."""
    try:
        command()
    except SystemExit as ended:  # raised by Typer for help, for usage errors (which it has shown itself) and for Ctrl+C
        if ended.code == INTERRUPTED:
            _fail(f"interrupted; {_KEPT}.", INTERRUPTED)
        if ended.code:
            format_message = getattr(ended.__context__, "format_message", None)
            _emit_json_error(format_message() if format_message else "bad usage; standard error says more.", BAD_INPUT)
        raise
    except KeyboardInterrupt as error:
        _fail(f"interrupted; {_KEPT}.", Interrupted.by(error, "").exit_code)
    except Exception as error:
        if not isinstance(error, Interrupted):
            show_traceback()
        _fail(*explain(error))


def explain(error: Exception) -> tuple[str, int]:
    """The sentence that describes an error to a person, and the exit code."""
    if isinstance(error, AbliterateError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}; fix that and repeat the command: {_KEPT}.", FAILED
    reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    if _is_out_of_memory(error):
        reason = reason or "out of memory"
        return f"there is too little memory ({reason}); free some and repeat the command: {_KEPT}.", FAILED
    return f"unexpected {type(error).__name__}: {reason}; run with abliterate --debug … and report it.", FAILED


def show_traceback() -> None:
    """Print the traceback of the error being handled, if --debug was given."""
    if os.environ.get("ABLITERATE_DEBUG"):
        import traceback

        traceback.print_exc()


def _is_out_of_memory(error: Exception) -> bool:
    # Torch is heavy to load, and the error isn't torch's unless torch is loaded already.
    if isinstance(error, MemoryError) or "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from abliterate.model.memory import is_out_of_memory

    return is_out_of_memory(error)


def _fail(message: str, exit_code: int) -> NoReturn:
    if ranks.is_silent():
        sys.exit(exit_code)
    try:
        from abliterate.terminal.reporters import show_error

        show_error(message)
    except MemoryError:  # not even Rich can be loaded then
        sys.stderr.write(f"error: {message}\n")
    _emit_json_error(message, exit_code)
    sys.exit(exit_code)


def _emit_json_error(message: str, exit_code: int) -> None:
    # Read from the raw arguments, because options that can't be parsed are an error, too.
    if "--json" in sys.argv[1:] and not ranks.is_silent():
        with contextlib.suppress(OSError, MemoryError):  # the error may be that of standard output
            json_lines.emit("error", message=message, exit_code=exit_code)


@contextlib.contextmanager
def ending_at_once(reporter: Reporter, message: str | Callable[[], str], *, as_json: bool = False) -> Iterator[None]:
    """End the `with` block with `message` at the first Ctrl+C or SIGTERM, because there is nothing to finish first.

    With --json, the block's standard output is for the reporter's lines alone.
    """

    def said() -> str:
        return message if isinstance(message, str) else message()

    interrupts = Interrupts()
    try:
        with interrupts.listening(), interrupts.at_once(), for_lines_alone(as_json=as_json):
            yield
    except Interrupted as error:
        raise Interrupted(error.exit_code, said()) from error
    except KeyboardInterrupt as error:
        raise Interrupted.by(error, said()) from error
    finally:
        reporter.close()


@contextlib.contextmanager
def for_lines_alone(*, as_json: bool) -> Iterator[None]:
    """With --json, send to standard error what a plugin or a model's own code prints; the reporter has its own stream."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and advice, which would tear our output; their errors are still raised.

    Their notices of future changes are for us, not for whoever runs the command; `python -W` or --debug shows them.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions and not os.environ.get("ABLITERATE_DEBUG"):
        warnings.filterwarnings("ignore", category=FutureWarning)
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        import datasets

        datasets.disable_progress_bars()
    except ImportError:
        pass
