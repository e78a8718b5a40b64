"""`abliterate chat`: its options, and how a conversation is set up."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abliterate.artifacts.cache import default_root
from abliterate.chat.display import make_face
from abliterate.chat.generate import Sampling
from abliterate.chat.input import Lines, PipedLines, TypedLines, at_terminal
from abliterate.chat.open import ChatTarget, open_session
from abliterate.chat.shell import COMMAND_NAMES, Shell
from abliterate.cli import exit
from abliterate.errors import InputError, Interrupted
from abliterate.settings.sources import load_settings, options_of
from abliterate.terminal import json_lines
from abliterate.terminal.interrupts import Interrupts
from abliterate.terminal.reporters import PlainReporter, make_reporter
from abliterate.types import LARGEST_COUNT, Reporter


@dataclass(frozen=True)
class ChatOptions:
    """The options of `abliterate chat` that aren't settings."""

    trial: int | None = None
    max_new_tokens: int = 0
    temperature: float | None = None
    seed: int | None = None
    response_prefix: str = ""

    def check(self) -> None:
        """InputError for an invalid value."""
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"The option --temperature needs a number from 0 upwards, not {self.temperature}.")
        if (self.seed or 0) > LARGEST_COUNT:
            raise InputError(f"The option --seed needs a number up to {LARGEST_COUNT}, not {self.seed}.")


def chat(target: str, options: ChatOptions, given: Mapping[str, Any], assignments: list[str], *, as_json: bool) -> None:
    """`abliterate chat TARGET`: open the session, run the shell, and in a pipe raise the first error of a line."""
    options.check()
    settings = options_of(given, assignments)
    exit.quiet_libraries()
    interactive = at_terminal() and not as_json
    reporter: Reporter = make_reporter(as_json=as_json) if as_json or interactive else PlainReporter(sys.stderr)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.seed)
    wanted = ChatTarget(options.trial, options.response_prefix, sampling)
    interrupts = Interrupts()
    try:
        with interrupts.listening(), interrupts.at_once(), exit.for_lines_alone(as_json=as_json):
            session, fields = open_session(target, wanted, settings, reporter)
            reporter.header(fields)
    except KeyboardInterrupt as error:
        raise Interrupted(message="interrupted; nothing was changed.") from error
    except Interrupted as error:
        raise Interrupted(error.exit_code, "interrupted; nothing was changed.") from error
    finally:
        reporter.close()
    lines: Lines = PipedLines(sys.stdin)
    if interactive:
        where = settings.get("cache_dir") or load_settings().cache_dir
        lines = TypedLines(default_root(where) / "chat-history", COMMAND_NAMES)
    face = make_face(as_json=as_json, interactive=interactive)
    if interactive:
        face.note("/help shows the commands")
    shell = Shell(session, face, lines)
    with exit.for_lines_alone(as_json=as_json):
        shell.run()
    if as_json and not shell.failed:
        json_lines.emit("result", conversation=session.record())
    shell.check()
