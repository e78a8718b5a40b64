"""The command line of `reproduce`. As light at import as `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli_cache import CacheDir, Json, Text


def reproduce(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe.json, or a run directory or export that has one.")],
    model: Annotated[str, typer.Option(help="The model, where the recipe's was a directory.")] = "",
    harmful: Annotated[Text, typer.Option(help="Prompts for the direction, where the recipe's were a file.")] = None,
    harmless: Annotated[Text, typer.Option(help="Harmless prompts for the direction.")] = None,
    harmful_eval: Annotated[Text, typer.Option(help="Harmful prompts for the scores.")] = None,
    harmless_eval: Annotated[Text, typer.Option(help="Harmless prompts for the scores.")] = None,
    markers: Annotated[Text, typer.Option(help="File of refusal markers.")] = None,
    chat_template: Annotated[Text, typer.Option(help="Chat template file.")] = None,
    kind: Annotated[str, typer.Option("--kind", help="merged, adapter or none. Default: the recipe's.")] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to. Default MODEL-reproduced.")] = None,
    device: Annotated[Text, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code, where the recipe needs it.")
    ] = False,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Make the model of a recipe again, without a search, and compare files and scores with it."""
    given = {
        "device": device,
        "cache_dir": cache_dir,
        "load": {"chat_template": chat_template, "trust_remote_code": trust_remote_code or None},
        "prompts": {"harmful": harmful, "harmless": harmless, "harmful_eval": harmful_eval, "harmless_eval": harmless_eval},
        "evaluation": {"markers": markers},
    }
    from abliterate import commands

    commands.reproduce_recipe(recipe, model, given, kind, out, as_json=as_json)
