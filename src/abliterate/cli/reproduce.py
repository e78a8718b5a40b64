"""`abliterate reproduce`: make a trial again from its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.cli.exit import ending_at_once, quiet_libraries
from abliterate.errors import InputError
from abliterate.export import check_kind
from abliterate.pipeline.reproduce import reproduce as pipeline_reproduce_reproduce
from abliterate.settings.sources import given_options
from abliterate.terminal.reporters import make_reporter


def reproduce_recipe(path: Path, model: str, given: Mapping[str, Any], kind: str, out: Path | None, *, as_json: bool) -> None:
    """`abliterate reproduce RECIPE`."""
    if kind:
        check_kind(kind)
    if out is not None and not str(out).strip("."):
        raise InputError("The current directory can't be an export; name a folder with --out.")
    quiet_libraries()
    reporter = make_reporter(as_json=as_json)
    message = "interrupted; an export that is written already isn't checked, so repeat the command."
    with ending_at_once(reporter, message, as_json=as_json):
        # The recipe or the command line names the model, never the environment.
        pipeline_reproduce_reproduce.reproduce(path, {**given_options(given), "model": model}, reporter, kind=kind, out=out)
