"""Show people a command's progress and ask them questions: reporters for a terminal, a pipe and `--json`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column as RuledColumn
from rich.table import Table as RuledTable
from rich.text import Text

from abliterate.objectives import UNANSWERED, other_scores
from abliterate.terminal.json_lines import JsonReporter
from abliterate.terminal.question import Choice, Question, ask
from abliterate.terminal.streams import say_if_unread
from abliterate.terminal.tables import between_words, make_console, plain_lines, print_on, printable
from abliterate.types import Reporter, Table, Trial, kl_text


def make_reporter(*, as_json: bool) -> Reporter:
    """Rich on a terminal, plain lines in a pipe, JSON lines if asked."""
    if as_json:
        return JsonReporter(sys.stdout)
    return RichReporter(make_console()) if sys.stdout.isatty() else PlainReporter(sys.stdout)


# Terminals with fewer columns see the count and the times of a stage without its rate and bar.
NARROW = 80
# Terminals with fewer columns see one count of the best trial.
WIDE = 120


def trial_line(trial: Trial, total: int, front: bool, *, short: bool = False) -> str:
    """One trial in one line: its number, refusals, KL and seconds, and whether it is on the front.

    A `short` line has at most 55 columns, other scores aside; it lacks the seconds and the count of trials.
    """
    start = f"trial {trial.number:<3}" if short else f"{trial.number + 1:>4}/{total}  trial {trial.number:<3}"
    if trial.state == "failed":
        return f"{start}  failed: {trial.reason}"
    bound = "≥" if trial.state == "stopped" else " "
    mark = ("  ★" if short else "  ★ front") if front else ""
    others = "".join(f"  {text}" for text in other_scores(trial))
    unanswered = f"  unanswered {bound}{trial.unanswered:>3}" if UNANSWERED in trial.scores else ""
    seconds = "" if short else f"  {trial.seconds:5.1f} s"
    kl = kl_text(trial.kl) if short else f"{kl_text(trial.kl):<8}"  # longer where it is small
    return f"{start}{unanswered}  refusals {bound}{trial.refusals:>3}  KL {kl}{others}{seconds}{mark}"


class PlainReporter:
    """Writes plain lines without progress bars, for pipes and logs."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._warnings: set[str] = set()

    def header(self, fields: Mapping[str, str]) -> None:
        for name, value in fields.items():
            first, *more = value.split("\n")
            self._line(f"{name}: {first}")
            for line in more:  # indented, so that it can't be mistaken for another line of ours
                self._line(f"  {line}")

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self._line(f"== {name}" + (f": {detail}" if detail else ""))

    def stage_ended(self) -> None:
        """Show nothing, because the next stage's line says it."""

    def progress(self, done: int, total: int, unit: str) -> None:
        """Show nothing, because a log full of counters helps nobody."""

    def note(self, text: str, **fields: Any) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            self._line(f"warning: {text}")

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        self._line(trial_line(trial, total, front))

    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None:
        for part in summary:
            for line in plain_lines(part) if isinstance(part, Table) else (part,):
                self._line(line)

    def close(self) -> None:
        """Do nothing, because a plain reporter keeps nothing open."""

    def _line(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)
        say_if_unread(self._out)


class SilentReporter:
    """Shows nothing: of several ranks, only rank 0 reports."""

    def header(self, fields: Mapping[str, str]) -> None: ...
    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None: ...
    def stage_ended(self) -> None: ...
    def progress(self, done: int, total: int, unit: str) -> None: ...
    def note(self, text: str, **fields: Any) -> None: ...
    def warn(self, text: str) -> None: ...
    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None: ...
    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None: ...
    def close(self) -> None: ...


class _Yielding(ProgressColumn):
    """A field of a task as text that is cut where the terminal is too narrow for all columns."""

    def __init__(self, field: str, style: str) -> None:
        self._field, self._style = field, style
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(task.fields[self._field], style=self._style, no_wrap=True, overflow="ellipsis")


