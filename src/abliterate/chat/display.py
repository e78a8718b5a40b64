"""Show a chat: on a terminal, in a pipe, or as JSON lines.

No text of a model or a file reaches a terminal with a control character in it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from abliterate.artifacts.result import Result
from abliterate.chat.session import Answer, Side, label
from abliterate.report.tables import SearchRecord, front_table
from abliterate.terminal import json_lines
from abliterate.terminal.streams import say_if_unread
from abliterate.terminal.tables import make_console, plain_lines, print_on

# C0 except tab and line feed, delete, C1; and the characters that turn the direction of text or are invisible in it.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ENDED = {"limit": "cut here: the answer has reached its length limit (--max-new-tokens)", "interrupted": "interrupted"}
_WITHIN = "the answer ended while the model was still thinking"
_NARROW = 60  # on a terminal with fewer columns, two answers stand below each other


def visible(text: str) -> str:
    """`text` with control characters written out, as in `\\x1b[2J`: a terminal must not obey a model."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class Display(Protocol):
    """The view of a chat: shows answers like a `Listener` (but without `stop`), and the output of commands."""

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None: ...
    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None: ...
    def end(self, turn: int, prompt: str, answer: Answer) -> None: ...
    def close(self) -> None:
        """The answers of a turn have ended, whether complete or not."""

    def note(self, text: str) -> None: ...
    def problem(self, text: str) -> None:
        """Say why a line couldn't be carried out."""

    def front(self, result: Result, current: int | None) -> None:
        """Show the trials on the front, and which trial answers."""


class PlainDisplay:
    """Writes answers to `out` and everything else to `err`. Thinking isn't shown."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out, self._err = out, err
        self._is_open = False  # whether an answer has begun and its line hasn't ended

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        if len(sides) > 1:
            print(f"[{label(side, trial)}]", file=self._out)

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        if not thinking:
            print(visible(text), end="", file=self._out, flush=True)
            self._is_open = True

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        print(file=self._out, flush=True)
        self._is_open = False
        say_if_unread(self._out)
        for text in _remarks(answer):
            self.note(text)

    def close(self) -> None:
        """End the line of an answer that an error cut."""
        if self._is_open:
            print(file=self._out, flush=True)
            self._is_open = False

    def note(self, text: str) -> None:
        print(visible(text), file=self._err, flush=True)

    def problem(self, text: str) -> None:
        print(f"error: {visible(text)}", file=self._err, flush=True)

    def front(self, result: Result, current: int | None) -> None:
        for line in plain_lines(front_table(SearchRecord.of(result), marked=current)):
            self.note(line)
        self.note(f"trial {current} answers")


class JsonDisplay:
    """Writes JSON lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        """No event: every piece names its side."""

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        json_lines.emit("piece", out=self._out, side=side, trial=trial, thinking=thinking, text=text)

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        json_lines.emit("answer", out=self._out, turn=turn, prompt=prompt, **answer.to_record())
        say_if_unread(self._out)

    def close(self) -> None:
        """Nothing to do: no answer is shown live."""

    def note(self, text: str) -> None:
        json_lines.emit("note", out=self._out, text=text, fields={})

    def problem(self, text: str) -> None:
        json_lines.emit("warning", out=self._out, text=text)

    def front(self, result: Result, current: int | None) -> None:
        trials = [trial.to_record() for trial in result.trials if trial.number in result.front]
        json_lines.emit("front", out=self._out, trials=trials, selected=result.selected, current=current)


class TerminalDisplay:
    """Shows answers as they are generated, with dimmed thinking; two answers side by side if the terminal is wide enough."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._columns: dict[Side, tuple[str, Text]] = {}
        self._live: Live | None = None
        self._kind = ""  # whether the last piece was thinking or answer
        self._is_open = False  # whether an answer has begun outside of a table and its line hasn't ended

    def begin(self, side: Side, trial: int | None, sides: tuple[Side, ...]) -> None:
        self._kind = ""
        if len(sides) == 1:
            return
        if self._console.width < _NARROW:
            self._console.print(Text(label(side, trial), style="bold"))
            return
        self._columns[side] = (label(side, trial), Text())
        if self._live is None:
            self._live = Live(console=self._console, transient=True, refresh_per_second=8, vertical_overflow="crop")
            self._live.start()
        self._live.update(_Last(self._table()))

    def piece(self, side: Side, trial: int | None, thinking: bool, text: str) -> None:
        style = "dim italic" if thinking else ""
        gap = "\n\n" if self._kind == "thinking" and not thinking else ""
        self._kind = "thinking" if thinking else "answer"
        if side in self._columns:
            self._columns[side][1].append(gap + visible(text), style=style)
            return
        # Soft wrap: the terminal breaks the lines, so that a copied answer has the model's own line breaks.
        self._console.print(Text(gap + visible(text), style=style), end="", soft_wrap=True, highlight=False)
        self._is_open = True

    def end(self, turn: int, prompt: str, answer: Answer) -> None:
        remarks = _remarks(answer)
        if answer.side in self._columns:
            shown = self._columns[answer.side][1]
            shown.append("".join(f"\n({remark})" for remark in remarks), style="magenta")
            return
        self._console.print()
        self._is_open = False
        for remark in remarks:
            self._console.print(Text(f"({remark})", style="magenta"))

    def close(self) -> None:
        """Print the final table in place of the live one, or end the line of an answer that an error cut."""
        if self._is_open:
            self._console.print()
            self._is_open = False
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._console.print(self._table())
        self._columns = {}

    def note(self, text: str) -> None:
        self._say(text, "dim")

    def problem(self, text: str) -> None:
        self._say(text, "red")

    def front(self, result: Result, current: int | None) -> None:
        print_on(self._console, front_table(SearchRecord.of(result), marked=current), " or abliterate trials")

    def _say(self, text: str, style: str) -> None:
        console = self._live.console if self._live else self._console
        console.print(Text(visible(text), style=style), highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for heading, _ in self._columns.values():
            table.add_column(Text(heading, style="bold"), ratio=1, overflow="fold")
        if len(self._columns) == 1:  # keeps the place of the other answer until it begins
            table.add_column("", ratio=1)
        table.add_row(*(text for _, text in self._columns.values()))
        return table


class _Last:
    """The last lines of a table that is higher than the terminal, because the newest words are there."""

    def __init__(self, content: Table) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        height = max(console.height - 2, 3)
        kept: Sequence[list[Segment]] = lines if len(lines) <= height else [lines[0], *lines[len(lines) - height + 1 :]]
        for line in kept:
            yield from line
            yield Segment.line()


def _remarks(answer: Answer) -> list[str]:
    """Remarks for a person on the way an answer ended."""
    remarks = [_ENDED[answer.said.ended]] if answer.said.ended in _ENDED else []
    if answer.said.within_thinking:
        remarks.append(_WITHIN)
    elif not answer.said.text.strip() and answer.said.ended == "end":
        remarks.append("the answer is empty")
    return remarks


def make_face(*, as_json: bool, interactive: bool) -> Display:
    """The view that suits the destination of the output."""
    if as_json:
        return JsonDisplay(sys.stdout)
    return TerminalDisplay(make_console()) if interactive else PlainDisplay(sys.stdout, sys.stderr)
