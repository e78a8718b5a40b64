"""What a person or a script sees while something is at work: three reporters, and questions. With `tables`, all of Rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.prompt import Prompt as Question
from rich.table import Table

from abliterate.objectives import other_scores
from abliterate.terminal.json_lines import JsonReporter
from abliterate.terminal.tables import front_table, heldout_lines, printable
from abliterate.types import Baseline, Reporter, Trial


def make_reporter(*, as_json: bool) -> Reporter:
    """Rich on a terminal, plain lines in a pipe, JSON lines if asked."""
    if as_json:
        return JsonReporter(sys.stdout)
    return RichReporter(Console()) if sys.stdout.isatty() else PlainReporter(sys.stdout)


def trial_line(trial: Trial, total: int, front: bool) -> str:
    """One trial in one line: number, refusals, KL, seconds, whether on the front."""
    place = f"{trial.number + 1:>4}/{total}  trial {trial.number:<3}"
    if trial.state == "failed":
        return f"{place}  failed: {trial.reason}"
    bound = "≥" if trial.state == "stopped" else " "
    mark = "  ★ front" if front else ""
    others = "".join(f"  {text}" for text in other_scores(trial))
    return f"{place}  refusals {bound}{trial.refusals:>3}  KL {trial.kl:.4f}{others}  {trial.seconds:5.1f} s{mark}"


class PlainReporter:
    """Plain lines, for pipes and logs: no progress bars."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._warnings: set[str] = set()

    def header(self, fields: Mapping[str, str]) -> None:
        for name, value in fields.items():
            first, *more = value.split("\n")
            self._line(f"{name}: {first}")
            for line in more:  # indented: it can't pass for another line of ours
                self._line(f"  {line}")

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self._line(f"== {name}" + (f": {detail}" if detail else ""))

    def progress(self, done: int, total: int, unit: str) -> None:
        """Show nothing: a log full of counters helps nobody."""

    def note(self, text: str, **fields: Any) -> None:
        self._line(text)

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            self._line(f"warning: {text}")

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        self._line(trial_line(trial, total, front))

    def finish(self, result: Mapping[str, Any], where: str) -> None:
        for line in summary_lines(result, where):
            self._line(line)

    def close(self) -> None:
        """Nothing is open."""

    def _line(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)


class RichReporter:
    """A progress bar for the current stage, one line per trial, and the best so far in the bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._best = ""
        self._trials: int | None = None
        self._task: Any = None
        self._warnings: set[str] = set()

    def header(self, fields: Mapping[str, str]) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, value in fields.items():
            grid.add_row(f"[dim]{escape(name)}[/dim]", escape(printable(value, "\n")))
        self._show(Panel(grid, title="abliterate", border_style="cyan", expand=False))

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        self.close()
        self._trials = None
        self._console.print(f"[bold cyan]▸ {escape(printable(name))}[/] [dim]{escape(printable(detail))}[/]")
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[rate]}[/]"),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=self._console,
            transient=True,
        )
        self._progress.start()
        self._task = None

    def progress(self, done: int, total: int, unit: str) -> None:
        # Inside the search the bar counts trials, not the prompts of one of them.
        if self._trials is not None or self._progress is None:
            return
        self._advance(done, total, unit)

    def note(self, text: str, **fields: Any) -> None:
        self._show(f"  [dim]{escape(printable(text))}[/]")

    def warn(self, text: str) -> None:
        if text not in self._warnings:
            self._warnings.add(text)
            self._show(f"  [yellow]warning:[/] {escape(printable(text))}")

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        line = escape(printable(trial_line(trial, total, front)))
        style = "red" if trial.state == "failed" else "bold green" if front else "default"
        self._show(f"  [{style}]{line}[/]")
        if best is not None:
            others = "".join(f", {escape(printable(text))}" for text in other_scores(best))
            self._best = f"[green]best: {best.refusals} refusals, KL {best.kl:.3f}{others}[/]"
        if self._trials is None and self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._trials = trial.number + 1
        self._advance(trial.number + 1, total, "trials")

    def finish(self, result: Mapping[str, Any], where: str) -> None:
        self.close()
        self._console.print(front_table(result))
        for line in summary_lines(result, where, table=False):
            self._console.print(escape(printable(line)), highlight=False)

    def close(self) -> None:
        """Take the progress bar off the terminal, before a question or at the end."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _advance(self, done: int, total: int, unit: str) -> None:
        if self._progress is None:
            return
        if self._task is None:
            # Trials kept from before a resume took no time now; they must not enter the rate.
            start = done - 1 if unit == "trials" else 0
            self._task = self._progress.add_task(unit, total=total, completed=start, rate="", best=self._best)
        speed = self._progress.tasks[-1].finished_speed or self._progress.tasks[-1].speed
        rate = f"{speed:.1f}/s" if speed and speed >= 1 else f"{1 / speed:.1f} s each" if speed else ""
        self._progress.update(
            self._task, completed=done, total=total, description=unit, rate=rate, best=self._best, refresh=True
        )

    def _show(self, content: Any) -> None:
        (self._progress.console if self._progress else self._console).print(content, highlight=False)


