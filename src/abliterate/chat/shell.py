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
from abliterate.files import safe_name
from abliterate.objectives import other_scores

_FORCE = "--force "

HELP = {
    "/base": "the base model answers from now on",
    "/edited": "the chosen trial answers from now on",
    "/both": "both answer, side by side; each goes on from its own answers",
    "/trial [N]": "another trial, without loading anything; alone: which one it is",
    "/trials": "the trials on the front",
    "/system [TEXT]": 'another system prompt, "" for none; alone: which one it is',
    "/retry": "answer the last message again",
    "/undo": "take the last message and its answers back",
    "/reset": "forget the conversation",
    "/save [--force] [FILE]": "keep the conversation as Markdown, or as JSON in a FILE.json",
    "/help": "this",
    "/quit": "end; Ctrl+D does, too",
}

_HOW = 'A line that ends in \\ goes on, """ begins and ends several; a message that begins with / is typed with two.'


class Shell:
    """Reads lines and does what they say."""

    def __init__(self, session: Session, face: Display, lines: Lines) -> None:
        self._session = session
        self._face = face
        self._lines = lines
        self._hearer = _ReplyListener(face)
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
        """Until the lines end, or /quit.

        Raises:
            Interrupted: by SIGTERM, by Ctrl+C twice, or in a pipe once.
        """
        pressed = False
        with handling({signal.SIGTERM: _terminated}):
            while True:
                try:
                    text = self._lines.read(self._prompt())
                    pressed = False
                    if text.strip() == "/quit" or not self._line(text):
                        return
                except EOFError:
                    if self._lines.interactive:
                        print()
                    return
                except KeyboardInterrupt:
                    if pressed or not self._lines.interactive:
                        raise Interrupted(message=self._left()) from None
                    pressed = True
                    print()
                    self._face.note("once more Ctrl+C, or Ctrl+D, ends the chat")

    def check(self) -> None:
        """In a pipe nobody may have seen what couldn't be carried out: then it ends with the first such error's exit code."""
        if self.failed and not self._lines.interactive:
            first = self.failed[0]
            raise type(first)(
                f"{len(self.failed)} of {self._count} lines could not be carried out; the first: {visible(str(first))}"
            )

    def _line(self, text: str) -> bool:
        """Do what a line says; False where that is to end."""
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
        """Answers are given; Ctrl+C ends one of them, and where nobody could go on from there, all."""
        presses = self._hearer.presses
        with presses.listening():
            try:
                work()
            finally:
                self._face.close()
        if presses.signal == signal.SIGTERM:
            raise Interrupted(TERMINATED, self._left())
        if presses.signal and not self._lines.interactive:
            raise Interrupted(INTERRUPTED, self._left())

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        command = self._commands.get(name)
        if command is None:
            near = difflib.get_close_matches(name, [*self._commands, "/quit"], n=1)
            remedy = f"did you mean {near[0]}?" if near else "/help shows all, and // begins a message with a slash."
            raise InputError(f"There is no command {name}; {remedy}")
        command(rest.strip())

    def _prompt(self) -> str:
        trial = "" if self._session.trial is None or self._session.mode == "base" else f" {self._session.trial}"
        return f"{self._session.mode}{trial}> "

    def _switch(self, mode: Mode, rest: str) -> None:
        if rest:
            raise InputError(f"The command /{mode} takes nothing behind it; type the message as a line of its own.")
        self._session.switch(mode)
        self._face.note({"both": "both answer"}.get(mode, f"the {mode} model answers"))

    def _trial(self, rest: str) -> None:
        if not rest:
            trial = self._session.trial
            self._session.result()  # says why where there is none
            self._face.note(f"trial {trial}")
            return
        if not rest.isdecimal():
            raise InputError(f"The command /trial needs the number of a trial, not {rest!r}; /trials shows the front.")
        chosen = self._session.choose(int(rest))
        total = self._session.result().n_harmful
        scores = ", ".join([f"refusals {chosen.refusals}/{total}", f"KL {chosen.kl:.4f}", *other_scores(chosen)])
        self._face.note(f"trial {chosen.number} answers: {scores}")

    def _trials(self, rest: str) -> None:
        self._face.front(self._session.result().to_record(), self._session.trial)

    def _system(self, rest: str) -> None:
        if rest:
            note = self._session.set_system("" if rest in ('""', "''") else rest)
            if note:
                self._face.note(note)
        said = " for the whole conversation" if rest and self._session.turns else ""
        self._face.note(f"system prompt{said}: {self._session.system or 'none'}")

    def _retry(self, rest: str) -> None:
        self._answer(lambda: self._session.retry(self._hearer))

    def _undo(self, rest: str) -> None:
        taken = " ".join(self._session.undo().prompt.split())
        self._face.note(f"taken back: {taken if len(taken) <= 60 else taken[:59] + '…'}")

    def _reset(self, rest: str) -> None:
        self._face.note(f"the conversation of {self._session.reset()} turns is forgotten; the system prompt stays")

    def _save(self, rest: str) -> None:
        overwrite = f"{rest} ".startswith(_FORCE)
        name = rest[len(_FORCE) :].strip() if overwrite else rest
        path = Path(name).expanduser() if name else Path(f"chat-{safe_name(self._session.model)}-{_now()}.md")
        self._session.save(path, overwrite=overwrite)
        self._face.note(f"saved in {path}")

    def _help(self, rest: str) -> None:
        width = max(map(len, HELP))
        self._face.note("\n".join([*(f"{name:<{width}}  {what}" for name, what in HELP.items()), _HOW]))

    def _left(self) -> str:
        return "interrupted; the conversation wasn't saved (/save does that)." if self._session.turns else "interrupted."


class _ReplyListener:
    """The `Listener` of a session: what is heard is shown, and Ctrl+C is listened to."""

    def __init__(self, face: Display) -> None:
        self._face = face
        self.presses = Presses()

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
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
    print()  # the prompt stands there
    raise Interrupted(TERMINATED, "interrupted; the conversation wasn't saved (/save does that).")


def _now() -> str:
    return time.strftime("%Y%m%d-%H%M%S")
