"""Serve a run's report to a browser on this machine while the run goes on: the page grows without being loaded again.

Only the page and its data can be read: by GET or HEAD, at an address with a secret part that only its printer knows, from the
loopback interface, and under a loopback name, so that no other site's page can reach it by a name of its own (DNS rebinding).
No part of a request becomes the name of a file. Whatever is shown is made only when a browser asks and something has changed.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.errors import InputError
from abliterate.report import draw
from abliterate.report.data import gather
from abliterate.report.page import content_of, live_page

_LOOPBACK = ("127.0.0.1", "localhost")
# Building takes at most this part of a run's time.
_SHARE = 0.05
# Seconds since a browser last asked after which none is thought to look, and the longest wait for its last request.
_LOOKING, _LAST = 6.0, 5.0
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


@dataclass
class Activity:
    """What a run in this process is doing; its reporter sets the fields, and the server's threads read them.

    `waits` is what it waits for, if it does. `reason` is the sentence that says why the run has ended early.
    """

    stage: str = "begins"
    step: str = ""
    trials: str = ""
    waits: str = ""
    ended: bool = False
    reason: str = ""

    @property
    def text(self) -> str:
        """`The run is at work: search · 40 of 100 prompts · 7 of 12 trials done.`"""
        doing = (f"The run waits for {self.waits}",) if self.waits else (f"The run is at work: {self.stage}", self.step)
        return " · ".join(filter(None, (*doing, f"{self.trials} done" if self.trials else ""))) + "."


@dataclass
class LiveReport:
    """The report of the run in `directory`, as a page and as the data of its updates.

    `activity` is None if the run belongs to another process; then the lock of its directory says whether it works.
    """

    directory: RunDirectory
    activity: Activity | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _version: int = 0
    _seen: object = None
    _content: dict[str, Any] = field(default_factory=dict)
    _fault: str = ""
    _count: int = 0
    _not_before: float = 0.0
    _library: str | None = None
    _asked: float = 0.0
    _knows_end: bool = False

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The address of the page, which is served while the block runs. OSError: the system gives no port."""
        secret = secrets.token_urlsafe(16)
        with _Server(("127.0.0.1", 0), partial(_Handler, self, f"/{secret}/")) as server:
            threading.Thread(target=server.serve_forever, args=(0.2,), daemon=True, name="live report").start()
            try:
                yield f"http://127.0.0.1:{server.server_port}/{secret}/"
            finally:
                server.shutdown()

    def finish(self, reason: str = "") -> None:
        """Say that the run has ended, and wait a few seconds for a browser that looks to take the last state of the page.

        `reason` is the sentence that says why it has ended early.
        """
        assert self.activity is not None
        self.activity.reason, self.activity.ended = reason, True
        until = time.monotonic() + _LAST
        while not self._knows_end and time.monotonic() - self._asked < _LOOKING and time.monotonic() < until:
            time.sleep(0.1)

    def page(self, state: Mapping[str, Any]) -> str:
        """The whole page in a state that `data(None)` has given."""
        with self._lock:
            if self._library is None:
                try:
                    self._library = draw.library()
                except draw.Undrawable:
                    self._library = ""
        return live_page(state, self._library, why="" if self._library else draw.unavailable())

    def data(self, known: int | None) -> dict[str, Any]:
        """The state of the page for a browser that has version `known`; without content if nothing has changed since then."""
        with self._lock:
            self._asked = time.monotonic()
            running = self.directory.at_work if self.activity is None else not self.activity.ended
            seen = (running, *map(_stamp, _sources(self.directory)))
            if seen != self._seen and (time.monotonic() >= self._not_before or not running or not self._version):
                self._build(running)
                self._seen = seen
            is_last = not running and seen == self._seen
            state = {"version": self._version, "running": not is_last, "status": self._status(running)}
            return state if known == self._version else state | self._content

    def sent(self, state: Mapping[str, Any]) -> None:
        """A browser has been sent this state; after the last one it needs no other."""
        self._knows_end = self._knows_end or not state["running"]

    def _build(self, running: bool) -> None:
        begun = time.thread_time()
        try:
            is_new = running and not self.directory.result.exists()
            result = Result() if is_new else Result.so_far(self.directory)
            self._content = content_of(gather(self.directory, result, unfinished=running))
            self._fault, self._count = "", len(result.trials)
        except InputError as error:
            self._fault = str(error)
            self._content = self._content or content_of(gather(self.directory, Result(), unfinished=True))
        self._version += 1
        self._not_before = time.monotonic() + (time.thread_time() - begun) / _SHARE

    def _status(self, running: bool) -> str:
        if self._fault:
            return self._fault
        if not running and self.activity is not None and self.activity.reason:
            return f"The run has ended early with {self._count} trials; this page stays as it is now. {self.activity.reason}"
        if not running:
            return f"The run has ended with {self._count} trials; this page stays as it is now."
        if self.activity is not None:
            return self.activity.text
        return f"The run is at work: {self._count} trials have finished."


def _sources(directory: RunDirectory) -> tuple[Any, ...]:
    """The files that the page is made of."""
    return directory.result, directory.settings, directory.geometry, directory.answers


def _stamp(path: Any) -> tuple[int, ...]:
    """Another value whenever a file has been replaced; a run replaces whole files."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a tab that is closed while it is answered is no error of the run."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; `home` is the path of the page, with the secret part."""

    timeout = 10  # seconds, for a client that opens a connection and says nothing

    def __init__(self, live: LiveReport, home: str, *args: Any) -> None:
        self._live, self._home = live, home
        super().__init__(*args)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD work here.", "text/plain", Allow="GET, HEAD")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_CONNECT = do_TRACE = _refuse

    def _answer(self) -> None:
        if not _is_loopback(self.headers.get_all("Host", [])):
            self._send(HTTPStatus.FORBIDDEN, "This page is only served under a loopback name.", "text/plain")
            return
        asked = urlsplit(self.path)
        kinds = {self._home: "text/html", f"{self._home}data": "application/json"}
        # Compared in constant time, because the path has a secret.
        found = [kind for path, kind in kinds.items() if secrets.compare_digest(path.encode(), asked.path.encode())]
        if not found:
            self._send(
                HTTPStatus.NOT_FOUND, "There is nothing here; use the address that abliterate has printed.", "text/plain"
            )
            return
        is_page = found == ["text/html"]
        state = self._live.data(None if is_page else _version_in(asked.query))
        self._send(HTTPStatus.OK, self._live.page(state) if is_page else _json(state), found[0])
        # Not earlier, or the run could end, and this thread with it, while the last state is on its way.
        if self.command != "HEAD":
            self._live.sent(state)

    def _send(self, status: HTTPStatus, text: str, kind: str, **headers: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        return "abliterate"

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log, which would tear the terminal's output."""


def _is_loopback(hosts: list[str]) -> bool:
    """Whether a request names one host, and that a loopback name; the port may be that of a tunnel."""
    return len(hosts) == 1 and re.fullmatch(rf"(?:{'|'.join(map(re.escape, _LOOPBACK))})(?::\d{{1,5}})?", hosts[0]) is not None


def _version_in(query: str) -> int | None:
    """The version that a browser says it has."""
    given = parse_qs(query).get("version", [""])[0]
    return int(given) if re.fullmatch(r"[0-9]{1,9}", given) else None


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
