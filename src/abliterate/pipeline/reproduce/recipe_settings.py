"""Turn a recipe into settings on this machine.

A recipe is a stranger's file, so it may name no path to read or write, run no code unless the person allows it, and consult no
model or server; its names are never taken for paths. Only the person's own options give paths.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import ValidationError

from abliterate.edits import AUTO
from abliterate.errors import InputError
from abliterate.export.card import FILES, UNTRIED
from abliterate.export.recipe import LEFT_OUT, Recipe
from abliterate.model.loader import DEMO
from abliterate.objectives import JUDGES, KL, SETTINGS_NAMING_SCORERS, is_custom, split
from abliterate.prompts.files import dataset_name
from abliterate.prompts.sets import DEMO_PROMPTS
from abliterate.scorers import SCORERS
from abliterate.settings import untrusted
from abliterate.settings.schema import CAPABILITIES, Settings
from abliterate.settings.sources import load_settings

_OPTIONS = {"evaluation.markers": "--markers", "load.chat_template": "--chat-template"}


def settings_of(recipe: Recipe, own: Mapping[str, Any], kind: str) -> Settings:
    """The recipe's settings on this machine; only `own` options give paths and allow foreign code to run.

    Raises:
        InputError: a file of the author's isn't given, or this version doesn't know a setting.
    """
    base = load_settings("", own)
    stated = {section: dict(options) for section, options in recipe.settings.items()}
    for name in (f"{section}.{option}" for section, options in stated.items() for option in options):
        # These settings name a path on this machine or a repository to upload to, or no trial depends on them.
        if name in LEFT_OUT | UNTRIED:
            raise InputError(f"The recipe has the setting {name}, which is no part of a recipe; get another copy.")
    _leave_scorers(stated)
    load, machine = stated.setdefault("load", {}), base.load
    _check_code(load, allowed=machine.trust_remote_code)
    model = _model(recipe, base.model)
    here: dict[str, dict[str, Any]] = {
        "load": {
            "revision": recipe.model.revision if model == recipe.model.id and recipe.model.on_hub else "",
            "dtypes": [recipe.model.dtype],
            "device_map": machine.device_map,
            "max_memory": machine.max_memory,
            "trust_remote_code": machine.trust_remote_code and bool(load.get("trust_remote_code")),
            # The implementation that the recipe names may need a package or a device that is missing here.
            **({"attn_implementation": machine.attn_implementation} if machine.attn_implementation else {}),
        },
        "prompts": _sources(recipe, base, model),
        "directions": {"protect": _protected(recipe, base)},
        "efficiency": {"residual_cache_dir": base.efficiency.residual_cache_dir},
        "export": {"kind": kind or recipe.export.kind},
    }
    for name, value in _files(recipe, base).items():
        section, option = name.split(".")
        here.setdefault(section, {})[option] = value
    sections: dict[str, Any] = {}
    for name in stated.keys() | here.keys():
        default = getattr(base, name, None)
        if default is None or isinstance(default, str | int):
            raise InputError(f"The recipe has settings {name!r} that this version doesn't know; install its version.")
        try:
            sections[name] = type(default).model_validate(stated.get(name, {}) | here.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, (name, *first["loc"])))
            raise InputError(
                f"The recipe's setting {option!r} can't be used by this version: {first['msg'].removeprefix('Value error, ')}; "
                f"install abliterate {recipe.environment.versions.get('abliterate', '')!r}, which made it."
            ) from error
    settings = base.model_copy(update={**sections, "model": model, "seed": recipe.seed, "out": ""})
    if settings.edit.mode == AUTO:  # a run's recipe names the mode that was found
        raise InputError("The recipe doesn't name its edit mode (edit.mode); get another copy.")
    return settings


def left_scorers(recipe: Recipe) -> list[str]:
    """The scorers that aren't run here: custom scorers, by file and class, judges, and scorers of plugins."""
    lists = [recipe.settings.get(section, {}).get(option) for section, option in map(_parts, SETTINGS_NAMING_SCORERS)]
    names = [name for scorers in lists if isinstance(scorers, list) for name in scorers]
    return list(dict.fromkeys(split(name)[0] for name in names if isinstance(name, str) and _is_left(name)))


def _is_left(name: str) -> bool:
    scorer = split(name)[0]
    from_plugin = scorer not in SCORERS or SCORERS.plugin(scorer) is not None
    return is_custom(name) or scorer in JUDGES or from_plugin


