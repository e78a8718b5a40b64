"""Where settings come from: command line over environment over TOML over a stored run's over defaults; how they are written.

Owns the sentences a person sees when a setting is unknown, malformed or out of range.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from abliterate.errors import InputError
from abliterate.files import HALF_CHARACTER, expanded, read_toml, split_existing
from abliterate.objectives import SETTINGS_NAMING_SCORERS, is_custom, split
from abliterate.settings import schema
from abliterate.settings.presets import config_path, presets

ENV_PREFIX = "ABLITERATE_"

# Environment variables that other code reads: the switch for tracebacks, and the judge's endpoint.
# What isn't a setting: ABLITERATE_MODELS is where `scripts/` keep the models that they make.
_OTHER_ENV = {"ABLITERATE_DEBUG", "ABLITERATE_MODELS", *(f"ABLITERATE_JUDGE_{part}" for part in ("URL", "MODEL", "KEY"))}

HIDDEN = "***"

# SQLAlchemy splits a URL this way: the password may contain an @ and a slash, the user name may not.
_PASSWORD = re.compile(r"^([^:/]+://[^:/@]*:).*(@)", re.DOTALL)

_PASSWORD_PARAMETER = re.compile(r"((?:[?&]|%26)(?:password|passwd|pwd|sslpassword)=)[^&#]*", re.IGNORECASE)

_PROMPT_SETS = (
    *("harmful", "harmless", "harmful_eval", "harmless_eval"),
    *("harmful_heldout", "harmless_heldout", "over_refusal"),
)

# Settings of a configuration file that may name files beside it; lists of scorers do so by a class in a file.
_NAMING_CLASSES = (*SETTINGS_NAMING_SCORERS, "evaluation.heldout_scorers")
_NAMING_FILES = (
    *(f"prompts.{name}" for name in _PROMPT_SETS),
    *("directions.protect", "evaluation.markers", "load.chat_template"),
    *_NAMING_CLASSES,
)


class _Loading(type(schema.Settings)):  # type: ignore[misc]
    """Gives the class `Settings` its `load`. An instance's `load` is the section of that name, as in `--set load.dtypes`."""

    def load(cls, config: str = "", **options: Any) -> Settings:
        """Settings from a preset (such as `quick`) or TOML file, the environment, and keywords, which win.

            Settings.load("quick", model="Qwen/Qwen3-0.6B", search={"trials": 50})

        Raises:
            InputError: an unknown setting (the nearest name is given), a wrong type, or a value out of range.
        """
        return load_settings(config, options)


class Settings(schema.Settings, metaclass=_Loading):
    """All options (`schema.Settings`), with the way in which everybody loads them: `Settings.load`."""


