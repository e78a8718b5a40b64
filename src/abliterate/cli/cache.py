"""`abliterate cache`: list, clear and check the entries of the cache. As light at import as `cli`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.command import Command, Debug, Group, prepared, show_tracebacks
from abliterate.cli.options import CacheDir, Json, for_filters, for_general
from abliterate.errors import AbliterateError, InputError
from abliterate.files import expanded

if TYPE_CHECKING:
    from abliterate.artifacts.cache import ArtifactStore, Entry

# Seconds by the unit of an age.
_UNITS = {"min": 60, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

cache_app = typer.Typer(
    help="List, clear and check the cache of residuals, calibrations and baselines.", no_args_is_help=True, cls=Group
)


@cache_app.callback()
def _cache(debug: Debug = False) -> None:
    show_tracebacks(debug)


@cache_app.command("ls", cls=Command)
@prepared
def cache_ls(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """List the entries with their model, size and age."""
    from abliterate.terminal import json_lines
    from abliterate.terminal.quantities import bytes_text
    from abliterate.terminal.tables import print_table

    entries = list(_store(cache_dir, as_json=as_json).entries())
    if as_json:
        records = [{"kind": e.kind, "of": e.label, "bytes": e.size, "created": e.created, "digest": e.digest} for e in entries]
        json_lines.emit("result", entries=records)
        return
    rows = [(entry.kind, entry.label, bytes_text(entry.size), _age(entry.created), entry.digest[:12]) for entry in entries]
    print_table(("kind", "of", "size", "age", "entry"), rows)
    print(f"{len(entries)} entries, {bytes_text(sum(entry.size for entry in entries))}")


@cache_app.command("clear", cls=Command)
@prepared
def cache_clear(
    cache_dir: CacheDir = None,
    model: Annotated[str, for_filters("--model", help="Delete only entries of this model: its name or its path.")] = "",
    older_than: Annotated[
        str, for_filters("--older-than", metavar="AGE", help="Delete only entries of at least this age, as in 12h or 7d.")
    ] = "",
    yes: Annotated[bool, for_general("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete entries that the cache wrote, damaged ones included; other files are left alone."""
    from abliterate.terminal.quantities import bytes_text
    from abliterate.terminal.reporters import ask_yes

    begun = time.time()
    age = _seconds(older_than) if older_than else 0.0
    name = _model_name(model) if model else ""
    store = _store(cache_dir)

    def is_old(created: float) -> bool:
        return not older_than or begun - created >= age  # without an age the clock doesn't matter

    def matches(entry: Entry) -> bool:
        return is_old(entry.created) and (not name or entry.key.get("model") == name)

    entries = [entry for entry in store.entries() if matches(entry)]
    # Nobody knows of which model a damaged file is.
    leftovers = [] if name else [path for path in store.leftovers() if is_old(path.stat().st_mtime)]
    if not entries and not leftovers:
        print("nothing to clear")
        return
    content = f"{len(entries)} entries" + (f" and {len(leftovers)} unusable files" if leftovers else "")
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("There is no terminal to ask on; confirm with abliterate cache clear --yes.")
        total = bytes_text(sum(entry.size for entry in entries) + sum(path.stat().st_size for path in leftovers))
        if not ask_yes(f"Delete {content} ({total})?"):
            print("nothing was deleted")
            return
    _, freed = store.clear(matches, leftovers)
    print(f"deleted {content}, {bytes_text(freed)}")


@cache_app.command("verify", cls=Command)
@prepared
def cache_verify(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """Check the checksum of every entry. The exit code is 1 if an entry is not usable."""
    from abliterate.terminal import json_lines

    store = _store(cache_dir, as_json=as_json)
    unusable = list(store.verify())
    damaged = {path.stem for path, _ in unusable}
    sound = sum(entry.digest not in damaged for entry in store.entries())
    if as_json:
        records = [{"kind": path.parent.name, "digest": path.stem, "reason": reason} for path, reason in unusable]
        json_lines.emit("result", sound=sound, unusable=records)
    for path, reason in [] if as_json else unusable:
        print(f"{path.parent.name}/{path.name[:12]}: {reason}")
    if unusable:
        raise AbliterateError(
            f"{len(unusable)} cache entries are not usable; they are recomputed when needed, and abliterate cache clear "
            "deletes them with all others."
        )
    if not as_json:
        print(f"{sound} entries are sound")


@cache_app.command("path", cls=Command)
@prepared
def cache_path(cache_dir: CacheDir = None) -> None:
    """Print the folder of the cache."""
    print(cache_root(cache_dir))


def cache_root(cache_dir: str | None) -> Path:
    """The folder of the cache: the option's, else that of the settings (environment included)."""
    from abliterate.artifacts.cache import default_root
    from abliterate.settings.sources import load_settings

    if cache_dir:
        return default_root(cache_dir)
    settings = load_settings()
    return default_root(settings.efficiency.residual_cache_dir or settings.cache_dir)


def _store(cache_dir: str | None, *, as_json: bool = False) -> ArtifactStore:
    from abliterate.artifacts.cache import ArtifactStore
    from abliterate.terminal.reporters import make_reporter

    warn: Callable[[str], None] = make_reporter(as_json=True).warn if as_json else print
    return ArtifactStore(cache_root(cache_dir), warn=warn)


def _seconds(text: str) -> float:
    """An age like 12h or 7d in seconds; a number alone counts days."""
    # Units are lower-case: who writes 3M means months, and would delete everything older than three minutes.
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text)
    unit = _UNITS.get(match[2] or "d") if match else None
    if match is None or unit is None:
        raise InputError(f"The option --older-than needs an age from 0 up, like 12h, 7d or 30 (days), not {text!r}.")
    return float(match[1]) * unit


def _model_name(model: str) -> str:
    """The name under which entries of a model are kept, which of a path is the last part, also if it is gone."""
    path = expanded(model)
    is_path = path.is_dir() or path.is_absolute() or model.startswith(".")
    return path.resolve().name if is_path and model != "demo" else model


def _age(created: float) -> str:
    seconds = max(0.0, time.time() - created)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
