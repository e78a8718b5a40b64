"""Decide which stored settings may act here. A run may come from anybody, so nothing that its files say may do harm by itself.

Some settings run code (scorers in files, a model's own code, kernels from the Hub), open a database elsewhere, or upload. Where
they come from a run's directory, a study or a recipe, they count only if the person says the same in the same command: by an
option, an environment variable or a configuration file. `run --resume` and `worker` end with `check`, because trials without a
scorer would mean something else; the commands that read a run go on `without` these settings and say so. All other settings
(model, prompts, markers, templates) are data. Installed plugins and the judge's endpoint are the person's own.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from abliterate.errors import InputError
from abliterate.objectives import KL, SETTINGS_NAMING_SCORERS, is_custom, public, split
from abliterate.settings.schema import Settings
from abliterate.settings.sources import without_password

# The settings that a measurement of a run's trial depends on. The others concern the run's search, its export or its machine.
_MEASURED = ("seed", "prompts", "response", "directions", "edit")
_EVALUATION = ("judge_model", "judge_label", "markers", "batch_size", "max_batch_size")
_SCORERS = (*SETTINGS_NAMING_SCORERS, "evaluation.heldout_scorers")
# The value of each other setting that does nothing by itself.
_HARMLESS: Mapping[str, Any] = {
    "load.trust_remote_code": False,
    "load.attn_implementation": "",
    "search.storage": "",
    "export.push": "",
    "export.push_private": True,
}
_OPTIONS = {"search.storage": "--storage", "export.push": "--push"}


AnySettings = TypeVar("AnySettings", bound=Settings)


@dataclass(frozen=True)
class Request:
    """One thing that stored settings ask for and that only a person may allow; `action` says in words what would happen."""

    setting: str
    value: str
    action: str

    @property
    def said_by(self) -> tuple[str, str]:
        """What a person must have said. A scorer may be named by any of the settings that name scorers."""
        return "scorer" if self.setting in _SCORERS else self.setting, self.value


def requests(values: Mapping[str, Any], place: Path | None = None) -> tuple[Request, ...]:
    """Everything of that kind in nested settings, which may have any shape; a database inside the directory `place` is fine."""
    found = [
        Request(setting, split(text)[0], f"running the scorer {split(text)[0]}")
        for setting in _SCORERS
        for text in _listed(values, setting)
        if is_custom(text)
    ]
    if _value(values, "load.trust_remote_code") is not False:
        found.append(Request("load.trust_remote_code", "true", "running code that comes with the model"))
    kernel = str(_value(values, "load.attn_implementation"))
    if "/" in kernel:
        found.append(Request("load.attn_implementation", kernel, f"running the kernels of {kernel}"))
    storage = str(_value(values, "search.storage"))
    if storage and not _is_inside(storage, place):
        found.append(Request("search.storage", storage, f"opening the database {without_password(storage)}"))
    if push := str(_value(values, "export.push")):
        found.append(Request("export.push", push, f"uploading to {push}"))
        if _value(values, "export.push_private") is not True:
            found.append(Request("export.push_private", "false", "uploading for everybody to see"))
    return tuple(found)


def unsaid(stored: Mapping[str, Any], own: Settings, place: Path | None = None) -> tuple[Request, ...]:
    """What stored settings ask for and the person's `own` settings, from every source but the stored one, don't say."""
    said = {request.said_by for request in requests(own.model_dump(mode="json"), None)}
    return tuple(request for request in requests(stored, place) if request.said_by not in said)


def check(settings: Settings, own: Settings, place: Path | None = None) -> None:
    """Raise InputError, with all that is asked for and the options for it, if `settings` ask for what `own` don't say."""
    values = settings.model_dump(mode="json")
    asked = unsaid(values, own, place)
    if asked:
        run = "The run" if place is None else f"The run in {place}"
        raise InputError(
            f"{run} asks for what only you may allow: {_actions(asked)}; if you trust it, repeat the command with "
            f"{shlex.join(options(values, asked))}."
        )


def options(values: Mapping[str, Any], asked: Iterable[Request]) -> list[str]:
    """The options, as words, that say again what was `asked` for in these settings."""
    words: list[str] = []
    for setting in dict.fromkeys(request.setting for request in asked):
        if setting in _SCORERS:
            value = json.dumps(_listed(values, setting), ensure_ascii=False)
        else:
            value = next(request.value for request in asked if request.setting == setting)
            value = without_password(value) if setting == "search.storage" else value
        words += [_OPTIONS[setting], value] if setting in _OPTIONS else ["--set", f"{setting}={value}"]
    return words


