"""The command line: options, exit codes, and which pipeline each command runs.

Imports neither torch nor pydantic-settings at the top: `--help` must answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli_cache import CacheDir, Json, Text, cache_app
from abliterate.errors import FAILED, INTERRUPTED, AbliterateError, InputError, Interrupted

# Brackets would be read as Rich markup in help texts, so none appear there.
app = typer.Typer(
    name="abliterate",
    help="Remove one behaviour, by default refusal, from an open-weight language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")

# Not every command is a run, so these sentences must be true of all.
_KEPT = "a run keeps its finished trials and continues with --resume"

Model = Annotated[str, typer.Argument(help="Hub id, local directory, or demo. Left out: the setting model.")]
Config = Annotated[str, typer.Option("-c", "--config", help="TOML file, or a preset: quick, thorough.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting; repeatable.")]
Device = Annotated[Text, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Dtype = Annotated[Text, typer.Option(help="auto, float32, bfloat16 or float16.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from abliterate import __version__

        typer.echo(f"abliterate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    # Eager: otherwise a missing command is complained about first.
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    if debug:
        os.environ["ABLITERATE_DEBUG"] = "1"


@app.command()
def run(
    model: Model = "",
    trials: Annotated[int | None, typer.Option("-n", "--trials", help="Number of trials. Default 200.")] = None,
    startup_trials: Annotated[int | None, typer.Option(help="Random trials first. Default 30 % of all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    out: Annotated[Text, typer.Option("-o", "--out", help="Run directory. Default runs/MODEL-TIME.")] = None,
    config: Config = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    harmful: Annotated[Text, typer.Option(help="Prompts for the direction: file or dataset:split:column.")] = None,
    harmless: Annotated[Text, typer.Option(help="Harmless prompts for the direction.")] = None,
    harmful_eval: Annotated[Text, typer.Option(help="Harmful prompts for the scores.")] = None,
    harmless_eval: Annotated[Text, typer.Option(help="Harmless prompts for the scores.")] = None,
    markers: Annotated[Text, typer.Option(help="File of refusal markers, one a line.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time. Default: found by probes.")] = None,
    select: Annotated[Text, typer.Option(help="auto, knee, trial:N, kl<=X or refusals<=N.")] = None,
    export: Annotated[Text, typer.Option(help="merged, adapter or none.")] = None,
    push: Annotated[Text, typer.Option(metavar="REPO", help="Upload the export to this Hub repository, owner/name.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run directory.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew; the old run is kept renamed.")] = False,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Run even if less than half of what writes would be edited.")
    ] = False,
    storage: Annotated[Text, typer.Option(help="Optuna RDB URL instead of a journal file.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices of this machine to search on at once.")] = 1,
    cache_dir: CacheDir = None,
    as_json: Json = False,
    reference: Annotated[bool, typer.Option("--reference", help="Every efficiency off, for comparison.")] = False,
) -> None:
    """Find the best ablation of MODEL and export the result."""
    if resume and restart:
        raise InputError("The options --resume and --restart contradict each other; give one.")
    given = {
        "model": model or None,
        "seed": seed,
        "device": device,
        "out": out,
        "cache_dir": cache_dir,
        "load": {"dtypes": [dtype] if dtype else None, "allow_partial": allow_partial or None},
        "prompts": {
            "harmful": harmful,
            "harmless": harmless,
            "harmful_eval": harmful_eval,
            "harmless_eval": harmless_eval,
        },
        "search": {"trials": trials, "startup_trials": startup_trials, "storage": storage, "select": select},
        "evaluation": {"markers": markers, "batch_size": batch_size},
        "export": {"kind": export, "push": push},
    }
    from abliterate import commands

    flags = {"resume": resume, "restart": restart, "as_json": as_json, "reference": reference}
    commands.run(given, config, assignments or [], gpus=gpus, **flags)


@app.command()
def worker(
    run_directory: Annotated[Path | None, typer.Argument(metavar="RUN", help="Directory of the run to help.")] = None,
    storage: Annotated[str, typer.Option(help="Instead of RUN: the run's Optuna RDB URL.")] = "",
    study: Annotated[str, typer.Option(help="The study's name there; the run says it.")] = "",
    model: Annotated[Text, typer.Option(help="The model, where it lies elsewhere on this machine.")] = None,
    device: Device = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time. Default: found by probes.")] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Help a run on this device or machine: take trials of its budget until it is used."""
    own = {"model": model, "device": device, "cache_dir": cache_dir, "evaluation": {"batch_size": batch_size}}
    from abliterate import commands

    commands.work(run_directory, storage, study, own, as_json=as_json)


