"""`abliterate doctor`: check this installation and machine, and say what to do about each part that isn't well.

It changes nothing, asks no network, and shows no secret: of a token only whether there is one.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from abliterate.artifacts.runs import RUNS
from abliterate.cli.cache import cache_root
from abliterate.errors import AbliterateError, InputError, disk_remedy, first_line, install_extra
from abliterate.plugins import installed
from abliterate.settings.sources import load_settings
from abliterate.terminal import json_lines
from abliterate.terminal.quantities import bytes_text
from abliterate.terminal.tables import between_words, make_console, printable

State = Literal["ok", "note", "bad"]
_MARKS: dict[State, str] = {"ok": "✓", "note": "–", "bad": "✗"}
_PYTORCH = "install the torch build of your device from https://pytorch.org/get-started/locally"
# With less free space the smallest model's export fails; with less than the second figure that of a model of 3 to 7 billion.
_NO_ROOM, _LITTLE_ROOM = 2**30, 15 * 2**30
_LITTLE_MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Check:
    """One line: its subject, whether it is well, what was found, and what to do where it isn't ok.

    `note` is something that some uses need and others don't; `bad` makes runs fail.
    """

    name: str
    state: State
    value: str
    remedy: str = ""


def doctor(cache_dir: str | None, *, as_json: bool) -> None:
    """`abliterate doctor`.

    Raises:
        AbliterateError: a check is bad.
    """
    checks = []
    for check in _checks(cache_dir):
        checks.append(check)
        if not as_json:
            print(_line(check), flush=True)
    bad = [check.name for check in checks if check.state == "bad"]
    if as_json:
        json_lines.emit("result", well=not bad, checks=[asdict(check) for check in checks])
    if bad:
        raise AbliterateError(f"{len(bad)} of {len(checks)} checks failed ({', '.join(bad)}); follow the remedy of each.")
    if not as_json:
        print("all that a run needs is there")


def _line(check: Check) -> str:
    text = f"{_MARKS[check.state]} {check.name:<17} {check.value}"
    if not check.remedy:
        return printable(text)
    remedy = " " * 20 + printable(check.remedy)
    console = make_console()
    if console.is_terminal:
        remedy = between_words(remedy, console.width, " " * 20)
    return f"{printable(text)}\n{remedy}"


def _checks(cache_dir: str | None) -> Iterator[Check]:
    """All checks in the order in which they are shown."""
    yield Check("python", "ok", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    yield from _packages()
    yield from _devices()
    yield _memory()
    yield from _own_settings()
    yield _token()
    yield from _folders(cache_dir)


def _packages() -> Iterator[Check]:
    """The packages that abliterate needs, with their versions; then its extras."""
    # A dependency of transformers and of optuna.
    from packaging.requirements import Requirement

    try:
        version, texts = metadata.version("abliterate"), metadata.requires("abliterate") or []
        extras = metadata.metadata("abliterate").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Check(
            "abliterate", "bad", "not installed, only its source is here", "install it with pip install . in its folder"
        )
        return
    yield Check("abliterate", "ok", version)
    needed = [Requirement(text) for text in texts]
    for requirement in needed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement.name, str(requirement.specifier))
    for extra in extras:
        if extra == "dev":  # for the developers of abliterate
            continue
        names = [one for one in needed if one.marker is not None and one.marker.evaluate({"extra": extra})]
        found = [_package(one.name, str(one.specifier)) for one in names]
        value = ", ".join(f"{check.name} {check.value}" for check in found)
        missing = any(check.state == "bad" for check in found)
        remedy = f"only if you need it: {install_extra(extra)}" if missing else ""
        yield Check(f"extra {extra}", "note" if missing else "ok", value, remedy)


def _package(name: str, needed: str) -> Check:
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "bad", "not installed", f"pip install '{name}{needed}'")
    if not SpecifierSet(needed).contains(version, prereleases=True):
        return Check(name, "bad", f"{version}, but {needed} is needed", f"pip install '{name}{needed}'")
    return Check(name, "ok", version)


def _devices() -> Iterator[Check]:
    """The devices that torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch loads is missing
        yield Check("device", "bad", f"torch can't be imported ({first_line(error)})", _PYTORCH)
        return
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        if shutil.which("nvidia-smi") and not hidden:
            yield Check("device", "bad", f"there is an NVIDIA driver, but torch {torch.__version__} can't use it", _PYTORCH)
            return
        yield Check(
            "device",
            "note",
            f"cpu, {torch.get_num_threads()} threads; no accelerator",
            "a CPU is enough for the demo and small models; for larger ones use a machine with a GPU",
        )
        return
    for index in range(torch.accelerator.device_count()):
        name = f"{kind.type}:{index}"
        if kind.type == "cuda":
            facts = torch.cuda.get_device_properties(index)
            name += f" {facts.name}, {bytes_text(facts.total_memory)}"
        yield Check("device", "ok", name)