def _leave_scorers(stated: dict[str, dict[str, Any]]) -> None:
    """No name in a recipe runs a file's code, loads another model, asks a server, or needs a scorer that isn't installed.

    A trial needs no objectives, so KL replaces objectives that are dropped.
    """
    for section, option in map(_parts, SETTINGS_NAMING_SCORERS):
        scorers = stated.get(section, {}).get(option)
        if isinstance(scorers, list):
            kept = [name for name in scorers if not (isinstance(name, str) and _is_left(name))]
            stated[section][option] = kept or ([KL] if option == "objectives" else [])


def _parts(name: str) -> tuple[str, str]:
    section, _, option = name.partition(".")
    return section, option


def _check_code(load: Mapping[str, Any], *, allowed: bool) -> None:
    if untrusted.requests({"load": load}) and not allowed:
        raise InputError(
            "The recipe's model runs code of its own from the Hub; read that code, and if you trust it repeat the command with "
            "--trust-remote-code."
        )


def _model(recipe: Recipe, given: str) -> str:
    """The model to load. A name in a recipe is never taken for a directory."""
    name = recipe.model.id
    if given:
        return given
    if not recipe.model.on_hub:
        if name == DEMO:
            return DEMO
        raise InputError(f"The recipe's model {name!r} was a directory of its author; give yours with --model PATH.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"The recipe's model {name!r} is no name on the Hub; give the model with --model.") from error
    if Path(name).exists():
        raise InputError(
            f"There is a path {name} here, but the recipe means the Hub's; give it with --model, or change directory."
        )
    return name


def _sources(recipe: Recipe, base: Settings, model: str) -> dict[str, str]:
    """{set: source}: the source given here, else the recipe's if it is a data set or the demo's own file."""
    sources, missing = dict[str, str](), list[str]()
    for name, demo_file in DEMO_PROMPTS.items():
        given, stated = getattr(base.prompts, name), recipe.prompts.get(name)
        if stated is None:
            raise InputError(f"The recipe doesn't say what its {name} prompts were; it can't be used.")
        if given:
            sources[name] = given
        elif model == DEMO and stated.source == demo_file:
            sources[name] = ""
        elif _is_dataset(stated.source):
            sources[name] = stated.source
        else:
            missing.append(f"--{name.replace('_', '-')} FILE ({stated.source!r}, {stated.count} prompts)")
    if missing:
        raise InputError(f"The recipe was made with prompt files of its author; give them with {', '.join(missing)}.")
    return sources


def _protected(recipe: Recipe, base: Settings) -> list[str]:
    """The protected capabilities: the recipe's, or those given here if some of them are neither built in nor of the Hub."""
    stated = recipe.settings.get("directions", {}).get("protect", [])
    given = list(base.directions.protect)
    named = [str(entry) for entry in stated] if isinstance(stated, list) else []
    own = [entry for entry in named if entry not in CAPABILITIES and not _is_dataset(entry)]
    if own and len(given) != len(named):
        raise InputError(
            f"The recipe protects capabilities by prompt files of its author ({', '.join(own)}); give all {len(named)} sets in "
            f"the environment variable ABLITERATE_DIRECTIONS__PROTECT, as a JSON list{f', not {len(given)}' if given else ''}."
        )
    return given if own else named


def _is_dataset(source: str) -> bool:
    """Whether `source` can only mean a data set on the Hub, because a stranger's recipe must not make us read local files."""
    parsed = dataset_name(source)
    try:
        validate_repo_id(parsed.name if parsed else "")
    except HFValidationError:
        return False
    assert parsed is not None
    return not Path(parsed.name).exists() and not Path(source).exists()


def _files(recipe: Recipe, base: Settings) -> dict[str, str]:
    """{setting: path} of the other files that settings name, as given here; InputError if the recipe needs a missing file."""
    paths = {}
    for name in FILES.values():
        section, option = name.split(".")
        if section == "prompts":
            continue
        paths[name] = getattr(getattr(base, section), option)
        stated = recipe.files.get(name)
        if stated is not None and not paths[name]:
            raise InputError(
                f"The recipe was made with a file of its author, {stated.name!r} (sha256 {stated.sha256:.12}…); give it with "
                f"{_OPTIONS[name]} FILE."
            )
    return paths
