"""`abliterate run`: turn options into settings and a run directory, and carry out the run.

The pipeline, and with it torch, is imported only when the settings have been checked, so that bad input is told at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate import ranks
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory, default_path, latest_run
from abliterate.artifacts.runs import no_run
from abliterate.cli import live
from abliterate.cli.checks import check_run
from abliterate.cli.exit import for_lines_alone, quiet_libraries
from abliterate.errors import InputError, Interrupted, as_command
from abliterate.files import expanded
from abliterate.report.live import Activity
from abliterate.report.tables import SearchRecord, front_table
from abliterate.search.selection import parse_rule
from abliterate.settings import untrusted
from abliterate.settings.schema import Settings
from abliterate.settings.sources import check_storage, load_settings, options_of
from abliterate.terminal.interrupts import Interrupts
from abliterate.terminal.question import Question
from abliterate.terminal.reporters import SilentReporter, ask_for_trial, make_reporter
from abliterate.types import Reporter, Trial

if TYPE_CHECKING:
    from abliterate.pipeline.run import Candidates


@dataclass(frozen=True)
class RunFlags:
    """The options of `abliterate run` that aren't settings."""

    gpus: int = 1
    resume: bool = False
    restart: bool = False
    as_json: bool = False
    reference: bool = False
    yes: bool = False
    # The minutes after which the proposed trial is exported if nobody chooses one; 0 waits for ever.
    wait: float = 10.0
    live: bool = False
    may_open: bool = True


def run(given: Mapping[str, Any], config: str, assignments: list[str], flags: RunFlags) -> None:
    """`abliterate run MODEL`."""
    options = options_of(given, assignments)
    with ranks.joined():
        settings, directory = ranks.agree(lambda: resolve(options, config, flags))
        if not ranks.is_first():
            follow(settings, flags)
            return
        at_terminal = sys.stdin.isatty() and sys.stdout.isatty() and ranks.size() == 1
        chosen_for = flags.as_json or flags.yes or "select" in options.get("search", {}) or settings.export.kind == "none"
        asks = at_terminal and not chosen_for
        carry_out(settings, directory, flags, Interrupts(), ask=asks)


def follow(settings: Settings, flags: RunFlags) -> None:
    """Take part in rank 0's run, silently and in a directory of its own, which is removed.

    Rank 0 alone heeds signals: if it ends, this process notices.
    """
    from abliterate.pipeline import run as pipeline_run

    quiet_libraries()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with tempfile.TemporaryDirectory(prefix="abliterate-rank-") as folder:
        directory = RunDirectory(Path(folder) / "run")
        pipeline_run.run(settings, SilentReporter(), directory, resume=flags.resume, restart=flags.restart)


def resolve(
    options: Mapping[str, Any], config: str, flags: RunFlags, entry: Mapping[str, Any] | None = None
) -> tuple[Settings, RunDirectory]:
    """The settings and the directory of a run, new or continued; `entry` is the run's entry in a list of runs."""
    settings = load_settings(config, options, entry=entry)
    directory = _existing(settings) if flags.resume else None
    if flags.resume and directory is None and settings.out and not settings.model:
        raise no_run(expanded(settings.out))
    if directory:
        # A continued run begins with its own settings, and every setting given now overrides them.
        directory.stored_settings()
        own, settings = settings, load_settings(config, options, stored=directory.settings, entry=entry)
        check_storage(settings.search.storage)
        untrusted.check(settings, own, directory.path)
        settings = untrusted.with_places_of(own, settings)
    if flags.reference:
        settings = settings.model_copy(update={"efficiency": settings.efficiency.reference()})
    check_storage(settings.search.storage)
    return settings, directory or RunDirectory(Path(settings.out) if settings.out else default_path(settings.model))


