"""The chat's loop: each line a person types is a message to the model or a command."""

from __future__ import annotations

import difflib
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from abliterate.chat.display import Display, visible
from abliterate.chat.input import Lines, Presses, handling
from abliterate.chat.session import Answer, Mode, Session, Side
from abliterate.errors import INTERRUPTED, TERMINATED, AbliterateError, InputError, Interrupted
from abliterate.files import expanded, safe_name
from abliterate.objectives import other_scores
from abliterate.report.tables import unanswered_text
from abliterate.types import kl_text

_FORCE = "--force "

_UNSAVED = "interrupted; the conversation wasn't saved (/save does that)."

HELP = {
    "/base": "let the base model answer",
    "/edited": "let the chosen trial answer",
    "/both": "let both answer side by side; each keeps its own answers as its history",
    "/trial [N]": "switch to trial N without loading anything; without N: show the current trial",
    "/trials": "show the trials on the front",
    "/system [TEXT]": 'set the system prompt, "" for none; without TEXT: show it',
    "/retry": "answer the last message again",
    "/undo": "take back the last message and its answers",
    "/reset": "forget the conversation",
    "/save [--force] [FILE]": "save the conversation as Markdown, or as JSON if FILE ends in .json",
    "/help": "show this list",
    "/quit": "end the chat, as Ctrl+D does",
}

_HOW = 'A line that ends in \\ continues, """ starts and ends several lines, and // starts a message that begins with a slash.'

COMMAND_NAMES = tuple(name.split()[0] for name in HELP)


