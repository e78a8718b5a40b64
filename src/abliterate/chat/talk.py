"""Talk to a trial of a run that is at work in this process, on its loaded model, before one of its trials is exported."""

from __future__ import annotations

import signal

from abliterate.artifacts.cache import default_root
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.display import Display, make_face
from abliterate.chat.input import TypedLines, handling
from abliterate.chat.open import ChatTarget, session_on
from abliterate.chat.shell import COMMAND_NAMES, Shell
from abliterate.errors import INTERRUPTED, AbliterateError, Interrupted
from abliterate.pipeline.workbench import Workbench
from abliterate.types import Trial


def talk(bench: Workbench, directory: RunDirectory, trial: Trial) -> None:
    """A chat at the terminal, as `abliterate chat` has it; the model carries no edit afterwards.

    However the chat ends, the question comes again, since hours of trials wait for its answer. Only SIGTERM ends the run.
    """
    face = make_face(as_json=False, interactive=True)
    # Within the chat Ctrl+C ends an answer, a line or the chat, and not the run.
    with handling({signal.SIGINT: signal.default_int_handler}):
        try:
            _talk(bench, directory, trial, face)
        except KeyboardInterrupt:
            return
        except Interrupted as ended:  # by two Ctrl+C, or by SIGTERM
            if ended.exit_code != INTERRUPTED:
                raise
        except AbliterateError as error:
            face.problem(str(error))


def _talk(bench: Workbench, directory: RunDirectory, trial: Trial, face: Display) -> None:
    session, fields = session_on(bench, directory, trial, ChatTarget())
    face.note(f"trial {fields['trial']}")
    face.note("/help shows the commands, /quit goes back to the question")
    lines = TypedLines(default_root(bench.settings.cache_dir) / "chat-history", COMMAND_NAMES)
    Shell(session, face, lines).run()
