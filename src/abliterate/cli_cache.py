"""The command line of the cache, and the options that it shares with other commands. As light at import as `cli`."""

from __future__ import annotations

from typing import Annotated

import typer

cache_app = typer.Typer(help="Look at and clear the cache of residuals.", no_args_is_help=True)

Text = str | None
Json = Annotated[bool, typer.Option("--json", help="JSON lines; the last one is the result.")]
Config = Annotated[str, typer.Option("-c", "--config", help="TOML file, or a preset: quick, thorough.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; repeatable.")]
Device = Annotated[Text, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Dtype = Annotated[Text, typer.Option(help="auto, float32, bfloat16 or float16.")]
CacheDir = Annotated[Text, typer.Option("--cache-dir", help="Where the cache lies.")]


@cache_app.command("ls")
def cache_ls(cache_dir: CacheDir = None, as_json: Json = False) -> None:
    """List the entries: what each is of, size, age."""
    from abliterate import cache_commands

    cache_commands.cache_ls(cache_dir or "", as_json=as_json)


@cache_app.command("clear")
def cache_clear(
    cache_dir: CacheDir = None,
    model: Annotated[str, typer.Option(help="Only entries of this model.")] = "",
    older_than: Annotated[float, typer.Option(help="Only entries older than this many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Delete entries that the cache wrote; nothing else is touched."""
    from abliterate import cache_commands

    cache_commands.cache_clear(cache_dir or "", model, older_than, yes=yes)


@cache_app.command("verify")
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Check every entry's checksum. Exit code 1 if one is not usable."""
    from abliterate import cache_commands

    cache_commands.cache_verify(cache_dir or "")


@cache_app.command("path")
def cache_path(cache_dir: CacheDir = None) -> None:
    """Print where the cache lies."""
    from abliterate import cache_commands

    typer.echo(str(cache_commands.cache_root(cache_dir or "")))
