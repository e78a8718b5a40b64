"""The options that several commands share, each with the panel of `--help` that it stands in.

As light at import as `cli`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from abliterate.files import expanded

for_model = partial(typer.Option, rich_help_panel="Model")
for_prompts = partial(typer.Option, rich_help_panel="Prompts")
for_search = partial(typer.Option, rich_help_panel="Search")
for_answers = partial(typer.Option, rich_help_panel="Answers")
for_filters = partial(typer.Option, rich_help_panel="Filters")
for_output = partial(typer.Option, rich_help_panel="Output")
for_efficiency = partial(typer.Option, rich_help_panel="Efficiency")
for_general = partial(typer.Option, rich_help_panel="General")

Text = str | None
Device = Annotated[Text, for_model("--device", help="Device: auto, cpu, cuda, cuda:1, mps, …")]
Dtype = Annotated[Text, for_model("--dtype", help="Number format: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, for_efficiency("--batch-size", help="Prompts at a time. Default: measured.")]
CacheDir = Annotated[Text, for_efficiency("--cache-dir", help="Folder of the cache.")]
Json = Annotated[bool, for_output("--json", help="Write JSON lines; the last is the result or error.")]
Config = Annotated[str, for_general("-c", "--config", help="TOML file, or a preset: quick, thorough.")]
Assignments = Annotated[
    list[str] | None, for_general("--set", metavar="KEY=VALUE", help="Set any setting of the configuration; repeatable.")
]


def shared(model: Text, device: Text, dtype: Text, cache_dir: Text) -> dict[str, Any]:
    """The settings behind the options that most commands share; None stands for an option that was not given."""
    return {"model": model or None, "device": device, "cache_dir": cache_dir, "load": {"dtypes": [dtype] if dtype else None}}


def expanding_paths(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `~` expanded in each of its options that is a path; the settings expand those that are settings."""

    @wraps(command)
    def call(**options: Any) -> None:
        command(**{name: expanded(value) if isinstance(value, Path) else value for name, value in options.items()})

    return call


class Command(TyperCommand):
    """A command whose --help stands in the panel "General", so that no panel holds --help alone."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = "General"  # type: ignore[attr-defined]
        return option
