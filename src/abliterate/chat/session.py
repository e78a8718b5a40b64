"""The state of a chat with a model, or with a base model and its edited form side by side: turns, answers, and who answers.

A session never writes to a terminal: answers go to a `Listener` as they are generated.
"""

from __future__ import annotations

import os
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
# `model` is the only side of a chat without edits.
Side = Literal["base", "edited", "model"]
Mode = Literal["base", "edited", "both", "model"]


class Edits(Protocol):
    """The edits of a loaded model, which can be switched on and off."""

    @property
    def trial(self) -> int | None:
        """Number of the chosen trial; None if it isn't known."""

    def base(self) -> AbstractContextManager[None]:
        """The base model, bit for bit, while active."""

    def edited(self) -> AbstractContextManager[None]:
        """The model under the chosen trial's edits while active."""

    def choose(self, number: int) -> Trial:
        """Choose another trial; InputError if no complete trial has that number."""

    def result(self) -> Result:
        """The run's result as it is now; InputError where there is no run."""


class Listener(Protocol):
    """Receives answers as they are generated."""

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        """The answer of `side` begins; `sides` are all that answer in this turn."""

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        """The next piece of the answer."""

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        """The whole answer; `turn` is its number from 1."""

    def stop(self) -> bool:
        """Whether the answer should end here."""

    def note(self, text: str) -> None:
        """A remark of one line."""


@dataclass(frozen=True)
class Answer:
    """The answer of one side in a turn."""

    side: Side
    trial: int | None
    said: Reply

    def to_record(self) -> dict[str, Any]:
        """The answer as JSON."""
        record = asdict(self.said)
        del record["within_thinking"]
        return {"side": self.side, "trial": self.trial, **record}


@dataclass
class Turn:
    """A message of the user and its answers."""

    system: str
    prompt: str
    answers: dict[Side, Answer] = field(default_factory=dict)

    def heard_by(self, side: Side) -> str:
        """The answer in the history of `side`: its own answer, else that of the other side."""
        answer = self.answers.get(side) or next(iter(self.answers.values()))
        return answer.said.text


class Session:
    """A conversation. `model` and `run` are the names it is saved under; without `edits`, only the model itself answers."""

    def __init__(self, voice: Generator, edits: Edits | None, system: str, model: str, run: str | None = None) -> None:
        self._voice = voice
        self._edits = edits
        self.system = system
        self.model, self.run = model, run
        self.turns: list[Turn] = []
        self.mode: Mode = "edited" if edits else "model"
        self._asked = 0
        self._warned_of_loss = False

    @property
    def trial(self) -> int | None:
        """Number of the chosen trial, if any."""
        return self._edits.trial if self._edits else None

    def ask(self, prompt: str, listener: Listener) -> None:
        """Have a message answered by the sides of the current mode. A turn without any answer is dropped."""
        turn = Turn(self.system, prompt)
        self.turns.append(turn)
        self._answer(turn, listener)

    def retry(self, listener: Listener) -> None:
        """Have the last message answered again; the answers of sides that don't answer now are kept.

        Raises:
            InputError: there is no message yet.
        """
        turn = self._last()
        same_input = any(
            side in turn.answers and turn.answers[side].trial == self._trial_of(side) and turn.system == self.system
            for side in self._sides()
        )
        if same_input and not self._voice.samples:
            listener.note("nothing is sampled at random, so the same model gives the same answer again; try --temperature 0.7")
        turn.system = self.system
        self._answer(turn, listener)

    def undo(self) -> Turn:
        """Remove the last turn; InputError if there is none."""
        turn = self._last()
        self.turns.pop()
        return turn

    def reset(self) -> int:
        """Forget the conversation; returns the number of its turns."""
        count = len(self.turns)
        self.turns.clear()
        return count

    def switch(self, mode: Mode) -> None:
        """Change who answers from now on; InputError if only one side exists."""
        self._editable()
        self.mode = mode

    def choose(self, number: int) -> Trial:
        """Let another trial answer from now on as the edited model.

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
        """Set the system prompt of the whole conversation; returns a remark if the template treats it in an unusual way."""
        note = self._voice.form_note(text)  # raises if the template can't take the prompt
        self.system = text
        return note

    def record(self) -> dict[str, Any]:
        """The conversation as JSON."""
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
        """Save the conversation as Markdown, or as JSON if the file's name ends in .json.

        Raises:
            InputError: the file exists, can't be there, or there is nothing to save.
        """
        if not self.turns:
            raise InputError("Nothing was said yet, so there is nothing to save; type a message first.")
        # These give False, and no error, for a folder that may not be entered and for a name that is too long.
        if os.path.isdir(path) or not os.path.isdir(path.parent):
            fault = "is a folder" if os.path.isdir(path) else f"lies in a folder that isn't there ({path.parent})"
            raise InputError(f"The path {path} {fault}; name another file.")
        if os.path.exists(path) and not overwrite:
            raise InputError(f"The file {path} exists; name another file, or replace it with /save --force {path}.")
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
        earlier = [
            message for past in self.turns[:-1] for message in (("user", past.prompt), ("assistant", past.heard_by(side)))
        ]
        turns = (*earlier, ("user", turn.prompt))
        if earlier and not self._warned_of_loss and self._voice.left_out(self.system, turns):
            self._warned_of_loss = True
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
        """The sides that answer now, in order."""
        return ("base", "edited") if self.mode == "both" else (self.mode,)

    def _trial_of(self, side: Side) -> int | None:
        return None if side == "base" else self.trial

    def _editable(self) -> Edits:
        if self._edits is None:
            raise InputError(
                "There is no run here, only a model, so no trial can be chosen; start with abliterate chat RUN for that."
            )
        return self._edits

    def _last(self) -> Turn:
        if not self.turns:
            raise InputError("Nothing was said yet; type a message first.")
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
    """The heading of a side's answer."""
    return side if trial is None else f"{side}, trial {trial}"
