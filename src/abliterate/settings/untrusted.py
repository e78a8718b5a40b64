"""Decide which of a run's stored settings other commands use. A run may come from anybody, so none of them may run code here.

Custom scorers, code that comes with a model, and attention kernels from the Hub are left out unless the user asks for them in
the same command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.objectives import is_custom, public, split
from abliterate.settings.schema import Settings

# The settings that a measurement of a run's trial depends on. The others concern the run's search, its export or its machine.
_MEASURED = ("seed", "prompts", "response", "directions", "edit")
_EVALUATION = ("judge_model", "judge_label", "markers", "batch_size", "max_batch_size")
_NAMED = (("evaluation", "scorers"), ("evaluation", "heldout_scorers"), ("search", "objectives"))


def to_measure(stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of a run's settings with which its trials are measured, and the custom scorers that are left out."""
    measured = {name: stored[name] for name in _MEASURED if name in stored}
    if "load" in stored:
        measured["load"] = _load(stored, {})
    measured["evaluation"] = {name: value for name, value in _section(stored, "evaluation").items() if name in _EVALUATION}
    skipped: list[str] = []
    for section, name in _NAMED:
        given = _section(stored, section).get(name)
        if isinstance(given, list):
            texts = [str(text) for text in given]
            built_in = [text for text in texts if not is_custom(text)]
            skipped += [split(text)[0] for text in texts if is_custom(text)]
            if built_in:
                measured.setdefault(section, {})[name] = built_in
    return measured, list(dict.fromkeys(skipped))


def distrusted(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings with every option that runs a model's own code switched off."""
    off = {"trust_remote_code": False, "attn_implementation": ""}
    return {**stored, "load": _load(stored, off)} if "load" in stored else dict(stored)


def without_own_scorers(settings: Settings) -> Settings:
    """The settings with built-in scorers only."""
    evaluation = {name: tuple(n for n in getattr(settings.evaluation, name) if not is_custom(n)) for _, name in _NAMED[:2]}
    objectives = tuple(text for text in settings.search.objectives if not is_custom(text)) or ("kl",)
    return settings.model_copy(
        update={
            "evaluation": settings.evaluation.model_copy(update=evaluation),
            "search": settings.search.model_copy(update={"objectives": objectives}),
        }
    )


def scorers_note(skipped: list[str], settings: Settings) -> str:
    """A note on custom scorers that were left out and that `settings` don't name; "" if there are none."""
    named = {*settings.scorers, *settings.evaluation.heldout_scorers}
    left_out = ", ".join(public(name) for name in skipped if name not in named)
    return left_out and (
        f"The run's custom scorers aren't run ({left_out}), since a run may come from anybody; name them with "
        "--set 'evaluation.heldout_scorers=[\"path/to/file.py:ClassName\"]'."
    )


def code_note(stored: Mapping[str, Any], settings: Settings, option: str = "--set load.trust_remote_code=true") -> str:
    """A note on code that comes with the run's model and isn't run; "" if there is none."""
    load = _section(stored, "load")
    wanted = load.get("trust_remote_code") and not settings.load.trust_remote_code
    wanted = wanted or (_from_hub(load) and load["attn_implementation"] != settings.load.attn_implementation)
    return (
        f"The run allows code that comes with its model, which isn't run here unless you allow it ({option})." if wanted else ""
    )


def _load(stored: Mapping[str, Any], off: Mapping[str, Any]) -> Any:
    """The section `load`; options that would run code have their values in `off`, or are left out."""
    load = stored["load"]
    if not isinstance(load, Mapping):  # reading the settings reports the error
        return load
    left_out = ("trust_remote_code", *(("attn_implementation",) if _from_hub(load) else ()))
    kept = {name: value for name, value in load.items() if name not in left_out}
    return kept | {name: off[name] for name in left_out if name in off}


def _from_hub(load: Mapping[str, Any]) -> bool:
    """Whether the attention implementation is a kernel from the Hub, which is code, too."""
    return "/" in str(load.get("attn_implementation", ""))


def _section(stored: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = stored.get(name)
    return section if isinstance(section, Mapping) else {}
