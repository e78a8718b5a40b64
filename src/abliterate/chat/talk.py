"""Talk to a trial of a run that is at work in this process, on its loaded model, before one of its trials is exported."""

from __future__ import annotations

import contextlib
import signal

from abliterate.artifacts.cache import default_root
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.chat.display import make_face
from abliterate.chat.input import TypedLines, handling
from abliterate.chat.open import ChatTarget, session_on
from abliterate.chat.shell import COMMAND_NAMES, Shell
from abliterate.pipeline.workbench import Workbench
from abliterate.types import Trial


def talk(bench: Workbench, directory: RunDirectory, trial: Trial) -> None:
    """A chat at the terminal, as `abliterate chat` has it; the model carries no edit afterwards."""
    session, fields = session_on(bench, directory, trial, ChatTarget())
    face = make_face(as_json=False, interactive=True)
    face.note(f"trial {fields['trial']}")
    face.note("/help shows the commands, /quit goes back to the question")
    lines = TypedLines(default_root(bench.settings.cache_dir) / "chat-history", COMMAND_NAMES)
    # Within the chat Ctrl+C ends an answer or a line, and not the run.
    with handling({signal.SIGINT: signal.default_int_handler}), contextlib.suppress(KeyboardInterrupt):
        Shell(session, face, lines).run()
