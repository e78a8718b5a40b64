"""What other commands take of the settings that a run has stored. A run may come from anybody: nothing of it runs code here.

Left out, unless a person asks for it in the same command: scorers in files, code that a model brings along, and attention
kernels from the Hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.objectives import is_custom, public, split
from abliterate.settings.schema import Settings

# What a measurement of a run's trial depends on. The rest is the run's own affair: its search, its export, its machine.
_MEASURED = ("seed", "prompts", "response", "directions", "edit")
_EVALUATION = ("judge_model", "judge_label", "markers", "batch_size", "max_batch_size")
_NAMED = (("evaluation", "scorers"), ("evaluation", "heldout_scorers"), ("search", "objectives"))


def to_measure(stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Of a run's settings what its trials are measured with, and the scorers in files that are left out."""
    found = {name: stored[name] for name in _MEASURED if name in stored}
    if "load" in stored:
        found["load"] = _load(stored, {})
    found["evaluation"] = {name: part for name, part in _section(stored, "evaluation").items() if name in _EVALUATION}
    skipped: list[str] = []
    for section, name in _NAMED:
        given = _section(stored, section).get(name)
        if isinstance(given, list):
            texts = [str(text) for text in given]
            built_in = [text for text in texts if not is_custom(text)]
            skipped += [split(text)[0] for text in texts if is_custom(text)]
            if built_in:
                found.setdefault(section, {})[name] = built_in
    return found, list(dict.fromkeys(skipped))


def distrusted(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings with what runs a model's own code switched off."""
    off = {"trust_remote_code": False, "attn_implementation": ""}
    return {**stored, "load": _load(stored, off)} if "load" in stored else dict(stored)


def without_own_scorers(settings: Settings) -> Settings:
    """The same with built-in scorers only."""
    evaluation = {name: tuple(n for n in getattr(settings.evaluation, name) if not is_custom(n)) for _, name in _NAMED[:2]}
    objectives = tuple(text for text in settings.search.objectives if not is_custom(text)) or ("kl",)
    return settings.model_copy(
        update={
            "evaluation": settings.evaluation.model_copy(update=evaluation),
            "search": settings.search.model_copy(update={"objectives": objectives}),
        }
    )


def scorers_note(skipped: list[str], settings: Settings) -> str:
    """What a person is told of scorers that were left out and that `settings` don't name; "" where there are none."""
    named = {*settings.scorers, *settings.evaluation.heldout_scorers}
    left = ", ".join(public(name) for name in skipped if name not in named)
    return left and (
        f"Scorers in files that the run names aren't run ({left}), since a run may come from anybody; name them with "
        "--set 'evaluation.heldout_scorers=[\"path/to/file.py:ClassName\"]'."
    )


def code_note(stored: Mapping[str, Any], settings: Settings, option: str = "--set load.trust_remote_code=true") -> str:
    """What a person is told of code that the run's model would bring along and that isn't run; "" where there is none."""
    load = _section(stored, "load")
    wanted = load.get("trust_remote_code") and not settings.load.trust_remote_code
    wanted = wanted or (_from_hub(load) and load["attn_implementation"] != settings.load.attn_implementation)
    return f"The run lets its model bring code along, which isn't run here unless you say so ({option})." if wanted else ""


def _load(stored: Mapping[str, Any], off: Mapping[str, Any]) -> Any:
    """The section `load`; what would run code is as in `off`, or left out."""
    load = stored["load"]
    if not isinstance(load, Mapping):  # the settings' own sentence says so
        return load
    left_out = ("trust_remote_code", *(("attn_implementation",) if _from_hub(load) else ()))
    kept = {name: value for name, value in load.items() if name not in left_out}
    return kept | {name: off[name] for name in left_out if name in off}


def _from_hub(load: Mapping[str, Any]) -> bool:
    """Whether the attention implementation is a kernel that is fetched: code, too."""
    return "/" in str(load.get("attn_implementation", ""))


def _section(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = stored.get(name)
    return part if isinstance(part, Mapping) else {}
