"""How every command of the command line looks and is mistyped: its help, `--debug` anywhere, and the nearest command.

As light at import as `cli`.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from abliterate.artifacts.runs import holds_run, is_run
from abliterate.errors import InputError, as_command
from abliterate.files import expanded
from abliterate.model.names import DEMO

# What `--help` shows for a value of each type; Typer would show <str> and <list[str]>.
_VALUES: dict[Any, str] = {str: "TEXT", int: "N", float: "X", Path: "PATH", list[str]: "TEXT"}
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="General")]


def show_tracebacks(debug: bool) -> None:
    """Let errors show their tracebacks, here and in the processes that this one starts."""
    if debug:
        os.environ["ABLITERATE_DEBUG"] = "1"


def prepared(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the option `--debug`, and with `~` expanded in each of its options that is a path.

    The settings expand the paths that are settings.
    """

    @wraps(command)
    def call(*, debug: bool = False, **options: Any) -> None:
        show_tracebacks(debug)
        command(**{name: expanded(value) if isinstance(value, Path) else value for name, value in options.items()})

    # Typer reads the options from the signature and from the annotations, both evaluated.
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    every = [*signature.parameters.values(), option]
    call.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return call


class Command(TyperCommand):
    """A command whose help names values plainly, and whose --help stands in the panel "General"."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _name_values(self.params)

    def get_help_option(self, ctx: Any) -> Any:
        return _general(super().get_help_option(ctx))


class Group(TyperGroup):
    """A group of commands that says in one sentence which command a mistyped one may mean."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _name_values(self.params)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        return _general(option) if ctx.parent is not None else option  # the program itself has one panel of options

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)
        _name_values(params)  # with those for shell completion, which Typer adds later
        return params

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            raise _unknown(name, self.list_commands(ctx), [] if ctx.parent is None else [ctx.info_name])
        return super().resolve_command(ctx, args)


def _unknown(name: str, known: list[str], above: list[str]) -> InputError:
    """The error for a command that doesn't exist; `above` are the names of the groups in which it was looked for."""
    what = " ".join((*above, name))
    if not above and name != DEMO and (is_run(name) or holds_run(expanded(name))):
        return InputError(f"There is no command {name!r}; did you mean {as_command('chat', name)}, or trials, or report?")
    if not above and (name == DEMO or "/" in name or os.path.isdir(expanded(name))):
        return InputError(f"There is no command {name!r}; did you mean {as_command('run', name)}?")
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return InputError(f"There is no command {what!r}; did you mean {as_command(*above, near[0])}?")
    return InputError(f"There is no command {what!r}; {as_command(*above, '--help')} lists the commands.")


def _general(option: Any) -> Any:
    """The option --help in the panel "General", so that no panel holds --help alone."""
    if option is not None:
        option.rich_help_panel = "General"
        _name_values([option])
    return option


def _name_values(params: list[Any]) -> None:
    """Show no value for flags, and plain names for the values of options; arguments are named by their metavar alone."""
    for param in params:
        if param.param_type_name == "argument":
            param.display_type_rich = lambda ctx: ""
        elif getattr(param, "is_flag", False):
            param.metavar = ""
        elif param.metavar is None:
            annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
            param.metavar = _VALUES.get(annotation)
