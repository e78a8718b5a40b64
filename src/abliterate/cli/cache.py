"""What the commands on the cache do: list, clear and check its entries."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from abliterate.artifacts.cache import ArtifactStore, Entry, default_root
from abliterate.errors import AbliterateError, InputError
from abliterate.settings.sources import load_settings
from abliterate.terminal import json_lines
from abliterate.terminal.quantities import bytes_text
from abliterate.terminal.reporters import ask_yes, make_reporter
from abliterate.terminal.tables import print_table


def cache_root(cache_dir: str) -> Path:
    """Where the cache lies: the option, else the settings (environment included)."""
    if cache_dir:
        return default_root(cache_dir)
    settings = load_settings()
    return default_root(settings.efficiency.residual_cache_dir or settings.cache_dir)


def cache_ls(cache_dir: str, *, as_json: bool) -> None:
    """`abliterate cache ls`."""
    entries = list(_store(cache_dir, as_json=as_json).entries())
    if as_json:
        records = [{"kind": e.kind, "of": e.label, "bytes": e.size, "created": e.created, "digest": e.digest} for e in entries]
        json_lines.emit("result", entries=records)
        return
    rows = [(entry.kind, entry.label, bytes_text(entry.size), _age(entry.created), entry.digest[:12]) for entry in entries]
    print_table(("kind", "of", "size", "age", "entry"), rows)
    print(f"{len(entries)} entries, {bytes_text(sum(entry.size for entry in entries))}")


def cache_clear(cache_dir: str, model: str, older_than: float, *, yes: bool) -> None:
    """`abliterate cache clear`."""
    store = _store(cache_dir)

    def wanted(entry: Entry) -> bool:
        old = time.time() - entry.created >= older_than * 86400
        return old and (not model or entry.key.get("model") == model)

    filtered = bool(model or older_than)
    entries = [entry for entry in store.entries() if wanted(entry)]
    leftovers = [] if filtered else store.leftovers()
    if not entries and not leftovers:
        print("nothing to clear")
        return
    what = f"{len(entries)} entries" + (f" and {len(leftovers)} unusable files" if leftovers else "")
    if not yes:
        if not sys.stdin.isatty():
            raise InputError("Without a terminal nothing is asked; confirm with abliterate cache clear --yes.")
        total = bytes_text(sum(entry.size for entry in entries) + sum(path.stat().st_size for path in leftovers))
        if not ask_yes(f"Delete {what} ({total})?"):
            print("nothing was deleted")
            return
    _, freed = store.clear(wanted if filtered else None)
    print(f"deleted {what}, {bytes_text(freed)}")


def cache_verify(cache_dir: str) -> None:
    """`abliterate cache verify`."""
    store = _store(cache_dir)
    bad = list(store.verify())
    for path, reason in bad:
        print(f"{path.parent.name}/{path.name[:12]}: {reason}")
    if bad:
        raise AbliterateError(f"{len(bad)} cache entries are not usable; they are recomputed when needed.")
    print(f"{len(list(store.entries()))} entries are sound")


def _store(cache_dir: str, *, as_json: bool = False) -> ArtifactStore:
    warn: Callable[[str], None] = make_reporter(as_json=True).warn if as_json else print
    return ArtifactStore(cache_root(cache_dir), warn=warn)


def _age(created: float) -> str:
    seconds = max(0.0, time.time() - created)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