def carry_out(settings: Settings, directory: RunDirectory, flags: RunFlags, interrupts: Interrupts, *, ask: bool) -> Result:
    """Carry out one run; with `ask`, a person chooses the trial."""
    check_run(settings, directory, resume=flags.resume, restart=flags.restart)
    from abliterate.pipeline import run as pipeline_run

    quiet_libraries()
    reporter, activity = make_reporter(as_json=flags.as_json), Activity()

    def choose(given: Candidates) -> Trial | None:
        with interrupts.at_once(), live.waiting(activity, "somebody to choose a trial at its terminal"):
            return chosen(given, flags, reporter)

    try:
        with (
            interrupts.listening(),
            ranks.lost_ranks(),
            _shown(directory, reporter, activity, flags) as told,
            for_lines_alone(as_json=flags.as_json),
        ):
            return pipeline_run.run(
                settings,
                interrupts.watched(told),
                directory,
                resume=flags.resume,
                restart=flags.restart,
                gpus=flags.gpus,
                choose=choose if ask else None,
                check=interrupts.check,
            )
    except ranks.Lost as error:
        raise ranks.Lost(f"{error}: {_how_to_continue(directory, settings)}") from error
    except Interrupted as error:
        raise Interrupted(error.exit_code, _how_to_continue(directory, settings)) from error
    except KeyboardInterrupt as error:
        raise Interrupted.by(error, _how_to_continue(directory, settings)) from error
    finally:
        reporter.close()


def chosen(given: Candidates, flags: RunFlags, reporter: Reporter) -> Trial | None:
    """The trial that a person chooses, who may talk to some of them before; None if none is to be exported."""
    from abliterate.chat.talk import talk

    listed, proposed = [trial.number for trial in given.front], given.proposed.number
    complete = {trial.number: trial for trial in given.trials if trial.state == "complete"}
    search = SearchRecord(tuple(given.trials), tuple(listed), proposed, given.baseline, given.bench.objectives)
    while True:
        question = Question(complete, listed, proposed, 60 * flags.wait if flags.wait else float("inf"))
        choice = ask_for_trial(question, front_table(search), reporter)
        if choice.what != "chat":
            return complete[choice.number] if choice.what == "export" else None
        talk(given.bench, given.directory, complete[choice.number])


def _shown(
    directory: RunDirectory, reporter: Reporter, activity: Activity, flags: RunFlags
) -> contextlib.AbstractContextManager[Reporter]:
    """The reporter of a run, which with --live also tells a browser, by way of `activity`."""
    if flags.live:
        return live.beside(directory, reporter, activity, may_open=flags.may_open)
    return contextlib.nullcontext(reporter)


def _existing(settings: Settings) -> RunDirectory | None:
    """The run that --resume continues: the run in `out`, else the newest run of this model; None if there is none."""
    path = Path(settings.out) if settings.out else latest_run(settings.model)
    if path is None:
        return None
    directory = RunDirectory(path)
    return directory if directory.settings.exists() else None


def _how_to_continue(directory: RunDirectory, settings: Settings) -> str:
    path = directory.path
    if not directory.holds_run:
        return "interrupted before the first result was saved; start the run again."
    values = settings.model_dump(mode="json")
    asked = untrusted.requests(values, path)
    # A run's own folders aren't taken from its directory, and without them the residuals would be computed again.
    own = load_settings("")
    cache = ["--cache-dir", settings.cache_dir] if settings.cache_dir not in ("", own.cache_dir) else []
    if (folder := settings.efficiency.residual_cache_dir) not in ("", own.efficiency.residual_cache_dir):
        cache += ["--set", f"efficiency.residual_cache_dir={folder}"]
    if (folder := settings.load.offload_folder) not in ("", own.load.offload_folder):
        cache += ["--set", f"load.offload_folder={folder}"]
    again = as_command("run", "--resume", "--out", path, *cache, *untrusted.options(values, asked))
    text = f"interrupted; finished trials are kept in {path}. Continue with {again}"
    if (best := _best_so_far(directory, settings)) is None:
        return f"{text}."
    trust = ["--trust-remote-code"] if untrusted.code_note(asked) else []
    return f"{text}, or export a trial now with {as_command('export', path, '--trial', best.number, *trust)}."


def _best_so_far(directory: RunDirectory, settings: Settings) -> Trial | None:
    """The trial that the selection rule would pick now, if there is any."""
    try:
        result = Result.read(directory)
    except InputError:  # the result is missing or damaged
        return None
    front = [trial for trial in result.trials if trial.number in result.front]
    objectives = result.objectives_or_default()
    return parse_rule(settings.search.select, settings.search.select_max_kl, objectives).preview(front)
