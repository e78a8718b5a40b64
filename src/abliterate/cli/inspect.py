"""`abliterate inspect`: print a model's facts, its editable modules, and the needs of a run on it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from abliterate.cli.exit import ending_at_once, quiet_libraries
from abliterate.pipeline import inspect as pipeline_inspect
from abliterate.report.tables import coverage_table
from abliterate.settings.sources import load_settings, options_of
from abliterate.terminal import json_lines
from abliterate.terminal.quantities import in_words
from abliterate.terminal.reporters import make_reporter
from abliterate.terminal.tables import show_table


def inspect(given: Mapping[str, Any], config: str, assignments: list[str], *, weights: bool, as_json: bool) -> None:
    """`abliterate inspect`."""
    settings = load_settings(config, options_of(given, assignments))
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    with ending_at_once(reporter, "interrupted; nothing was changed.", as_json=as_json):
        record = pipeline_inspect.inspect(settings, reporter, weights=weights)
    if as_json:
        json_lines.emit("result", **record)
        return
    words, on_terminal = in_words(record), sys.stdout.isatty()
    if on_terminal:  # the table shows the other lines
        words["coverage"] = words["coverage"].splitlines()[0]
    whole, adapter = record["exports"]["merged"], record["exports"]["adapter"]
    streams = "streams the base's files" if whole is not None else "not known without the weight files"
    words["merged"] = f"loads and saves the whole model ({whole})" if whole else streams
    words["adapter"] = f"not possible: {adapter}" if adapter else "possible"
    reporter.header(words)
    if on_terminal:
        show_table(coverage_table(record["coverage"]))
