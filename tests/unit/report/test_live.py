"""The live report: it serves one page and its data, under loopback names only, and grows in a browser as a run goes on."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from abliterate.artifacts.run_directory import LOCK, RunDirectory
from abliterate.files import drop_lock, take_lock, write_json
from abliterate.report import draw
from abliterate.report import live as live_module
from abliterate.report.live import Activity, LiveReport
from support.browser import browser, chromium
from support.reports import PICTURES, made_run


@pytest.fixture(autouse=True)
def _pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "_drawn", PICTURES.drawn)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = made_run(tmp_path / "run", count=24)
    directory.journal.touch()
    return directory


@pytest.fixture
def address(run: RunDirectory) -> Iterator[str]:
    with LiveReport(run, Activity("search")).serving() as found:
        yield found


def ask(address: str, path: str | None = None, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request; by default of the page, under the name of the address."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    try:
        connection.request(method, parts.path if path is None else path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def keep_trials(run: RunDirectory, count: int) -> None:
    """Let `result.json` have the first trials of a made-up run alone, as if it had come no further."""
    kept = run.path / "whole.json"
    if not kept.exists():
        kept.write_bytes(run.result.read_bytes())
    record = json.loads(kept.read_text(encoding="utf-8"))
    trials = record["trials"][:count]
    numbers = {trial["number"] for trial in trials if trial["scores"]}
    write_json(run.result, record | {"trials": trials, "front": [n for n in record["front"] if n in numbers], "selected": None})


def test_only_the_page_and_its_data_are_served(run: RunDirectory, address: str) -> None:
    home = urlsplit(address).path
    assert len(home) > 20
    status, headers, page = ask(address)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert "connect-src 'self'" in page
    assert "The run is at work: search." in page
    status, _, text = ask(address, f"{home}data?version=0")
    assert status == 200
    assert json.loads(text)["sections"]
    for path in ("/", home[:-1], f"{home}..", f"{home}../run/result.json", f"{home}result.json", "/data", f"{home}data/"):
        assert ask(address, path)[0] == 404, path
    for absolute in (str(run.result), "//etc/passwd", f"{home}%2e%2e/result.json", f"/{'x' * 22}/"):
        assert ask(address, absolute)[0] == 404, absolute


def test_other_names_and_other_methods_are_refused(address: str) -> None:
    port = urlsplit(address).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost.", "[::1]", "", "localhost:x"):
        status, _, body = ask(address, Host=host)
        assert status == 403, host
        assert "Kullback" not in body
    assert ask(address, Host="localhost:8888")[0] == 200  # the other end of a tunnel
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        status, headers, _ = ask(address, method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert ask(address, method="BREW")[0] == 501
    status, headers, body = ask(address, method="HEAD")
    assert (status, body) == (200, "")
    assert int(headers["Content-Length"]) > 10_000


def test_the_page_is_made_when_it_is_asked_for_and_something_changed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    gather = live_module.gather

    def counted(*given: Any, **more: Any) -> Any:
        made.append(1)
        return gather(*given, **more)

    monkeypatch.setattr(live_module, "gather", counted)
    monkeypatch.setattr(live_module, "_SHARE", 1e9)  # no pause between two builds
    keep_trials(run, 3)
    live = LiveReport(run, activity := Activity("search", trials="3 of 24 trials", step="2 of 9 prompts"))
    assert made == []
    first = live.data(None)
    assert first["status"] == "The run is at work: search · 2 of 9 prompts · 3 of 24 trials done."
    assert "sections" not in live.data(first["version"])
    assert len(made) == 1
    keep_trials(run, 4)
    second = live.data(first["version"])
    assert second["version"] == first["version"] + 1
    points = [len(state["plots"]["front"]["layer"][1]["data"]["values"]) for state in (first, second)]
    assert points == [4, 5]  # with the base model
    assert len(made) == 2
    run.result.write_text("{", encoding="utf-8")
    torn = live.data(second["version"])
    assert "can't be read" in torn["status"]
    assert torn["plots"] == second["plots"]  # the last good content stays
    keep_trials(run, 25)
    activity.ended = True
    last = live.data(None)
    assert last["running"] is False
    assert last["status"] == "The run has ended with 25 trials; this page stays as it is now."
    assert "hasn't come to this" not in json.dumps(last["sections"])


def test_many_trials_dont_take_more_than_a_small_part_of_the_time(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "_SHARE", 1e-9)
    keep_trials(run, 3)
    live = LiveReport(run, activity := Activity())
    version = live.data(None)["version"]
    keep_trials(run, 4)
    assert live.data(version)["version"] == version  # later
    activity.ended = True
    assert live.data(version)["version"] == version + 1  # the end isn't kept back


def test_the_end_waits_until_a_browser_has_the_last_state(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveReport(run, Activity())
    live.finish()  # nobody has ever asked
    held, let_go = threading.Event(), threading.Event()
    send = live_module._Handler._send

    def slow(handler: Any, *given: Any, **more: Any) -> None:
        if activity.ended:
            held.set()
            assert let_go.wait(20)
        send(handler, *given, **more)

    monkeypatch.setattr(live_module._Handler, "_send", slow)
    live = LiveReport(run, activity := Activity())
    with live.serving() as address:
        assert json.loads(ask(f"{address}data")[2])["running"]
        ending = threading.Thread(target=live.finish)
        ending.start()
        while not activity.ended:
            ending.join(0.01)
        asking = threading.Thread(target=ask, args=(f"{address}data",))
        asking.start()
        assert held.wait(20)
        ending.join(0.3)
        assert ending.is_alive()  # the answer is made and not sent
        let_go.set()
        asking.join(20)
        ending.join(3)
        assert not ending.is_alive()


def test_a_run_of_another_process_works_while_it_holds_its_lock(run: RunDirectory) -> None:
    live = LiveReport(run)
    lock = take_lock(run.path / LOCK)
    try:
        assert run.at_work
        working = live.data(None)
        assert working["running"]
        assert working["status"] == "The run is at work: 25 trials have finished."
    finally:
        drop_lock(lock, run.path / LOCK)
    assert not run.at_work
    assert not live.data(working["version"])["running"]


def test_a_page_keeps_what_it_shows_when_the_run_is_gone(run: RunDirectory) -> None:
    live = LiveReport(run)
    shown = live.data(None)
    run.path.rename(run.path.with_name("elsewhere"))
    state = live.data(None)
    assert state["sections"] == shown["sections"]
    assert "There is no run" in state["status"]


def test_a_run_that_has_written_nothing_has_a_page(tmp_path: Path) -> None:
    live = LiveReport(RunDirectory(tmp_path / "run"), Activity("load", step="3 of 9 files"))
    page = live.page(live.data(None))
    assert "No trial has finished yet." in page
    assert "The run is at work: load · 3 of 9 files." in page
    assert "--resume" not in page.partition("<script")[0]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None and "CI" not in os.environ, reason="needs Chromium")
def test_trials_appear_in_the_browser_where_the_reader_left_the_page(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "_SHARE", 1e9)
    keep_trials(run, 6)
    live = LiveReport(run, activity := Activity("search", trials="6 of 24 trials"))
    with live.serving() as address, browser() as tab:
        tab.open(address, width=1000, height=500)
        points = "document.querySelectorAll('#plot-front .mark-symbol.role-mark path').length"
        drawn = "document.documentElement.dataset.drawn !== undefined"
        tab.wait(f"{drawn} && {points} === 7")
        tab.evaluate("window.sameDocument = true")
        fold = "[...document.querySelectorAll('#front details')].find((one) => /^All/.test(one.textContent))"
        tab.evaluate(f"{fold}.open = true")
        tab.evaluate("document.getElementById('layer').value = 3")
        tab.evaluate("document.querySelector('#geometry figure').scrollIntoView({behavior: 'instant'})")
        top = "document.querySelector('#geometry figure').getBoundingClientRect().top"
        before = tab.evaluate(top)
        version = live.data(None)["version"]
        keep_trials(run, 12)  # the open table above the reader's place grows
        activity.trials = "12 of 24 trials"
        tab.wait(f"document.documentElement.dataset.version === '{version + 1}' && {points} === 13")
        assert tab.evaluate(f"{fold}.open") is True
        assert tab.evaluate(f"{fold}.querySelectorAll('tbody tr').length") == 12
        assert tab.evaluate("document.getElementById('layer').value") == "3"
        assert abs(tab.evaluate(top) - before) < 2
        assert "12 of 24 trials" in tab.evaluate("document.getElementById('live-status').textContent")
        keep_trials(run, 25)
        live.finish()
        tab.wait("document.getElementById('live-status').dataset.running === 'false'")
        assert tab.evaluate("window.sameDocument") is True  # nothing was loaded again
        assert tab.errors == []
        assert {urlsplit(one).netloc for one in tab.requests if not one.startswith("data:")} == {urlsplit(address).netloc}
        asked = len(tab.requests)
        tab.evaluate("new Promise((done) => setTimeout(done, 2000))")
        assert len(tab.requests) == asked  # the page has stopped asking