def summary_lines(result: Mapping[str, Any], where: str, *, table: bool = True) -> Iterable[str]:
    """What was found and exported, as plain lines."""
    total = result["baseline"]["prompts"]
    by_number = {record["number"]: Trial.from_record(record) for record in result["trials"]}
    if table:
        others = "".join(f"  {name} {value:.4g}" for name, value in sorted(result["baseline"].get("values", {}).items()))
        yield f"base: refusals {result['baseline']['refusals']}/{total}{others}"
        for number in result["front"]:
            trial = by_number[number]
            mark = "  <- selected" if number == result["selected"] else ""
            others = "".join(f"  {text}" for text in other_scores(trial))
            yield f"front: trial {number}  refusals {trial.refusals}/{total}  KL {trial.kl:.4f}{others}{mark}"
    if result["selected"] is None:
        return
    trial = by_number[result["selected"]]
    before = result["baseline"]["refusals"]
    others = "".join(f", {text}" for text in other_scores(trial, result["baseline"].get("values", {})))
    yield f"selected trial {trial.number}: refusals {before}/{total} → {trial.refusals}/{total}, KL {trial.kl:.4f}{others}"
    heldout = result.get("heldout")
    if heldout and heldout["trial"] == trial.number:
        yield from heldout_lines(heldout)
    export = result["export"]
    if export["path"]:
        verified = {True: "verified after reloading", False: "NOT verified", None: "not checked"}[export["verified"]]
        yield f"exported ({export['kind']}): {where}/{export['path']}, {verified}"
        if export.get("pushed"):
            yield f"pushed: {export['pushed']}"


def ask_for_trial(front: Sequence[Trial], default: Trial, baseline: Baseline, reporter: Reporter) -> Trial:
    """Show the front and let the person choose; Enter, and the end of the input (Ctrl+D), take the rule's choice."""
    reporter.close()
    console = Console()
    record = {
        "trials": [trial.to_record() for trial in front],
        "front": [trial.number for trial in front],
        "baseline": baseline.to_record(),
        "selected": default.number,
    }
    console.print(front_table(record))
    numbers = {str(trial.number): trial for trial in front}
    question = "Which trial is to be exported"
    try:
        answer = Question.ask(question, choices=list(numbers), default=str(default.number), console=console)
    except EOFError:
        console.print()
        return default
    return numbers[answer]


def ask_yes(question: str) -> bool:
    """Whether the person says yes; Enter and the end of the input (Ctrl+D) mean no."""
    try:
        return Console().input(f"{escape(question)} (y/N) ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def show_heading(text: str) -> None:
    """What stands above all that one run of several says."""
    if sys.stdout.isatty():
        Console().print(f"\n[bold]{escape(text)}[/]", highlight=False)
    else:
        print(f"\n=== {text}", flush=True)


def show_error(message: str) -> None:
    """One sentence on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(printable(message))}")
