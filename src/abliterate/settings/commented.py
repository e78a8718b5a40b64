"""Writes settings as TOML with a comment for every option: all of them with their values, or a short file for one model.

The comments are those of `configs/default.toml`, so nothing is described twice.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

from abliterate.settings.presets import DEFAULTS, config_path
from abliterate.settings.schema import Settings
from abliterate.settings.sources import without_password

# The options of the short file, in its order: those that a person changes first.
FIRST = (
    *("model", "seed", "device", "out"),
    *("load.dtypes", "load.quantization"),
    *("prompts.harmful", "prompts.harmless", "prompts.harmful_eval", "prompts.harmless_eval"),
    *("search.trials", "search.select"),
    *("refine.enabled", "refine.descents"),
    *("evaluation.markers", "evaluation.batch_size"),
    "export.kind",
)
_HEAD = """\
# Settings of a run: abliterate run -c FILE. Options behind a # have their defaults; remove the # to change one.
# abliterate config prints all options. The command line and the environment win over this file.

"""


@dataclass(frozen=True)
class Option:
    """One option of `configs/default.toml`: its dotted name, the lines of its comment, and its statement; both end a line."""

    name: str
    comment: str
    statement: str

    @property
    def key(self) -> str:
        """The name within the option's section."""
        return self.name.rpartition(".")[2]


def defaults_text() -> str:
    """The content of `configs/default.toml`."""
    return config_path(DEFAULTS).read_text(encoding="utf-8")


def all_options(settings: Settings) -> str:
    """`configs/default.toml` with the values of `settings`; an option that has its default stays as it is written there.

    The first line names the options that differ from their defaults.
    """
    values = settings.model_dump(mode="json")
    values["search"]["storage"] = without_password(settings.search.storage)
    defaults = tomllib.loads(defaults_text())
    text, changed = "", []
    for part in _parts(defaults_text().partition("\n")[2]):
        if isinstance(part, str):
            text += part
        elif (value := _value(part, values)) == _value(part, defaults):
            text += part.comment + part.statement
        else:
            text += part.comment + _assigned(part.key, value)
            changed.append(part.name)
    differing = f"these differ from their defaults: {', '.join(changed)}" if changed else "all have their defaults"
    return f"# Every option with the value in force; {differing}.\n{text}"


def first_options(model: str) -> str:
    """A short file for a model: the options of `FIRST` with their comments, all but the model commented out."""
    options = {part.name: part for part in _parts(defaults_text()) if isinstance(part, Option)}
    lines, section = [_HEAD], ""
    for option in map(options.__getitem__, FIRST):
        head = option.name.rpartition(".")[0]
        if head != section:
            lines.append(f"\n[{head}]\n")
            section = head
        lines.append(option.comment)
        lines.append(_assigned("model", model) if option.name == "model" else f"# {option.statement}")
    return "".join(lines)


def _parts(text: str) -> Iterator[str | Option]:
    """The file in order: its options, each with the comment above it, and the text between them."""
    section, comment, statement = "", "", ""
    for line in text.splitlines(keepends=True):
        if not statement and line.startswith("#"):
            comment += line
        elif not statement and (line.startswith("[") or not line.strip()):
            section = line.strip().strip("[]") if line.startswith("[") else section
            yield comment + line
            comment = ""
        else:
            statement += line
            if _is_whole(statement):
                key = statement.partition("=")[0].strip()
                yield Option(f"{section}.{key}" if section else key, comment, statement)
                comment = statement = ""
    yield comment


def _is_whole(statement: str) -> bool:
    """Whether a statement ends here; an array may go on over several lines."""
    try:
        tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _value(option: Option, values: Mapping[str, Any]) -> Any:
    section, _, key = option.name.rpartition(".")
    return (values[section] if section else values)[key]


def _assigned(key: str, value: Any) -> str:
    return f"{key} = {_inline(value)}\n"


def _inline(value: Any) -> str:
    """A value as TOML behind a key; tables stay within the line, as in the file of defaults."""
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_quoted(key)} = {_inline(entry)}" for key, entry in value.items())
        return f"{{ {entries} }}" if entries else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    return tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


def _quoted(key: str) -> str:
    return tomli_w.dumps({key: 0}).rpartition(" = ")[0]