def _memory() -> Check:
    """Main memory, within the limit of a container."""
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    if "torch" in sys.modules:  # else it can't be imported, which another line says
        import torch

        from abliterate.model.memory import free_memory, total_memory

        total, free = total_memory(torch.device("cpu")), free_memory(torch.device("cpu"))
    value = f"{bytes_text(free)} of {bytes_text(total)} free"
    if free < _LITTLE_MEMORY:
        return Check(
            "memory", "note", value, "end other programs, or take a small model: abliterate inspect MODEL shows its need"
        )
    return Check("memory", "ok", value)


def _own_settings() -> Iterator[Check]:
    """Environment variables that are settings, and plugins."""
    try:
        load_settings()
        yield Check("settings", "ok", "defaults and environment can be read")
    except InputError as error:
        yield Check("settings", "bad", "can't be read", str(error))
    try:
        for plugin in installed():
            yield Check("plugin", "ok", plugin.title)
    except InputError as error:
        yield Check("plugin", "bad", "can't be used", str(error))


def _token() -> Check:
    """Whether there is a token for the Hub; its value goes nowhere."""
    from huggingface_hub import get_token

    if get_token():
        return Check("Hub token", "ok", "present")
    return Check("Hub token", "note", "absent", "only for gated models and --push: hf auth login, or set HF_TOKEN")


def _folders(cache_dir: str | None) -> Iterator[Check]:
    """The folders that runs write to: the current one's `runs/`, the cache, and the Hub's cache."""
    from huggingface_hub import constants

    yield _folder("runs", RUNS.absolute(), "start abliterate in another folder, or give --out")
    try:
        cache = cache_root(cache_dir)
    except InputError:  # the settings, which have a line of their own, can't be read
        cache = None
    if cache is not None:
        yield _folder("cache", cache, "give --cache-dir, or set ABLITERATE_CACHE_DIR", sized=True)
    hub = _folder("Hub cache", Path(constants.HF_HUB_CACHE), "set HF_HOME")
    yield replace(hub, state="note") if hub.state == "bad" else hub  # models and prompts may be local


def _folder(name: str, folder: Path, other: str, *, sized: bool = False) -> Check:
    """Whether a folder can be written to, and the free space there; `other` is how to name another folder.

    Folders that don't exist are not made: the folder in which they would be is looked at.
    """
    # `Path.exists` raises where a folder above may not be read.
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    value = str(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        reason = error.strerror or first_line(error)
        return Check(name, "bad", f"{value}: can't be written to ({reason})", f"{disk_remedy(error)}, or {other}")
    if sized:
        value += f" ({bytes_text(_size(folder))})" if os.path.exists(folder) else " (not yet made)"
    value += f", {bytes_text(free)} free"
    if free < _LITTLE_ROOM:
        return Check(
            name, "bad" if free < _NO_ROOM else "note", value, f"an export is as large as its model: free space, or {other}"
        )
    return Check(name, "ok", value)


def _size(folder: Path) -> int:
    """The bytes of all files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total
