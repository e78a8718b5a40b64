"""A conversation with a model, or with a base model and its edited form side by side: turns, who answers, what is kept.

Owns the history and who said what. Knows no terminal, and of edits only how to switch them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from abliterate.artifacts.result import Result
from abliterate.chat.generate import Generator, Reply
from abliterate.errors import InputError
from abliterate.files import write_atomically, write_json
from abliterate.types import Trial

FORMAT = 1
# `model`: there is nothing to switch.
Side = Literal["base", "edited", "model"]
Mode = Literal["base", "edited", "both", "model"]


class Edits(Protocol):
    """The edits of a loaded model, put on and taken off."""

    @property
    def trial(self) -> int | None:
        """Number of the chosen trial; None where that isn't known."""

    def base(self) -> AbstractContextManager[None]:
        """The base model, bit for bit, while active."""

    def edited(self) -> AbstractContextManager[None]:
        """The model under the chosen trial's edits while active."""

    def choose(self, number: int) -> Trial:
        """Another trial from now on; InputError where there is no such complete one."""

    def result(self) -> Result:
        """The run's result as it is now; InputError where there is no run."""


class Listener(Protocol):
    """Who hears answers as they are given."""

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        """`side`, of all `sides` that answer this turn, begins."""

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        """More of its answer."""

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        """The whole; `turn` is its number from 1."""

    def stop(self) -> bool:
        """Whether the answer is to end here."""

    def note(self, text: str) -> None:
        """A fact worth a line."""


@dataclass(frozen=True)
class Answer:
    """What one side said in a turn."""

    side: Side
    trial: int | None
    said: Reply

    def to_record(self) -> dict[str, Any]:
        """JSON form."""
        parts = asdict(self.said)
        del parts["within_thinking"]
        return {"side": self.side, "trial": self.trial, **parts}


@dataclass
class Turn:
    """A message and its answers."""

    system: str
    prompt: str
    answers: dict[Side, Answer] = field(default_factory=dict)

    def heard_by(self, side: Side) -> str:
        """The answer in `side`'s history: its own, else the other's."""
        answer = self.answers.get(side) or next(iter(self.answers.values()))
        return answer.said.text


