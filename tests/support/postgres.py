"""Start a PostgreSQL server (Debian's package) on loopback in a temporary folder, for tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

OWNER = "postgres"  # the server refuses to run as root


def binaries() -> Path | None:
    """The folder of the server's programs; None if it isn't installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    return Path(elsewhere).parent if elsewhere else None


class Server:
    """One server; each test has a database of its own."""

    def __init__(self, folder: Path) -> None:
        programs = binaries()
        assert programs is not None
        self._bin, self._data, self._log = programs, folder / "data", folder / "log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", OWNER, "--no-sync")
        self._options = f"-p {self.port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        self.start()

    def url(self, database: str, password: str = "") -> str:
        """The Optuna storage URL of a database."""
        return f"postgresql+psycopg://{OWNER}{':' + password if password else ''}@127.0.0.1:{self.port}/{database}"

    def make(self, database: str) -> str:
        """Make a new, empty database, and return its URL."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", OWNER, database)
        return self.url(database)

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._log), "-o", self._options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server, which cuts every connection."""
        self._run("pg_ctl", "-D", str(self._data), "-m", mode, "-w", "stop")

    def _run(self, program: str, *arguments: str) -> None:
        other = ["runuser", "-u", OWNER, "--"] if os.geteuid() == 0 else []
        subprocess.run(
            [*other, str(self._bin / program), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            cwd="/",
        )


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server during the `with` block."""
    with tempfile.TemporaryDirectory(prefix="abliterate-pg-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, OWNER)
        Path(name).chmod(0o755)
        made = Server(Path(name))
        try:
            yield made
        finally:
            made.stop("immediate")
