"""`abliterate cache`: list, clear and check the entries of the cache. As light at import as `cli`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abliterate.cli.options import CacheDir, Command, Json, for_filters, for_general
from abliterate.errors import AbliterateError, InputError

if TYPE_CHECKING:
    from abliterate.artifacts.cache import ArtifactStore, Entry

cache_app = typer.Typer(help="List, clear and check the cache of residuals, calibrations and baselines.", no_args_is_help=True)


@cache_app.command("ls", cls=Command)
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
def cache_clear(
    cache_dir: CacheDir = None,
    model: Annotated[str, for_filters("--model", help="Delete only entries of this model.")] = "",
    older_than: Annotated[float, for_filters("--older-than", help="Delete only entries older than this many days.")] = 0.0,
    yes: Annotated[bool, for_general("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete entries that the cache wrote; other files are left alone."""
    from abliterate.terminal.quantities import bytes_text
    from abliterate.terminal.reporters import ask_yes

    store = _store(cache_dir)

    def matches(entry: Entry) -> bool:
        is_old = time.time() - entry.created >= older_than * 86400
        return is_old and (not model or entry.key.get("model") == model)

    is_filtered = bool(model or older_than)
    entries = [entry for entry in store.entries() if matches(entry)]
    leftovers = [] if is_filtered else store.leftovers()
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
    _, freed = store.clear(matches if is_filtered else None)
    print(f"deleted {content}, {bytes_text(freed)}")


@cache_app.command("verify", cls=Command)
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Check the checksum of every entry. The exit code is 1 if an entry is not usable."""
    store = _store(cache_dir)
    unusable = list(store.verify())
    for path, reason in unusable:
        print(f"{path.parent.name}/{path.name[:12]}: {reason}")
    if unusable:
        raise AbliterateError(f"{len(unusable)} cache entries are not usable; they are recomputed when needed.")
    print(f"{len(list(store.entries()))} entries are sound")


@cache_app.command("path", cls=Command)
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


def _age(created: float) -> str:
    seconds = max(0.0, time.time() - created)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
