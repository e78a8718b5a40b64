"""Where settings come from: command line over environment over TOML over a stored run's over defaults; how they are written.

Owns the sentences a person sees when a setting is unknown, malformed or out of range.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsError

from abliterate.errors import InputError
from abliterate.files import read_toml
from abliterate.objectives import split
from abliterate.settings import schema

ENV_PREFIX = "ABLITERATE_"

# Read by other code than settings: the markers of a traceback and of tests.
_OTHER_ENV = {"ABLITERATE_DEBUG", *(f"ABLITERATE_JUDGE_{part}" for part in ("URL", "MODEL", "KEY"))}

# Halves of a surrogate pair stand for bytes of the command line, the environment or a file name that aren't UTF-8.
_HALVES = re.compile("[\ud800-\udfff]")

HIDDEN = "***"

# As SQLAlchemy splits a URL: the password may hold an @ and a slash, the user name may not.
_PASSWORD = re.compile(r"^([^:/]+://[^:/@]*:).*(@)", re.DOTALL)

_PASSWORD_PARAMETER = re.compile(r"((?:[?&]|%26)(?:password|passwd|pwd|sslpassword)=)[^&#]*", re.IGNORECASE)

_PROMPT_SETS = (
    *("harmful", "harmless", "harmful_eval", "harmless_eval"),
    *("harmful_heldout", "harmless_heldout", "over_refusal"),
)


def config_path(name: str) -> Path:
    """A file of `configs/`: inside the installed package, or at the top of the source tree (editable installs)."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"The file configs/{name} is missing from this installation; reinstall abliterate.")


class _Loading(type(schema.Settings)):  # type: ignore[misc]
    """Gives the class `Settings` its `load`. An instance's `load` is the section of that name, as in `--set load.dtypes`."""

    def load(cls, config: str = "", **options: Any) -> Settings:
        """Settings from a preset (`quick`, `thorough`) or TOML file, the environment, and keywords, which win.

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
    stored: Path | None = None,
    entry: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from all sources, paths in them absolute: a run can be continued from anywhere.

    `config` is a TOML file or the name of a preset; `overrides` are nested options; `stored` is the `settings.toml` of
    the run that is continued, which everything else wins over; `entry` is what a list of runs says of one, over `config`.

    Raises:
        InputError: an unknown setting (the nearest name is given), a wrong type, or a value out of range.
    """
    file_values = read_toml(stored) if stored else {}
    if config:
        file_values = by_section(file_values, read_toml(_find_config(config)))
    file_values = by_section(file_values, entry or {})
    _check_environment()
    overrides = dict(overrides or {})

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
            return init_settings, env_settings, lambda: file_values  # type: ignore[return-value]

    try:
        loaded = FromSources(**overrides)
    except ValidationError as error:
        raise InputError(_sentence(error)) from error
    except SettingsError as error:
        raise InputError(f"An {ENV_PREFIX} environment variable can't be read: {error}; lists are JSON.") from error
    odd = next((name for name, text in _texts(loaded.model_dump()) if _HALVES.search(text)), None)
    if odd:
        raise InputError(f"The setting {odd} holds what is no UTF-8 text; rename the file or folder, or write it anew.")
    return _with_absolute_paths(Settings.model_construct(**{name: getattr(loaded, name) for name in Settings.model_fields}))


def parse_assignments(assignments: list[str]) -> dict[str, Any]:
    """`["search.trials=20", …]` as nested values; each value is TOML, or plain text where it isn't."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name.strip():
            raise InputError(f"--set {assignment!r} is not of the form key=value, for example search.trials=20.")
        place = values
        *sections, leaf = name.strip().split(".")
        # A dotted component name ("attn.o_proj") can't be told from a path; such tables are set as a whole.
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise InputError(f"--set {assignment!r} contradicts another --set.")
        place[leaf] = _parse_value(text.strip())
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged; `over` wins."""
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def dump_settings(settings: schema.Settings) -> str:
    """The settings as TOML, such that loading it gives them back; but a password in the storage's URL is never written."""
    record = settings.model_dump(mode="json")
    record["search"]["storage"] = without_password(settings.search.storage)
    return tomli_w.dumps(record)


def without_password(url: str) -> str:
    """A database URL as it may be shown: `***` for the password, wherever drivers take one from."""
    url = _PASSWORD.sub(rf"\g<1>{HIDDEN}\g<2>", url)
    return _PASSWORD_PARAMETER.sub(rf"\g<1>{HIDDEN}", url)


def check_storage(url: str, options: str = "--storage again") -> None:
    """InputError where a stored URL lacks the password that it had; `options`: what to give then."""
    if f":{HIDDEN}@" in url or f"={HIDDEN}" in url:
        raise InputError(
            f"The password of the run's database isn't kept ({url}); give {options}, with the password, or without one where "
            "PGPASSWORD or ~/.pgpass says it."
        )


