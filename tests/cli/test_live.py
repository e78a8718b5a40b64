"""`--live`: the address is told, the page shows what a run does, and Ctrl+C ends the serving of a finished run's page."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.cli import live
from abliterate.cli import run as cli_run
from abliterate.errors import AbliterateError, Interrupted
from abliterate.report import draw
from abliterate.report.live import Activity
from abliterate.settings.schema import Settings
from abliterate.terminal.interrupts import Interrupts
from abliterate.terminal.reporters import SilentReporter
from abliterate.types import Reporter
from support.browser import browser, chromium
from support.cli import QUICK, Invoke, assert_sentence, prompt_options, spawn
from support.reports import made_run, made_trials


class Noting(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, Mapping[str, Any]]] = []
        self.trials = 0

    def note(self, text: str, **fields: Any) -> None:
        self.notes.append((text, fields))

    def trial(self, *given: Any) -> None:
        self.trials += 1


def test_the_page_says_what_the_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "library", lambda: "")
    opened: list[str] = []
    monkeypatch.setattr(live, "shown", lambda address: contextlib.nullcontext(opened.append(address)))
    reporter, activity = Noting(), Activity()
    with live.beside(RunDirectory(tmp_path / "run"), reporter, activity, may_open=True) as told:
        assert reporter.notes == []  # a run that is refused opens no browser
        told.stage("load", "demo")
        told.stage("search")
        ((text, fields),) = reporter.notes
        address = fields["live"]
        assert text == f"live report: {address}"
        assert opened == [address]
        told.note("4 trials are kept from before", resumed=4)
        for trial in made_trials(9)[8:4:-2]:  # workers end out of order
            told.trial(trial, 12, True, None)
        told.progress(3, 9, "prompts")
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert "The run is at work: search · 3 of 9 prompts · 6 of 12 trials done." in answer.read().decode()
        assert reporter.trials == 2
        assert reporter.notes[1:] == [("4 trials are kept from before", {"resumed": 4})]
        monkeypatch.setattr("abliterate.report.live._LOOKING", 0)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (AbliterateError("No trial is better; give it more."), "No trial is better; give it more."),
        (Interrupted(), "It was interrupted; its terminal says how to continue it."),
        (OSError(28, "No space left on device"), "No space left on device; fix that and repeat the command"),
    ],
)
def test_the_page_says_why_a_run_has_ended_early(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "library", lambda: "")
    run, reporter, activity, last = made_run(tmp_path / "run", count=4), Noting(), Activity(), []

    def look(address: str) -> None:
        state: dict[str, Any] = {"running": True}
        while state["running"]:
            with urllib.request.urlopen(f"{address}data?version=1", timeout=20) as answer:
                state = json.load(answer)
        last.append(state["status"])

    with pytest.raises(type(error)), live.beside(run, reporter, activity, may_open=False) as told:  # noqa: PT012
        told.stage("search")
        address = reporter.notes[0][1]["live"]
        urllib.request.urlopen(address, timeout=20).close()
        looking = threading.Thread(target=look, args=(address,))
        looking.start()
        raise error
    looking.join(20)
    (status,) = last
    assert status.startswith(f"The run has ended early with 5 trials; this page stays as it is now. {said}")


def test_the_page_says_that_the_run_waits_for_a_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "library", lambda: "")
    reporter, said = Noting(), []

    def look(*given: Any) -> None:
        with urllib.request.urlopen(f"{reporter.notes[0][1]['live']}data", timeout=20) as answer:
            said.append(json.load(answer)["status"])

    def carried_out(settings: Settings, told: Reporter, *given: Any, choose: Any, **more: Any) -> Result:
        told.stage("refine")
        told.trial(made_trials(1)[0], 1, True, None)
        choose(None)
        told.stage("answers")
        look()
        monkeypatch.setattr("abliterate.report.live._LOOKING", 0)
        return Result()

    for place, stand_in in {"check_run": lambda *_, **__: None, "quiet_libraries": lambda: None, "chosen": look}.items():
        monkeypatch.setattr(cli_run, place, stand_in)
    monkeypatch.setattr(cli_run, "make_reporter", lambda **_: reporter)
    monkeypatch.setattr("abliterate.pipeline.run.run", carried_out)
    flags = cli_run.RunFlags(live=True, may_open=False)
    cli_run.carry_out(Settings(), RunDirectory(tmp_path / "run"), flags, Interrupts(), ask=True)
    assert said == [
        "The run waits for somebody to choose a trial at its terminal · 1 of 1 trials done.",
        "The run is at work: answers · 1 of 1 trials done.",
    ]


def test_a_browser_is_only_opened_on_a_desktop_and_never_told_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    pages: list[tuple[str, int, int]] = []
    opened = threading.Event()

    class Browser:
        def open(self, address: str) -> None:
            page = Path(url2pathname(urlsplit(address).path))
            told.append(address)
            pages.append((page.read_text(encoding="utf-8"), page.stat().st_mode & 0o777, page.parent.stat().st_mode & 0o777))
            opened.set()

    monkeypatch.setattr("webbrowser.get", Browser)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    address = "http://127.0.0.1:9/secret/"
    with live.shown(address):
        assert not opened.wait(0.1)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SSH_CONNECTION", "a b")
    with live.shown(address):
        assert not opened.wait(0.1)
    monkeypatch.delenv("SSH_CONNECTION")
    with live.shown(address):
        assert opened.wait(20)
    ((text, mode, folder_mode),) = pages
    assert told[0].startswith("file:")
    assert "secret" not in told[0]
    assert f'content="0;url={address}"' in text
    assert (mode, folder_mode) == (0o600, 0o700)
    assert not Path(url2pathname(urlsplit(told[0]).path)).parent.exists()

    def full(**given: Any) -> Any:
        raise OSError("no room")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with live.shown(address):  # the printed address is left
        assert len(told) == 1


def test_what_live_cant_be_given_with(invoke: Invoke, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", count=4)
    assert_sentence(invoke("report", run.path, "--live", "--png", tmp_path), 2, "--live", "leave --png and --terminal out")
    assert_sentence(invoke("report", run.path, "--live", "--terminal"), 2, "--live")
    assert_sentence(invoke("report", tmp_path / "none", "--live"), 2, "no run")


def test_ctrl_c_ends_the_serving(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", count=4)
    process = spawn(["report", run.path, "--live", "--no-open"], tmp_path)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        with urllib.request.urlopen(f"{address}data", timeout=20) as answer:
            assert b"The run has ended with 5 trials" in answer.read()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0  # it is how one ends it
    assert "Traceback" not in err
    assert "error" not in err
    assert "the live report has ended; the run itself isn't affected." in " ".join(err.split())
    assert not run.report.exists()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None and "CI" not in os.environ, reason="needs Chromium")
def test_trials_of_a_real_run_appear_in_a_browser(prompt_files: dict[str, str], tmp_path: Path) -> None:
    options = [*prompt_options(prompt_files), *QUICK, "-n", "12", "-o", "run", "--export", "none", "--live", "--no-open"]
    process = spawn(["run", "demo", *options], tmp_path)
    try:
        assert process.stdout is not None
        address = next(line.split()[2] for line in process.stdout if line.startswith("live report: "))
        with browser() as tab:
            tab.open(address)
            tab.evaluate("window.sameDocument = true")
            points = "document.querySelectorAll('#plot-front .mark-symbol.role-mark path').length"
            tab.wait(f"{points} > 1", timeout=60)
            first = tab.evaluate(points)
            process.communicate(timeout=300)
            tab.wait("document.getElementById('live-status').dataset.running === 'false'")
            tab.wait(f"{points} === 13")  # with the base model
            assert first < 13
            assert tab.evaluate("document.getElementById('live-status').textContent").startswith("The run has ended with 12")
            assert tab.evaluate("document.querySelectorAll('#answers article').length") > 0
            assert tab.evaluate("window.sameDocument") is True
            assert tab.errors == []
    finally:
        process.kill()
    assert process.returncode == 0
