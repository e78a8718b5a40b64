"""Write numbers for people: bytes, counts, durations, and the record of `abliterate inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The tokens of a prompt that are assumed if the prompts can't be read.
USUAL_TOKENS = 64


def in_words(record: Mapping[str, Any], *, arithmetic: bool = True) -> dict[str, str]:
    """The summary that a person sees, as {name: text}.

    The cost is a time where speeds are known, and else tokens and, unless `arithmetic` is off, operations.
    """
    model, coverage, memory, cost = (record[name] for name in ("model", "coverage", "memory", "cost"))
    weights = model["dtype"] + (f", {model['quantization']}" if model["quantization"] != "none" else "")
    size = f"{model['n_layers']} layers × {model['d_model']}, {_count(model['n_parameters'])}"
    edited = [group for group in coverage["groups"] if group["edited"]]
    each = ", ".join(f"{name} {bytes_text(operation['bytes_per_prompt'])}" for name, operation in memory["operations"].items())
    least, most = (bytes_text(memory["refinement"][name]) for name in ("checkpointed", "row"))
    at_most = f"{_count(cost['tokens']['run_at_most'])} tokens"
    if arithmetic:
        at_most += f", {_count(cost['flop']['run_at_most'])}FLOP"
    if cost["seconds"]:
        at_most = f"{duration_text(cost['seconds']['run_at_most'])} ({at_most})"
    words = {
        "model": f"{model['id']} ({model['family']}, {size})",
        "weights": f"{weights}, {bytes_text(memory['weights_bytes'])}",
        "device": record["device"]["name"],
        "memory": f"{record['device']['memory']}; a prompt takes {each}; a row of refinement {least} to "
        f"{most}; between trials {bytes_text(memory['kept_bytes'])}",
        "edits": f"{sum(group['layers'] for group in edited)} modules, {record['edit']['mode']} "
        f"({record['edit']['representation']})",
        "coverage": "\n".join([_share(coverage), *map(_group, coverage["groups"])]),
        "cost": f"at most {at_most}: {_purposes(cost)}",
    }
    return words | ({"assumed": f"{USUAL_TOKENS} tokens a prompt: {cost['assumed']}"} if cost["assumed"] else {})


def _purposes(cost: Mapping[str, Any]) -> str:
    """What the cost is for."""
    refinement = cost["tokens"]["refinement_at_most"]
    trials = f"{cost['trials']} trials, which usually take a fifth to half as long"
    if not refinement:
        return trials
    rest = f", the rest mostly for {trials}" if cost["trials"] else ""
    return f"{_count(refinement)} tokens for refinement{rest}"


def _share(coverage: Mapping[str, Any]) -> str:
    if coverage["untold"]:
        return f"unknown ({coverage['untold']})"
    share = coverage["share"]
    text = "100 %" if share == 1 else f"{min(99.9, 100 * share):.1f} %"
    return f"{text} of the parameters that write to the residual stream"


def _group(group: Mapping[str, Any]) -> str:
    shape = f" of {group['shape'][0]} × {group['shape'][1]}" if group["shape"] else ""
    matrices = f", {group['matrices']} matrices" if group["matrices"] != group["layers"] else ""
    size = f"{_count(group['parameters'])} parameters"
    text = f"{group['component']}: {group['path']} in {group['layers']} layers{matrices}{shape}, {size}"
    return text + (f", left out: {group['left_out']}" if group["left_out"] else "")


def _count(number: float) -> str:
    """A large number as a person reads it."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def bytes_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def duration_text(seconds: float) -> str:
    """A time as a person reads it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