@app.command("tune-batch")
def tune_batch(
    model: Model = "",
    config: Config = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Measure which batch sizes MODEL runs best with here, and keep them for later runs."""
    given = {"model": model or None, "device": device, "cache_dir": cache_dir, "load": {"dtypes": [dtype] if dtype else None}}
    from abliterate import commands

    commands.tune_batch(given, config, assignments or [], as_json=as_json)


@app.command()
def inspect(
    model: Model = "",
    no_weights: Annotated[bool, typer.Option("--no-weights", help="From the config alone; nothing is measured.")] = False,
    config: Config = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Show what of MODEL would be edited, what would not and why, and what a run needs and costs."""
    given = {"model": model or None, "device": device, "cache_dir": cache_dir, "load": {"dtypes": [dtype] if dtype else None}}
    from abliterate import commands

    commands.inspect(given, config, assignments or [], weights=not no_weights, as_json=as_json)


@app.command()
def trials(run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")], as_json: Json = False) -> None:
    """Show the front of a run and all its trials."""
    from abliterate import commands

    commands.show_trials(run_directory, as_json=as_json)


@app.command()
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    trial: Annotated[int, typer.Option("--trial", help="Number of the trial.")],
    kind: Annotated[str, typer.Option("--kind", help="merged or adapter.")] = "merged",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to. Default RUN/model-trial-N.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also score the export on the run's prompts.")] = False,
    push: Annotated[str, typer.Option(metavar="REPO", help="Upload it to this Hub repository, owner/name.")] = "",
    as_json: Json = False,
) -> None:
    """Export any complete trial of a run, finished or not, and check its weights; needs neither prompts nor a GPU."""
    from abliterate import commands

    commands.export_trial(run_directory, trial, kind, out, push, verify=verify, as_json=as_json)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Write report.html of a run again."""
    from abliterate.report.html import write_report
    from abliterate.rundir import RunDirectory

    directory = RunDirectory(run_directory)
    write_report(directory.report, directory.read_result())
    path = str(directory.report)
    typer.echo(path if path.isprintable() else ascii(path)[1:-1])


def main() -> None:
    """Entry point: errors become one sentence on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console or a C locale can't encode ★ or ≥; a run must not die of a character.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Imported by PEFT where it is installed, and advises at once to install more; its errors still raise.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        odd = next((text for text in sys.argv[1:] if any("\ud800" <= character <= "\udfff" for character in text)), None)
        if odd is not None:
            raise InputError(f"The argument {odd} holds bytes that are no UTF-8 text; rename the file or folder.")
        app()
    except KeyboardInterrupt:
        _fail(f"interrupted; {_KEPT}.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Interrupted as error:
        _fail(str(error), error.exit_code)
    except AbliterateError as error:
        _debug()
        _fail(str(error), error.exit_code)
    except OSError as error:
        _debug()
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; mend that and repeat the command: {_KEPT}.", FAILED)
    except Exception as error:
        _debug()
        reason: Any = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        if _is_out_of_memory(error):
            reason = reason or "out of memory"
            _fail(f"there is too little memory ({reason}); free some and repeat the command: {_KEPT}.", FAILED)
        _fail(f"unexpected {type(error).__name__}: {reason}; run with abliterate --debug … and report it.", FAILED)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:  # then it isn't torch's, which is heavy to load
        return isinstance(error, MemoryError)
    from abliterate.model.memory import is_out_of_memory

    return is_out_of_memory(error)


def _debug() -> None:
    if os.environ.get("ABLITERATE_DEBUG"):
        import traceback

        traceback.print_exc()


def _fail(message: str, exit_code: int) -> None:
    try:
        from abliterate.console import show_error

        show_error(message)
    except MemoryError:  # where there is none left, not even Rich can be loaded
        sys.stderr.write(f"error: {message}\n")
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