def option_names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every option's dotted name."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from option_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every text in nested settings, names of table entries among them."""
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
    """Like `merge` for sections, but an option that is itself a table is replaced as a whole, as it is over a default."""
    both = {name for name in base.keys() & over.keys() if isinstance(base[name], dict) and isinstance(over[name], dict)}
    return {**base, **over, **{name: {**base[name], **over[name]} for name in both}}


def _with_absolute_paths(settings: Settings) -> Settings:
    """Every path made absolute. Hub ids, data sets, and what doesn't exist stay as given: their reader says what is wrong."""
    _check_paths(settings)
    prompts = {name: _if_there(getattr(settings.prompts, name)) for name in _PROMPT_SETS}
    sections = {
        "prompts": prompts,
        "load": {"chat_template": _if_there(settings.load.chat_template)},
        "evaluation": {
            "markers": _if_there(settings.evaluation.markers),
            "judge_model": _if_there(settings.evaluation.judge_model),
            "scorers": tuple(map(_own_scorer, settings.evaluation.scorers)),
            "heldout_scorers": tuple(map(_own_scorer, settings.evaluation.heldout_scorers)),
        },
        "efficiency": {"residual_cache_dir": _absolute(settings.efficiency.residual_cache_dir)},
        "search": {
            "storage": _absolute_database(settings.search.storage),
            "objectives": tuple(map(_own_objective, settings.search.objectives)),
        },
    }
    top: dict[str, Any] = {"cache_dir": _absolute(settings.cache_dir)}
    if settings.model != "demo":  # a directory of that name is not meant
        top["model"] = _if_there(settings.model)
    top |= {name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    return settings.model_copy(update=top)


def _check_paths(settings: Settings) -> None:
    """InputError for what can't be a path: every reader would fail on it, each in its own words."""
    own = {name: getattr(settings, name) for name in ("model", "out", "cache_dir")}
    own |= {f"prompts.{name}": getattr(settings.prompts, name) for name in _PROMPT_SETS}
    own |= {"load.chat_template": settings.load.chat_template, "evaluation.markers": settings.evaluation.markers}
    own |= {"efficiency.residual_cache_dir": settings.efficiency.residual_cache_dir}
    for name, text in own.items():
        try:
            if "\0" in text:
                raise ValueError("it holds a NUL character")
            Path(text).expanduser().exists()
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            shown = text if len(text) < 80 else text[:70] + "…"
            raise InputError(f"The setting {name} ({shown!r}) can't be a path: {reason}; give another.") from error


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute()) if path else ""


def _if_there(path: str) -> str:
    return _absolute(path) if path and Path(path).expanduser().exists() else path


def _own_scorer(name: str) -> str:
    """A scorer in a file of the user's, by its absolute path; a built-in one's name."""
    path, colon, wanted = name.rpartition(":")
    return f"{_if_there(path)}:{wanted}" if colon and path.endswith(".py") else name


def _own_objective(text: str) -> str:
    name, goal = split(text)
    return f"{_own_scorer(name)}:{goal}" if goal else _own_scorer(name)


def _absolute_database(url: str) -> str:
    file = url.removeprefix("sqlite:///")
    return url if file in (url, "", ":memory:") or file.startswith("file:") else f"sqlite:///{_absolute(file)}"


def _find_config(config: str) -> Path:
    path = Path(config).expanduser()
    if path.is_file():
        return path
    if path.suffix == "" and path.name == config:
        try:
            return config_path(config + ".toml")
        except InputError:
            pass
    presets = ", ".join(sorted(p.stem for p in config_path("default.toml").parent.glob("*.toml")))
    raise InputError(f"There is no configuration file {config!r}; give a TOML file or one of the presets: {presets}.")


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    return f"; did you mean {found[0]}?" if found else "; see configs/default.toml for all settings."


def _check_environment() -> None:
    """pydantic-settings ignores misspelled names; a person would never learn that the option did nothing."""
    known = {ENV_PREFIX + name.replace(".", "__").upper() for name in option_names()}
    sections = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    for name in os.environ:
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in known | sections | _OTHER_ENV:
            continue
        if any(upper.startswith(option + "__") for option in known):  # entry of a table, e.g. …__MAX_COEFF__DEFAULT
            continue
        raise InputError(f"The environment variable {name} is not a setting{_nearest(upper, sorted(known))}")


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"There is no setting {name}{_nearest(name, list(option_names()))}"
    message = first["msg"].removeprefix("Value error, ")
    return f"The setting {name or 'given'} has a wrong value ({first['input']!r}): {message}."