class Session:
    """`model` and `run` are names for what is kept of it. Without `edits` there is only the model itself."""

    def __init__(self, voice: Generator, edits: Edits | None, system: str, model: str, run: str | None = None) -> None:
        self._voice = voice
        self._edits = edits
        self.system = system
        self.model, self.run = model, run
        self.turns: list[Turn] = []
        self.mode: Mode = "edited" if edits else "model"
        self._asked = 0
        self._forgets_said = False

    @property
    def trial(self) -> int | None:
        """Number of the chosen trial, if there is one."""
        return self._edits.trial if self._edits else None

    def ask(self, prompt: str, listener: Listener) -> None:
        """A message, answered by whoever the mode says. A turn in which nobody could answer is forgotten."""
        turn = Turn(self.system, prompt)
        self.turns.append(turn)
        self._answer(turn, listener)

    def retry(self, listener: Listener) -> None:
        """The last message again; answers of sides that don't answer now are kept.

        Raises:
            InputError: there is none.
        """
        turn = self._last()
        again = any(
            side in turn.answers and turn.answers[side].trial == self._trial_of(side) and turn.system == self.system
            for side in self._sides()
        )
        if again and not self._voice.samples:
            listener.note("nothing is drawn at random, so the same model says the same again; try --temperature 0.7")
        turn.system = self.system
        self._answer(turn, listener)

    def undo(self) -> Turn:
        """Take the last turn back; InputError where there is none."""
        turn = self._last()
        self.turns.pop()
        return turn

    def reset(self) -> int:
        """Forget the conversation; returns how many turns it had."""
        count = len(self.turns)
        self.turns.clear()
        return count

    def switch(self, mode: Mode) -> None:
        """Who answers from now on; InputError where there is only one."""
        self._editable()
        self.mode = mode

    def choose(self, number: int) -> Trial:
        """Another trial answers from now on as the edited model.

        Raises:
            InputError: there is no such trial, or no run.
        """
        trial = self._editable().choose(number)
        self.mode = "both" if self.mode == "both" else "edited"
        return trial

    def result(self) -> Result:
        """The run's result as it is now; InputError where there is no run."""
        return self._editable().result()

    def set_system(self, text: str) -> str:
        """Another system prompt for the whole conversation from now on; returns what the template makes of it, if notable."""
        note = self._voice.form_note(text)  # raises where it can't be taken
        self.system = text
        return note

    def record(self) -> dict[str, Any]:
        """The conversation as JSON, with who said what."""
        turns = [
            {
                "system": turn.system,
                "prompt": turn.prompt,
                "answers": [answer.to_record() for answer in turn.answers.values()],
            }
            for turn in self.turns
        ]
        return {"format": FORMAT, "model": self.model, "run": self.run, "turns": turns}

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """The conversation as Markdown, or as JSON where the file's name ends so.

        Raises:
            InputError: it is there already, can't be there, or there is nothing to save.
        """
        if not self.turns:
            raise InputError("Nothing was said yet, so there is nothing to save.")
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"lies in no folder that exists ({path.parent})"
            raise InputError(f"The path {path} {what}; name another file.")
        if path.exists() and not overwrite:
            raise InputError(f"The file {path} exists; name another, or replace it with /save --force {path}.")
        if path.suffix.lower() == ".json":
            write_json(path, self.record())
        else:
            write_atomically(path, "\n\n".join(self._markdown()) + "\n")

    def _answer(self, turn: Turn, listener: Listener) -> None:
        self._asked += 1
        sides = self._sides()
        try:
            for side in sides:
                listener.begin(side, self._trial_of(side), sides)
                answer = self._say(turn, side, listener)
                if not answer.said.is_nothing:
                    turn.answers[side] = answer
                listener.end(len(self.turns), turn.prompt, answer)
        finally:
            if not turn.answers:
                with suppress(ValueError):
                    self.turns.remove(turn)

    def _say(self, turn: Turn, side: Side, listener: Listener) -> Answer:
        trial = self._trial_of(side)
        before = [pair for one in self.turns[:-1] for pair in (("user", one.prompt), ("assistant", one.heard_by(side)))]
        turns = (*before, ("user", turn.prompt))
        if before and not self._forgets_said and self._voice.left_out(self.system, turns):
            self._forgets_said = True
            listener.note("the model's chat template leaves earlier messages out, so it doesn't know what was said before")
        show = partial(listener.piece, side, trial)
        with self._active(side):
            return Answer(side, trial, self._voice.answer(self.system, turns, self._asked, show, listener.stop))

    def _active(self, side: Side) -> AbstractContextManager[None]:
        """The model as `side` has it, while active."""
        if self._edits is None:
            return nullcontext()
        return self._edits.base() if side == "base" else self._edits.edited()

    def _sides(self) -> tuple[Side, ...]:
        """Who answers now, in order."""
        return ("base", "edited") if self.mode == "both" else (self.mode,)

    def _trial_of(self, side: Side) -> int | None:
        return None if side == "base" else self.trial

    def _editable(self) -> Edits:
        if self._edits is None:
            raise InputError(
                "There is no run here, only a model, so there is nothing to switch to; start with abliterate chat RUN for that."
            )
        return self._edits

    def _last(self) -> Turn:
        if not self.turns:
            raise InputError("Nothing was said yet.")
        return self.turns[-1]

    def _markdown(self) -> Iterator[str]:
        yield f"# Conversation with {self.model}" + (f" (run {self.run})" if self.run else "")
        system = ""
        for turn in self.turns:
            if turn.system != system:
                system = turn.system
                yield f"**System prompt:** {system or '(none)'}"
            yield "**you:**"
            yield turn.prompt
            for answer in turn.answers.values():
                cut = "" if answer.said.ended == "end" else f", {'cut' if answer.said.ended == 'limit' else 'interrupted'}"
                yield f"**{label(answer.side, answer.trial)}{cut}:**"
                if answer.said.thinking.strip():
                    quoted = "\n".join(f"> {line}".rstrip() for line in answer.said.thinking.strip().splitlines())
                    yield f"> *thinking*\n>\n{quoted}"
                yield answer.said.text


def label(side: Side, trial: int | None) -> str:
    """Who says something, for a person."""
    return side if trial is None else f"{side}, trial {trial}"
