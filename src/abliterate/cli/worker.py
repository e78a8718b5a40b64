"""`abliterate worker`: join a run that is in progress."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.cli.exit import for_lines_alone, quiet_libraries
from abliterate.errors import Interrupted
from abliterate.pipeline import workers
from abliterate.settings.sources import absolute_database, options_of
from abliterate.terminal import json_lines
from abliterate.terminal.interrupts import Interrupts, end_with
from abliterate.terminal.reporters import make_reporter


def work(
    run_directory: Path | None,
    url: str,
    study: str,
    own: Mapping[str, Any],
    assignments: list[str],
    *,
    as_json: bool,
    end_with_input: bool = False,
) -> None:
    """`abliterate worker`. With `end_with_input` it ends when its standard input does, which is a pipe from the run."""
    options = options_of(own, assignments)
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    interrupts = Interrupts()
    message = "interrupted; the run and its other workers continue, and repeat this worker's last trial."
    try:
        with interrupts.listening(), for_lines_alone(as_json=as_json):
            if end_with_input:
                end_with(sys.stdin.fileno())
            place = (run_directory, absolute_database(url), study)
            trials = workers.work(*place, options, interrupts.watched(reporter), check=interrupts.check)
        if as_json:
            json_lines.emit("result", trials=trials)
        else:
            reporter.note(f"the run has its {trials} trials")
    except Interrupted as error:
        raise Interrupted(error.exit_code, message) from error
    except KeyboardInterrupt as error:
        raise Interrupted.by(error, message) from error
    finally:
        reporter.close()
