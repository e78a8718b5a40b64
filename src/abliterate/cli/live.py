"""`--live`: show a run's report in a browser while the run goes on, for `abliterate run` and `abliterate report`."""

from __future__ import annotations

import contextlib
import html
import os
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli.exit import ending_at_once, explain
from abliterate.errors import INTERRUPTED, Interrupted
from abliterate.report.live import Activity, LiveReport
from abliterate.terminal.reporters import SilentReporter
from abliterate.terminal.tables import printable
from abliterate.types import Reporter, Trial


def watch(path: Path, *, may_open: bool) -> None:
    """`abliterate report RUN --live`: serve the report of a run, which another process may be working on, until Ctrl+C.

    Raises:
        InputError: there is no run, or its `result.json` is damaged. Interrupted: by SIGTERM.
    """
    directory = RunDirectory(path)
    doubt = Result.so_far(directory).doubt
    if doubt:
        print(f"warning: {printable(doubt)}", file=sys.stderr)
    try:
        with (
            ending_at_once(SilentReporter(), "the live report has ended; the run itself isn't affected."),
            LiveReport(directory).serving() as address,
            contextlib.ExitStack() as until_the_end,
        ):
            print(f"live report: {address} (Ctrl+C ends it)", flush=True)
            if may_open:
                until_the_end.enter_context(shown(address))
            while True:
                time.sleep(1)
    except Interrupted as ended:
        if ended.exit_code != INTERRUPTED:
            raise
        print(ended, file=sys.stderr)  # Ctrl+C is how one ends it, so it is no error


@contextlib.contextmanager
def beside(directory: RunDirectory, reporter: Reporter, activity: Activity, *, may_open: bool) -> Iterator[Reporter]:
    """Serve the report of the run that the block carries out with the reporter that it is given, which tells `activity`.

    The address is told when the run's first stage begins, so that a run that is refused opens no browser.
    """
    live = LiveReport(directory, activity)
    with live.serving() as address, contextlib.ExitStack() as until_the_end:

        def begin() -> None:
            reporter.note(f"live report: {address}", live=address)
            if may_open:
                until_the_end.enter_context(shown(address))

        told = _Told(reporter, activity, begin)
        # The second Ctrl+C is a KeyboardInterrupt, which ends the run at once, so the page isn't waited for.
        try:
            yield cast(Reporter, told)
        except Interrupted:
            live.finish("It was interrupted; its terminal says how to continue it.")
            raise
        except Exception as error:
            sentence, _ = explain(error)
            live.finish(sentence[:1].upper() + sentence[1:])
            raise
        live.finish()


@contextlib.contextmanager
def waiting(activity: Activity, what: str) -> Iterator[None]:
    """While the block runs, the page says that the run waits for `what`."""
    activity.waits = what
    try:
        yield
    finally:
        activity.waits = ""


@contextlib.contextmanager
def shown(address: str) -> Iterator[None]:
    """Open the address in the desktop's browser, if a person sits at a terminal of a desktop; else do nothing.

    Every user of a machine can read the command lines of all processes, so the browser isn't given the address, which has a
    secret part. It is given a file that only this user can read and that leads to the address; the file is there while the
    block runs. Where it can't be written, no browser is opened.
    """
    on_desktop = os.name == "nt" or sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    if not (sys.stdout.isatty() and on_desktop) or "SSH_CONNECTION" in os.environ:
        yield
        return
    with contextlib.ExitStack() as kept:
        with contextlib.suppress(OSError):
            folder = tempfile.TemporaryDirectory(prefix="abliterate-live-", ignore_cleanup_errors=True)
            way = _way_to(address, Path(kept.enter_context(folder)))
            # Some browsers return only when they are closed.
            threading.Thread(target=_open, args=(way.as_uri(),), daemon=True, name="open the live report").start()
        yield


def _way_to(address: str, folder: Path) -> Path:
    """A page in `folder`, readable by this user alone, that leads a browser to the address."""
    page = folder / "live.html"
    page.touch(0o600)
    link = html.escape(address)
    page.write_text(
        f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0;url={link}">'
        f'<title>abliterate</title><a href="{link}">The live report</a>\n',
        encoding="utf-8",
    )
    return page


def _open(address: str) -> None:
    with contextlib.suppress(webbrowser.Error, OSError):
        browser = webbrowser.get()
        # A browser for terminals would take the run's terminal.
        if type(browser) is not webbrowser.GenericBrowser:
            browser.open(address)


class _Told:
    """The reporter, which tells `activity` what the run does; `begin` is called at the first stage."""

    def __init__(self, reporter: Reporter, activity: Activity, begin: Callable[[], None]) -> None:
        self._reporter, self._activity, self._begin = reporter, activity, begin
        self._begun = False
        # Of all sessions of the run. A trial's number doesn't tell, because trials of several workers end out of order.
        self._done = 0

    def stage(self, name: str, detail: str = "", *, at_once: bool = False) -> None:
        if not self._begun:
            self._begun = True
            self._begin()
        self._activity.stage, self._activity.step = f"{name} ({detail})" if detail else name, ""
        self._reporter.stage(name, detail, at_once=at_once)

    def progress(self, done: int, total: int, unit: str) -> None:
        self._activity.step = f"{done} of {total} {unit}"
        self._reporter.progress(done, total, unit)

    def note(self, text: str, **fields: Any) -> None:
        self._done += fields.get("resumed", 0)
        self._reporter.note(text, **fields)

    def trial(self, trial: Trial, total: int, front: bool, best: Trial | None) -> None:
        self._done += 1
        self._activity.trials, self._activity.step = f"{self._done} of {max(self._done, total)} trials", ""
        self._reporter.trial(trial, total, front, best)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)
