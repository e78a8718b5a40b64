"""`abliterate config`: print every setting with its comment, or write a short file of settings for a model.

As light at import as `cli`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli.command import Command, Debug, Group, prepared, show_tracebacks
from abliterate.cli.options import Assignments, Config, for_general
from abliterate.errors import InputError, as_command

config_app = typer.Typer(
    help="Print every setting with its comment and its default, or begin a file of settings.",
    cls=Group,
    invoke_without_command=True,
    subcommand_metavar="[init FILE]",
)


@config_app.callback()
def _show(ctx: typer.Context, config: Config = "", assignments: Assignments = None, debug: Debug = False) -> None:
    """Print every setting with its comment: the defaults or, with -c or --set, the values in force."""
    show_tracebacks(debug)
    given = bool(config or assignments)
    if ctx.invoked_subcommand is not None:
        if given:
            raise InputError("The options -c and --set print settings, and abliterate config init writes defaults; omit them.")
        return
    from abliterate.settings.commented import all_options, defaults_text
    from abliterate.settings.sources import load_settings, parse_assignments

    text = all_options(load_settings(config, parse_assignments(assignments or []))) if given else defaults_text()
    sys.stdout.write(text)


@config_app.command("init", cls=Command)
@prepared
def _init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file to write.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local directory, or demo. Default: none; run names it.")
    ] = "",
    force: Annotated[bool, for_general("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a short commented TOML file for MODEL, to edit and to use with abliterate run -c FILE."""
    from abliterate.artifacts.runs import check_no_mistyped_run
    from abliterate.files import write_atomically
    from abliterate.model.names import check_model_name
    from abliterate.settings.commented import first_options
    from abliterate.settings.sources import load_settings

    if model:
        check_no_mistyped_run(model)
        check_model_name(model)
    if file.is_dir():
        raise InputError(f"The path {file} is a directory; name a file in it, such as {file / 'run.toml'}.")
    if file.exists() and not force:
        raise InputError(f"The file {file} exists; give another name, or --force to replace it.")
    if not file.absolute().parent.is_dir():
        raise InputError(f"There is no directory {file.absolute().parent} to write {file.name} to; make it, or give another.")
    # A directory's path is written in full, so that the file can be used from anywhere.
    write_atomically(file, first_options(load_settings("", {"model": model}).model))
    words = ("run", "-c", file) if model else ("run", "MODEL", "-c", file)
    print(f"wrote {file}; edit it, then start with {as_command(*words)}")
