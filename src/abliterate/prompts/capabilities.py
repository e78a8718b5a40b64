"""The prompt sets of capabilities that directions spare: built-in ones by name, and a person's own as any prompt source.

`plain` holds everyday prompts, from which each capability's residuals are told apart.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from abliterate.errors import InputError
from abliterate.prompts.files import parse_source, public_source
from abliterate.settings.schema import CAPABILITIES, Settings

PLAIN = "plain"


def capability_sources(settings: Settings) -> dict[str, str]:
    """{name: source} of the capabilities in `directions.protect`, with the plain set first; empty if none is protected.

    Raises:
        InputError: an entry is neither a built-in capability nor a source of prompts, or two entries have one name.
    """
    sources: dict[str, str] = {}
    for entry in settings.directions.protect:
        name = entry if entry in CAPABILITIES else public_source(entry)
        if name in sources or name == PLAIN:
            raise InputError(
                f"The setting directions.protect has two sets named {name!r}, of which one may be the plain set; leave one of "
                "them out, or rename its file."
            )
        sources[name] = _built_in(entry) if entry in CAPABILITIES else _own(entry)
    return {PLAIN: _built_in(PLAIN), **sources} if sources else {}


def _built_in(name: str) -> str:
    return str(Path(__file__).parent / "capabilities" / f"{name}.txt")


def _own(entry: str) -> str:
    try:
        parse_source(entry)
    except InputError as error:
        near = difflib.get_close_matches(entry, CAPABILITIES, n=1)
        if "/" in entry or ":" in entry or "." in entry:
            raise
        remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(CAPABILITIES)}, or give a prompt file."
        raise InputError(f"There is no capability {entry!r} to protect; {remedy}") from error
    return entry
