"""Reads a model's config.json, and says which of its fields is wrong.

Libraries report a wrong value where it first hurts, often without its name. The field is found by leaving fields out one at a
time: the model can be built without the wrong one.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from abliterate.errors import InputError
from abliterate.model.model_files import CONFIG, read_json, reading, reason_of
from abliterate.settings.schema import LoadSettings

# Far above all published models; with more, building the modules without weights takes minutes, or all memory.
_MOST = (
    (re.compile(r"(?!max_window)(.*_)?(n_?layers?|num_.*layers|layers|depth)"), 2_000),
    (re.compile(r"(.*_)?(experts|heads|labels)"), 100_000),
    (re.compile(r".*(hidden|intermediate|vocab|head|embed\w*|ffn\w*|inner|state|model)_(size|dim)"), 10**7),
    (re.compile(r"d_model|d_ff|n_embd|n_inner"), 10**7),
)
_POSITIVE = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "hidden_size", "n_embd", "d_model", "vocab_size")
# Of all parameters together: 1000 times the largest published model.
_MOST_PARAMETERS = 10**15
_SECONDS = 10.0
# Without these fields, another model would be built.
_KEPT = frozenset(("model_type", "architectures", "auto_map", "transformers_version"))

Build = Callable[[PretrainedConfig], object]


def read_config(source: str, load: LoadSettings) -> PretrainedConfig:
    """The model's config.

    Raises:
        InputError: there is none, or a field is wrong; the sentence names the field.
    """
    raw = read_json(source, CONFIG, load.revision)
    if not isinstance(family := raw.get("model_type", ""), str):
        raise _wrong(source, {"model_type": family}, "a name is expected there")
    for field, value in _numbers(raw):
        _check_number(source, field, value)
    options = {"revision": load.revision} if load.revision else {}
    with reading(source, CONFIG, suspects=lambda: blame_fields(source, load, lambda config: None)):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=load.trust_remote_code, **options)
        text_config = config.get_text_config()
    if not isinstance(text_config, PretrainedConfig):
        raise _wrong(source, {"text_config": text_config}, f"a model of the type {family!r} has no such part")
    entries = (getattr(each, "quantization_config", None) or {} for each in (config, text_config))
    for entry in entries:
        if not isinstance(entry, Mapping) and not hasattr(entry, "to_dict"):
            raise _wrong(source, {"quantization_config": entry}, "an object is expected there")
    return config


def _numbers(raw: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, float]]:
    for name, value in raw.items():
        if isinstance(value, Mapping) and inside.count(".") < 3:
            yield from _numbers(value, f"{inside}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield inside + name, value


def _check_number(source: str, field: str, value: float) -> None:
    inside, _, name = field.rpartition(".")
    most = next((most for pattern, most in _MOST if pattern.fullmatch(name)), None)
    if most is not None and not value <= most:  # NaN, too
        raise _wrong(source, {field: value}, f"no model has more than {most}")
    if name in _POSITIVE and inside in ("", "text_config") and value <= 0:  # a tower may be left out by a 0
        raise _wrong(source, {field: value}, "it must be at least 1")


def blame_fields(source: str, load: LoadSettings, build: Build) -> None:
    """InputError that names the wrong field, if `build` fails for the config of `source` and succeeds without that field."""
    raw = read_json(source, CONFIG, load.revision)
    family = str(raw.get("model_type"))
    if family not in CONFIG_MAPPING or load.trust_remote_code:
        return
    end = time.monotonic() + _SECONDS

    def failure(fields: Mapping[str, Any]) -> Exception | None:
        try:
            build(CONFIG_MAPPING[family].from_dict(copy.deepcopy(dict(fields))))
        except Exception as error:
            return error
        return None

    error = failure(raw)
    if error is None:
        return
    wrong: dict[str, Any] = {}
    for name in sorted(raw.keys() - _KEPT):
        left = {key: value for key, value in raw.items() if key != name}
        if time.monotonic() < end and failure(left) is None:
            wrong |= _inner(raw, name, failure) or {name: raw[name]}
    if wrong:
        raise _wrong(source, wrong, reason_of(error)) from error


def _inner(raw: Mapping[str, Any], name: str, failure: Callable[[Mapping[str, Any]], Exception | None]) -> dict[str, Any]:
    """The fields of the object `name` that are wrong by themselves."""
    section = raw[name]
    if not isinstance(section, Mapping):
        return {}
    rest = {key: {other: value for other, value in section.items() if other != key} for key in section if key not in _KEPT}
    return {f"{name}.{key}": section[key] for key, left in rest.items() if failure({**raw, name: left}) is None}


def _wrong(source: str, fields: Mapping[str, Any], reason: str) -> InputError:
    shown = [f"{name} ({_short(value)})" for name, value in sorted(fields.items())[:3]]
    return InputError(
        f"The model in {source} can't be loaded, because in {CONFIG} the field {' or '.join(shown)} is wrong: {reason}; "
        "correct it, or download the file again."
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:59] + "…"


def d_model_of(source: str, config: PretrainedConfig) -> int:
    """The width of the residual stream; InputError if the config doesn't tell it."""
    width = getattr(config.get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise _wrong(source, {"hidden_size": width}, "a whole number is expected there")
    return width


def check_parameters(source: str, count: int) -> None:
    """InputError for more parameters than any model has."""
    if count > _MOST_PARAMETERS:
        raise InputError(
            f"The model in {source} can't be loaded, because {CONFIG} describes {count:.0e} parameters, more than any "
            "model has; correct its sizes, or download the file again."
        )
