"""A PostgreSQL server of our own on loopback, in a temporary folder: Debian's package, started and stopped by tests."""

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
    """Where the server's programs are; None where it isn't installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    return Path(elsewhere).parent if elsewhere else None


class Server:
    """One server; databases of tests are apart."""

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
        """A new, empty database: its URL."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", OWNER, database)
        return self.url(database)

    def start(self) -> None:
        """Returns when it answers."""
        self._run("pg_ctl", "-D", str(self._data), "-l", str(self._log), "-o", self._options, "-w", "start")

    def stop(self, mode: str = "fast") -> None:
        """Cuts every connection."""
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
    """A running server; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="abliterate-pg-") as name:
        if os.geteuid() == 0:
            shutil.chown(name, OWNER)
        Path(name).chmod(0o755)
        made = Server(Path(name))
        try:
            yield made
        finally:
            made.stop("immediate")
