"""Run command lines one after the other in a process of their own, and print how each ended and what it had imported.

`python early.py TABLE.json` reads a list of argument lists, and prints one JSON line for each: its exit code, its two outputs,
the seconds of processor time it took, and which heavy packages were imported by then.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "datasets")


def main() -> None:
    sys.modules["psycopg"] = None  # type: ignore[assignment]  # as if the extra for PostgreSQL weren't installed
    from abliterate.cli import app

    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        out, err = io.StringIO(), io.StringIO()
        begun, code = time.process_time(), None
        sys.argv = ["abliterate", *arguments]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app.main()
            except SystemExit as ended:
                code = ended.code or 0
        seconds = time.process_time() - begun
        record = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": seconds}
        print(json.dumps({**record, "heavy": [name for name in HEAVY if name in sys.modules]}), flush=True)


if __name__ == "__main__":
    main()