def load_settings(
    config: str = "",
    overrides: Mapping[str, Any] | None = None,
    stored: Path | Mapping[str, Any] | None = None,
    entry: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings from all sources, with absolute paths, so that a run can be continued from anywhere.

    `config` is a TOML file or the name of a preset; `overrides` are nested options; `stored` is the `settings.toml` of a run,
    or some of its settings, over which every other source wins; `entry` is one run's entry in a list of runs, which wins over
    `config`. A table is replaced as a whole, unless entries of it are given.

    Raises:
        InputError: a setting is unknown (the sentence gives the nearest name), of a wrong type, or out of range.
    """
    file_values = read_toml(stored) if isinstance(stored, Path) else dict(stored or {})
    if config:
        found = _find_config(config)
        file_values = by_section(file_values, _beside(read_toml(found), found.absolute().parent))
    file_values = by_section(file_values, entry or {})
    _check_environment()
    own = dict(overrides or {})

    class FromSources(schema.Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            # By sections, because sources of their own would be merged down to the entries of tables.
            given = _on_defaults(by_section(by_section(file_values, _marked(env_settings())), own))
            return (lambda: given,)  # type: ignore[return-value]

    try:
        loaded = FromSources(**own)
    except ValidationError as error:
        raise InputError(_sentence(error)) from error
    except SettingsError as error:
        raise InputError(f"An {ENV_PREFIX} environment variable can't be read: {error}; write lists as JSON.") from error
    not_utf8 = next((name for name, text in _texts(loaded.model_dump()) if HALF_CHARACTER.search(text)), None)
    if not_utf8:
        raise InputError(f"The setting {not_utf8} isn't UTF-8 text; rename the file or folder, or give another value.")
    return _with_absolute_paths(Settings.model_construct(**{name: getattr(loaded, name) for name in Settings.model_fields}))


class Entries(dict[str, Any]):
    """Entries for an option that is a table: they are added to it, while a plain dict replaces it."""


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["search.trials=20", …]` as nested values; a value that isn't TOML is plain text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise InputError(f"--set {assignment!r} is not of the form key=value, for example search.trials=20.")
        table = values
        *sections, leaf = name.strip().split(".")
        # A dotted component name ("attn.o_proj") can't be distinguished from a path, so such tables are set as a whole.
        for depth, section in enumerate(sections):
            table = table.setdefault(section, Entries() if depth else {})
            if not isinstance(table, dict):
                raise InputError(f"--set {assignment!r} contradicts another --set.")
        value, old = _parse_value(text, name.strip()), table.get(leaf)
        if not sections and isinstance(old, dict) and isinstance(value, dict):
            value = merge(old, value)  # of a whole section; only a table in a section replaces what was given before
        table[leaf] = value
    return values


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given; the others are None and are dropped, so that lower sources decide."""
    kept: dict[str, Any] = {}
    for name, value in options.items():
        inner = given_options(value) if isinstance(value, Mapping) else value
        if inner is not None and inner != {}:
            kept[name] = inner
    return kept


def options_of(given: Mapping[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The settings that the command line gives, including --set. InputError: an option and --set contradict each other."""
    options, assigned = given_options(given), parse_assignments(assignments)
    if contradiction := next(_contradictions(options, assigned), None):
        raise InputError(f"An option and --set {contradiction} give different values; leave one of the two out.")
    return merge(options, assigned)


def _contradictions(options: Mapping[str, Any], assigned: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The names of settings that both have, with different values."""
    for name in options.keys() & assigned.keys():
        one, other = options[name], assigned[name]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _contradictions(one, other, f"{before}{name}.")
        elif (list(one) if isinstance(one, tuple) else one) != other:
            yield before + name


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dictionaries merged; `over` wins."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def dump_settings(settings: schema.Settings) -> str:
    """The settings as TOML that loads to the same settings, except that a password in the storage's URL is never written."""
    record = settings.model_dump(mode="json")
    record["search"]["storage"] = without_password(settings.search.storage)
    return tomli_w.dumps(record)


def without_password(url: str) -> str:
    """A database URL that may be shown: `***` replaces the password, in every place from which drivers take it."""
    url = _PASSWORD.sub(rf"\g<1>{HIDDEN}\g<2>", url)
    return _PASSWORD_PARAMETER.sub(rf"\g<1>{HIDDEN}", url)


def check_storage(url: str, options: str = "--storage again") -> None:
    """Raise InputError if a stored URL lacks its password; `options` names the options to give then."""
    if f":{HIDDEN}@" in url or f"={HIDDEN}" in url:
        raise InputError(
            f"The password of the run's database isn't kept ({url}); give {options} with the password, or without it if "
            "PGPASSWORD or ~/.pgpass holds it."
        )


def option_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """The dotted names of all options."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from option_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _annotation(option: str) -> Any:
    """The type of an option, by its dotted name."""
    model: Any = schema.Settings
    *sections, name = option.split(".")
    for section in sections:
        model = model.model_fields[section].annotation
    return model.model_fields[name].annotation


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in nested settings, including the names of table entries."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            inner = f"{name}.{key}" if name else str(key)
            yield from ((name, key), *_texts(entry, inner))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry, name)


def by_section(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merged like `merge`, except that an option which is itself a table is replaced as a whole, like a default.

    `Entries` of it are added to it.
    """
    both = {name for name in base.keys() & over.keys() if isinstance(base[name], dict) and isinstance(over[name], dict)}
    return {**base, **over, **{name: _section(base[name], over[name]) for name in both}}


def _section(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    tables = {name for name, value in over.items() if isinstance(value, Entries) and isinstance(base.get(name), dict)}
    return {**base, **over, **{name: type(base[name])({**base[name], **over[name]}) for name in tables}}


def _on_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with `Entries` that no source has given a table for added to the default table."""
    found = dict(values)
    for option in option_names():
        section, _, name = option.partition(".")
        options = found.get(section)
        table = options.get(name) if isinstance(options, dict) else None
        if isinstance(table, Entries):
            field = schema.Settings.model_fields[section].annotation.model_fields[name]  # type: ignore[union-attr]
            default = field.get_default(call_default_factory=True)
            if isinstance(default, dict):  # else it is no table, which is told later
                found[section] = {**found[section], name: {**default, **table}}
    return found


def _marked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The environment's values, with those tables as `Entries` of which variables give entries alone."""
    there = {name.upper() for name in os.environ}
    found = dict(values)
    for option in option_names():
        section, _, name = option.partition(".")
        variable = ENV_PREFIX + option.replace(".", "__").upper()
        options = found.get(section)
        table = options.get(name) if isinstance(options, dict) else None
        if isinstance(table, dict) and variable not in there and any(other.startswith(variable + "__") for other in there):
            found[section] = {**found[section], name: Entries(table)}
    return found


def _beside(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a configuration file, with the paths of the files that lie beside it, in `folder`.

    They win over files of the working directory, so a file with its prompts can be used from anywhere.
    """
    found = dict(values)
    for setting in _NAMING_FILES:
        section, name = setting.split(".")
        options = found.get(section)
        if isinstance(options, Mapping) and name in options:
            given, classes = options[name], setting in _NAMING_CLASSES
            several = given if isinstance(given, list) else [given]
            own = [_in_folder(entry, folder, classes=classes) for entry in several]
            found[section] = {**options, name: own if isinstance(given, list) else own[0]}
    return found


def _in_folder(text: Any, folder: Path, *, classes: bool) -> Any:
    """The absolute path of a file in `folder`, also where a column or a class follows; anything else as it is given.

    With `classes`, a name without a class is a built-in's, and never that of a file.
    """
    if not isinstance(text, str) or not text or text in schema.CAPABILITIES or (classes and not is_custom(text)):
        return text
    place = str(folder / text)
    there = place if os.path.isfile(place) else split_existing(place)[0]
    return place if there and os.path.isfile(there) else text


def _with_absolute_paths(settings: Settings) -> Settings:
    """The settings with absolute paths. Hub ids, data sets and missing files stay as given; their reader reports the error."""
    _check_paths(settings)
    prompts = {name: _own_prompts(getattr(settings.prompts, name)) for name in _PROMPT_SETS}
    protected = tuple(name if name in schema.CAPABILITIES else _own_prompts(name) for name in settings.directions.protect)
    load = settings.load
    sections = {
        "prompts": prompts,
        "directions": {"protect": protected},
        "load": {"chat_template": _if_there(load.chat_template), "offload_folder": _absolute(load.offload_folder)},
        "evaluation": {
            "markers": _if_there(settings.evaluation.markers),
            "judge_model": _if_there(settings.evaluation.judge_model),
            "scorers": tuple(map(_own_scorer, settings.evaluation.scorers)),
            "heldout_scorers": tuple(map(_own_scorer, settings.evaluation.heldout_scorers)),
        },
        "efficiency": {"residual_cache_dir": _absolute(settings.efficiency.residual_cache_dir)},
        "search": {
            "storage": absolute_database(settings.search.storage),
            "seed_from": _if_there(settings.search.seed_from),
            "objectives": tuple(map(_own_objective, settings.search.objectives)),
        },
    }
    # The run directory stays relative if it is given so, because sentences show it.
    out = str(expanded(settings.out)) if settings.out else ""
    top: dict[str, Any] = {"cache_dir": _absolute(settings.cache_dir), "out": out}
    if settings.model != "demo":  # `demo` never means a directory of that name
        top["model"] = _if_there(settings.model)
    top |= {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=top)


def _check_paths(settings: Settings) -> None:
    """Raise InputError for a text that can't be a path; otherwise every reader would fail on it in its own words."""
    paths = {name: getattr(settings, name) for name in ("model", "out", "cache_dir")}
    paths |= {f"prompts.{name}": getattr(settings.prompts, name) for name in _PROMPT_SETS}
    paths |= {f"directions.protect[{number}]": entry for number, entry in enumerate(settings.directions.protect)}
    paths |= {f"load.{name}": getattr(settings.load, name) for name in ("chat_template", "offload_folder")}
    paths |= {f"evaluation.{name}": getattr(settings.evaluation, name) for name in ("markers", "judge_model")}
    paths |= {"efficiency.residual_cache_dir": settings.efficiency.residual_cache_dir}
    paths |= {"search.seed_from": settings.search.seed_from}
    for name, text in paths.items():
        try:
            if "\0" in text:
                raise ValueError("it holds a NUL character")
            expanded(text).exists()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            shown = text if len(text) < 80 else text[:70] + "…"
            raise InputError(f"The setting {name} ({shown!r}) can't be a path: {reason}; give another path.") from error


def _absolute(path: str) -> str:
    return str(expanded(path).absolute()) if path else ""


def _if_there(path: str) -> str:
    return _absolute(path) if path and expanded(path).exists() else path


def _own_prompts(source: str) -> str:
    """A source of prompts with its file's or folder's absolute path, also where a column follows; a Hub data set stays."""
    given = _if_there(source)
    path, rest = split_existing(source) if given == source else (None, "")
    return given if path is None else f"{path.absolute()}:{rest}"


def _own_scorer(name: str) -> str:
    """The name of a custom scorer with its file's absolute path; a built-in scorer's name stays."""
    path, colon, class_name = name.rpartition(":")
    return f"{_if_there(path)}:{class_name}" if colon and path.endswith(".py") else name


def _own_objective(text: str) -> str:
    name, goal = split(text)
    return f"{_own_scorer(name)}:{goal}" if goal else _own_scorer(name)


def absolute_database(url: str) -> str:
    """A database's URL, with the absolute path of an SQLite file."""
    file = url.removeprefix("sqlite:///")
    return url if file in (url, "", ":memory:") or file.startswith("file:") else f"sqlite:///{_absolute(file)}"


def _find_config(config: str) -> Path:
    path = expanded(config)
    if path.is_file():
        return path
    if path.suffix == "" and path.name == config:
        try:
            return config_path(config + ".toml")
        except InputError:
            pass
    names = ", ".join(presets())
    raise InputError(f"There is no configuration file {config!r}; give a TOML file or one of the presets: {names}.")


def _parse_value(text: str, name: str) -> Any:
    """A value of TOML, or the text, without spaces around it unless they are part of what the setting means."""
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text if name in _SPACED else text.strip()
    # No setting is a date. A commit may read as a number.
    if isinstance(value, date | time) or (name in _TEXTS and isinstance(value, int | float)):
        return text.strip()
    return value


_LIST = 'Input should be a list, such as [1, 2] or ["a", "b"]'
# Texts that stand before or behind others, where a space counts.
_SPACED = frozenset({"prompts.prefix", "prompts.suffix", "prompts.system", "response.prefix"})
_TEXTS = frozenset(name for name in option_names() if _annotation(name) is str)


def _nearest(name: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"; did you mean {nearest[0]}?" if nearest else "; see configs/default.toml for all settings."


def _check_environment() -> None:
    """Raise InputError for a misspelled variable: pydantic-settings ignores it, and the user would never notice."""
    known = {ENV_PREFIX + name.replace(".", "__").upper() for name in option_names()}
    sections = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known | sections | _OTHER_ENV:
            continue
        if any(upper.startswith(option + "__") for option in known):  # an entry of a table, e.g. …__MAX_COEFF__DEFAULT
            continue
        raise InputError(f"The environment variable {name} is not a setting{_nearest(upper, sorted(known))}")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))
        return f"There is no setting {name}{_nearest(name, list(option_names()))}"
    # Behind an option's name stands which of several types an error is about; what such a type allows is said together.
    place = first["loc"][:2]
    is_option = ".".join(map(str, place)) in option_names()
    of_several = is_option and get_origin(_annotation(".".join(map(str, place)))) in (Union, UnionType)
    same = [each for each in error.errors() if each["loc"][:2] == place] if of_several else [first]
    told = max(same, key=lambda each: len(each["loc"]))
    name = ".".join(str(part) for part in told["loc"] if not re.search(r"[\[(]", str(part)))
    messages = [_LIST if each["type"] == "tuple_type" else each["msg"].removeprefix("Value error, ") for each in same]
    if len(same) == 1 or len(told["loc"]) > 3:
        messages = [messages[same.index(told)]]
    first_message, *others = dict.fromkeys(messages)
    message = ", or ".join([first_message, *(other.removeprefix("Input should be ") for other in others)])
    return f"The setting {name or 'given'} has a wrong value ({told['input']!r}): {message}."