class RichReporter:
    """Shows a progress bar for the current stage with the best trial so far, and one line per trial."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._best = ""
        self._trials: int | None = None
        self._task: Any = None
        self._warnings: set[str] = set()

    def header(self, fields: Mapping[str, str]) -> None:
        grid = RuledTable.grid(padding=(0, 2))
        for name, value in fields.items():
            grid.add_row(f"[dim]{escape(name)}[/dim]", escape(printable(value, "\n")))
        self._show(Panel(grid, title="abliterate", border_style="cyan", expand=False))

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self.close()
        self._trials = None
        self._console.print(f"[cyan]▸[/] [bold]{escape(printable(name))}[/] [dim]{escape(printable(detail))}[/]")
        narrow = self._console.width < NARROW

        def kept() -> RuledColumn:
            return RuledColumn(no_wrap=True)

        columns: list[ProgressColumn] = [
            # These columns would read emoji codes in markup, whatever the console does.
            TextColumn("  {task.description}", markup=False, table_column=kept()),
            BarColumn(bar_width=30 if self._console.width >= WIDE else 12, table_column=kept()),
            MofNCompleteColumn(table_column=kept()),
            TextColumn("{task.fields[rate]}", style="dim", markup=False, table_column=kept()),
            TimeElapsedColumn(table_column=kept()),
            TextColumn("left", style="dim", markup=False, table_column=kept()),
            TimeRemainingColumn(table_column=kept()),
            _Yielding("best", "green"),
        ]
        if narrow:
            del columns[3], columns[1]
        self._progress = Progress(*columns, console=self._console, transient=True)
        self._progress.start()
        self._task = None

    def stage_ended(self) -> None:
        """Keep the progress bar until the next stage, or the end, replaces it."""

    def progress(self, done: int, total: int, unit: str) -> None:
        # Inside the search the bar counts trials, not the prompts of a trial.
        if self._trials is not None or self._progress is None:
            return
        self._advance(done, total, unit)

    def note(self, text: str, **fields: Any) -> None:
        self._show(f"  [dim]{escape(printable(text))}[/]")

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            self._show(f"  [bold magenta]warning:[/] {escape(printable(text))}")

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        line = trial_line(trial, total, front)
        if len(line) + 2 > self._console.width:
            line = trial_line(trial, total, front, short=True)
        style = "red" if trial.state == "failed" else "bold green" if front else "default"
        self._show(f"  [{style}]{escape(printable(line))}[/]")
        if best is not None:
            self._best = self._best_text(best)
        if self._trials is None and self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._trials = trial.number + 1
        self._advance(trial.number + 1, total, "trials")

    def finish(self, result: Mapping[str, Any], where: str, summary: Sequence[Table | str]) -> None:
        self.close()
        for part in summary:
            if isinstance(part, Table):
                print_on(self._console, part, " or abliterate report")
            else:
                # Soft wrap: the terminal breaks the lines, so that commands and paths can be copied whole.
                self._console.print(escape(printable(part)), soft_wrap=True)

    def close(self) -> None:
        """Take the progress bar off the terminal, before a question or at the end."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _best_text(self, best: Trial) -> str:
        """The best trial so far, in as many words as the terminal has room for."""
        tells_kinds, kl = UNANSWERED in best.scores, f"KL {kl_text(best.kl)}"
        if self._console.width < NARROW:
            return f"best {best.unanswered if tells_kinds else best.refusals}, {kl}"
        unanswered = [f"{best.unanswered} unanswered"] if tells_kinds else []
        refusals = [f"{best.refusals} refusals"] if self._console.width >= WIDE or not tells_kinds else []
        return "best: " + ", ".join([*unanswered, *refusals, kl, *map(printable, other_scores(best))])

    def _advance(self, done: int, total: int, unit: str) -> None:
        if self._progress is None:
            return
        if self._task is None:
            # Trials kept from before a resume took no time in this process, so they must not enter the rate.
            start = done - 1 if unit == "trials" else 0
            self._task = self._progress.add_task(unit, total=total, completed=start, rate="", best=self._best)
        speed = self._progress.tasks[-1].finished_speed or self._progress.tasks[-1].speed
        rate = f"{speed:.1f}/s" if speed and speed >= 1 else f"{1 / speed:.1f} s each" if speed else ""
        self._progress.update(
            self._task, completed=done, total=total, description=unit, rate=rate, best=self._best, refresh=True
        )

    def _show(self, content: Any) -> None:
        (self._progress.console if self._progress else self._console).print(content)


def ask_for_trial(question: Question, table: Table, reporter: Reporter) -> Choice:
    """Show the front as `table` and what the keys do, and let the person answer."""
    reporter.close()
    console = make_console()
    print_on(console, table, " or abliterate trials")
    console.print(escape(question.explanation()), style="dim")
    return ask(question)


def ask_yes(question: str) -> bool:
    """Ask a question, and return whether the person says yes; Enter and the end of the input (Ctrl+D) mean no."""
    try:
        return make_console().input(f"{escape(question)} (y/N) ", emoji=False).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def show_heading(text: str) -> None:
    """Print a heading above the output of one run among several."""
    text = printable(text)
    if sys.stdout.isatty():
        make_console().print(f"\n[bold]{escape(text)}[/]")
    else:
        print(f"\n=== {text}", flush=True)


def show_error(message: str) -> None:
    """Print an error sentence on standard error: broken between words on a terminal, else one line."""
    console = make_console(stderr=True, soft_wrap=True)
    text = f"error: {printable(message)}"
    if console.is_terminal:
        text = between_words(text, console.width)
    console.print(f"[bold red]error:[/]{escape(text.removeprefix('error:'))}")