class Shell:
    """Reads lines and carries them out: messages go to the session, commands to their methods here."""

    def __init__(self, session: Session, face: Display, lines: Lines) -> None:
        self._session = session
        self._face = face
        self._lines = lines
        self._hearer = _ReplyListener(face, interactive=lines.interactive)
        self._count = 0
        self.failed: list[AbliterateError] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/base": lambda rest: self._switch("base", rest),
            "/edited": lambda rest: self._switch("edited", rest),
            "/both": lambda rest: self._switch("both", rest),
            "/trial": self._trial,
            "/trials": self._trials,
            "/system": self._system,
            "/retry": self._retry,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Carry out lines until the input ends or /quit is given.

        Raises:
            Interrupted: by SIGTERM, by two Ctrl+C at a terminal, or by one in a pipe.
        """
        was_pressed = False
        with handling({signal.SIGTERM: _terminated}):
            while True:
                try:
                    text = self._lines.read(self._prompt())
                    was_pressed = False
                    if text.split()[:1] == ["/quit"] or not self._line(text):
                        return
                except EOFError:
                    if self._lines.interactive:
                        print()
                    return
                except KeyboardInterrupt:
                    if was_pressed or not self._lines.interactive:
                        raise Interrupted(message=self._interruption()) from None
                    was_pressed = True
                    print()
                    self._face.note("press Ctrl+C once more, or Ctrl+D, to end the chat")

    def check(self) -> None:
        """In a pipe, where nobody may have seen the errors, raise again the first error of a line, with its exit code."""
        if self.failed and not self._lines.interactive:
            first = self.failed[0]
            raise type(first)(
                f"{len(self.failed)} of {self._count} lines could not be carried out; the first: {visible(str(first))}"
            )

    def _line(self, text: str) -> bool:
        """Carry out a line; False if it ends the chat."""
        if not text.strip():
            return True
        self._count += 1
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            else:
                message = text.removeprefix("/") if text.startswith("//") else text
                self._answer(lambda: self._session.ask(message, self._hearer))
        except Interrupted:
            raise
        except AbliterateError as error:
            self.failed.append(error)
            self._face.problem(str(error))
        return True

    def _answer(self, work: Callable[[], None]) -> None:
        """Generate answers; Ctrl+C ends one of them at a terminal, and all of them in a pipe, where nobody could go on."""
        presses = self._hearer.presses
        with presses.listening():
            try:
                work()
            finally:
                self._face.close()
        if presses.signal == signal.SIGTERM:
            raise Interrupted(TERMINATED, self._interruption())
        if presses.signal and not self._lines.interactive:
            raise Interrupted(INTERRUPTED, self._interruption())

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name, [*self._commands, "/quit"], n=1)
            remedy = (
                f"did you mean {near[0]}?" if near else "/help lists all, and // starts a message that begins with a slash."
            )
            raise InputError(f"There is no command {name}; {remedy}")
        command(rest.strip())

    def _prompt(self) -> str:
        trial = "" if self._session.trial is None or self._session.mode == "base" else f" {self._session.trial}"
        return f"{self._session.mode}{trial}> "

    def _switch(self, mode: Mode, rest: str) -> None:
        if rest:
            raise InputError(f"The command /{mode} takes nothing behind it; type the message on a line of its own.")
        self._session.switch(mode)
        self._face.note({"both": "both answer"}.get(mode, f"the {mode} model answers"))

    def _trial(self, rest: str) -> None:
        if not rest:
            trial = self._session.trial
            self._session.result()  # raises an error with the reason if there is no trial
            self._face.note(f"trial {trial}")
            return
        if not rest.isdecimal() or len(rest) > 18:
            raise InputError(f"The command /trial needs the number of a trial, not {rest!r}; /trials shows the front.")
        chosen = self._session.choose(int(rest))
        total = self._session.result().n_harmful
        unanswered = [f"unanswered {text}"] if (text := unanswered_text(chosen, total)) else []
        refusals = f"refusals {chosen.refusals}/{total}"
        scores = ", ".join([*unanswered, refusals, f"KL {kl_text(chosen.kl)}", *other_scores(chosen)])
        self._face.note(f"trial {chosen.number} answers: {scores}")

    def _trials(self, rest: str) -> None:
        self._face.front(self._session.result(), self._session.trial)

    def _system(self, rest: str) -> None:
        if rest:
            note = self._session.set_system("" if rest in ('""', "''") else rest)
            if note:
                self._face.note(note)
        scope = " for the whole conversation" if rest and self._session.turns else ""
        self._face.note(f"system prompt{scope}: {self._session.system or 'none'}")

    def _retry(self, rest: str) -> None:
        self._answer(lambda: self._session.retry(self._hearer))

    def _undo(self, rest: str) -> None:
        message = " ".join(self._session.undo().prompt.split())
        self._face.note(f"taken back: {message if len(message) <= 60 else message[:59] + '…'}")

    def _reset(self, rest: str) -> None:
        self._face.note(f"the conversation of {self._session.reset()} turns is forgotten; the system prompt stays")

    def _save(self, rest: str) -> None:
        overwrite = f"{rest} ".startswith(_FORCE)
        name = rest[len(_FORCE) :].strip() if overwrite else rest
        path = expanded(name) if name else Path(f"chat-{safe_name(self._session.model)}-{_now()}.md")
        self._session.save(path, overwrite=overwrite)
        self._face.note(f"saved in {path}")

    def _help(self, rest: str) -> None:
        width = max(map(len, HELP))
        self._face.note("\n".join([*(f"{name:<{width}}  {meaning}" for name, meaning in HELP.items()), _HOW]))

    def _interruption(self) -> str:
        return _UNSAVED if self._session.turns else "interrupted."


class _ReplyListener:
    """The `Listener` of a session: shows the answers and watches for Ctrl+C."""

    def __init__(self, face: Display, *, interactive: bool) -> None:
        self._face = face
        self._interactive = interactive
        self.presses = Presses()

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        if self._interactive:  # in a pipe it ends all of them
            self.presses.next_answer()
        self._face.begin(side, trial, sides)

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        self._face.piece(side, trial, thinking, text)

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        self._face.end(turn, prompt, answer)

    def stop(self) -> bool:
        return self.presses.wanted()

    def note(self, text: str) -> None:
        self._face.note(text)


def _terminated(number: int, frame: Any) -> None:
    print()  # ends the line of the prompt
    raise Interrupted(TERMINATED, _UNSAVED)


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
