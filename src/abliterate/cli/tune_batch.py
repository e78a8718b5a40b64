"""`abliterate tune-batch`: measure batch sizes and print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.cli.exit import ending_at_once, quiet_libraries
from abliterate.pipeline.tune_batch import tune
from abliterate.settings.sources import load_settings, options_of
from abliterate.terminal import json_lines
from abliterate.terminal.quantities import bytes_text
from abliterate.terminal.reporters import make_reporter
from abliterate.terminal.tables import print_table


def tune_batch(given: Mapping[str, Any], config: str, assignments: list[str], *, as_json: bool) -> None:
    """`abliterate tune-batch`."""
    settings = load_settings(config, options_of(given, assignments))
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    message = "interrupted; batch sizes are kept only once all are measured, so repeat the command."
    with ending_at_once(reporter, message, as_json=as_json):
        tuning = tune(settings, reporter)
    if as_json:
        json_lines.emit("result", operations={tuned.operation: tuned.to_record() for tuned in tuning})
        return
    rows = []
    for tuned in tuning:
        for size, probe in sorted(tuned.probes.items()):
            cells = ("doesn't fit", "") if probe is None else (f"{probe.tokens_per_second:.0f}", bytes_text(probe.peak_bytes))
            rows.append((tuned.operation, str(size), *cells, "← chosen" if size == tuned.size else ""))
        if tuned.size not in tuned.probes:  # evened out after the probes, or taken over from another operation
            rows.append((tuned.operation, str(tuned.size), "", "", "← chosen"))
    print_table(("operation", "prompts at a time", "tokens/s", "memory", ""), rows, "Short passes over the longest prompts")