def to_share(settings: Settings) -> list[str]:
    """The options with which a worker process of this run may do what the run may do; it joins the run's own database."""
    values = settings.model_dump(mode="json")
    shared = [r for r in requests(values) if r.setting.startswith("load.") or r.setting in SETTINGS_NAMING_SCORERS]
    return options(values, shared)


def with_places_of(own: Settings, settings: AnySettings) -> AnySettings:
    """The settings with the person's own folders for caches and offloaded weights, as a run may name any place to write to."""
    efficiency = settings.efficiency.model_copy(update={"residual_cache_dir": own.efficiency.residual_cache_dir})
    load = settings.load.model_copy(update={"offload_folder": own.load.offload_folder})
    return settings.model_copy(update={"cache_dir": own.cache_dir, "efficiency": efficiency, "load": load})


def without(stored: Mapping[str, Any], asked: Sequence[Request]) -> dict[str, Any]:
    """The stored settings with harmless values where something was `asked` for."""
    kept = dict(stored)
    for setting in dict.fromkeys(request.setting for request in asked):
        section, name = setting.split(".")
        if setting in _SCORERS:
            gone = {request.value for request in asked if request.setting == setting}
            value: Any = [text for text in _listed(stored, setting) if split(text)[0] not in gone]
            value = value or ([KL] if setting == "search.objectives" else [])
        else:
            value = _HARMLESS[setting]
        kept[section] = {**kept[section], name: value}
    return kept


def to_measure(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's settings with which its trials are measured."""
    measured = {name: stored[name] for name in (*_MEASURED, "load") if name in stored}
    evaluation = _section(stored, "evaluation")
    measured["evaluation"] = {name: value for name, value in evaluation.items() if name in _EVALUATION}
    for setting in _SCORERS:
        section, name = setting.split(".")
        if listed := _listed(stored, setting):
            measured.setdefault(section, {})[name] = listed
    return measured


def without_own_scorers(settings: Settings) -> Settings:
    """The settings with built-in scorers only."""
    values = settings.model_dump()
    kept = without(values, [request for request in requests(values) if request.setting in _SCORERS])
    evaluation = {name: tuple(kept["evaluation"][name]) for name in ("scorers", "heldout_scorers")}
    return settings.model_copy(
        update={
            "evaluation": settings.evaluation.model_copy(update=evaluation),
            "search": settings.search.model_copy(update={"objectives": tuple(kept["search"]["objectives"])}),
        }
    )


def scorers_note(asked: Iterable[Request]) -> str:
    """A note on custom scorers that are left out; "" if there are none."""
    left_out = ", ".join(dict.fromkeys(public(request.value) for request in asked if request.setting in _SCORERS))
    return left_out and (
        f"The run's custom scorers aren't run ({left_out}), since a run may come from anybody; name them with "
        "--set 'evaluation.heldout_scorers=[\"path/to/file.py:ClassName\"]'."
    )


def code_note(asked: Sequence[Request], option: str = "") -> str:
    """A note on code that comes with the run's model and isn't run; "" if there is none. `option` is what allows it."""
    code = [request for request in asked if request.setting.startswith("load.")]
    if not code:
        return ""
    allow = option or shlex.join(options({}, code))
    return f"The run allows code that comes with its model, which isn't run here unless you allow it ({allow})."


def _actions(asked: Iterable[Request]) -> str:
    return ", ".join(dict.fromkeys(request.action for request in asked))


def _is_inside(storage: str, place: Path | None) -> bool:
    """Whether a URL means a plain SQLite file in the directory; with parameters it might mean anything."""
    file = storage.removeprefix("sqlite:///")
    if place is None or file == storage or any(letter in file for letter in "?#%:\0"):
        return False
    return Path(file).resolve().is_relative_to(place.resolve())


def _value(values: Mapping[str, Any], setting: str) -> Any:
    section, name = setting.split(".")
    return _section(values, section).get(name, _HARMLESS[setting])


def _listed(values: Mapping[str, Any], setting: str) -> list[str]:
    section, name = setting.split(".")
    listed = _section(values, section).get(name)
    return [str(text) for text in listed] if isinstance(listed, list | tuple) else []


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}
