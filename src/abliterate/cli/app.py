"""The command line: every command with its options.

Imports neither torch nor pydantic-settings at the top, because `--help` must answer at once.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import exit
from abliterate.errors import InputError

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
    from abliterate.cli import cache as cli_cache

    cli_cache.cache_ls(cache_dir or "", as_json=as_json)


@cache_app.command("clear")
def cache_clear(
    cache_dir: CacheDir = None,
    model: Annotated[str, typer.Option(help="Only entries of this model.")] = "",
    older_than: Annotated[float, typer.Option(help="Only entries older than this many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Delete entries that the cache wrote; nothing else is touched."""
    from abliterate.cli import cache as cli_cache

    cli_cache.cache_clear(cache_dir or "", model, older_than, yes=yes)


@cache_app.command("verify")
def cache_verify(cache_dir: CacheDir = None) -> None:
    """Check every entry's checksum. Exit code 1 if one is not usable."""
    from abliterate.cli import cache as cli_cache

    cli_cache.cache_verify(cache_dir or "")


@cache_app.command("path")
def cache_path(cache_dir: CacheDir = None) -> None:
    """Print where the cache lies."""
    from abliterate.cli import cache as cli_cache

    typer.echo(str(cli_cache.cache_root(cache_dir or "")))


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
    from abliterate.cli import reproduce as cli_reproduce

    cli_reproduce.reproduce_recipe(recipe, model, given, kind, out, as_json=as_json)


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The unedited model: Hub id, local directory, or demo.")],
    candidate: Annotated[
        str, typer.Argument(metavar="CANDIDATE", help="Model or adapter directory, RUN, or RUN:N for its trial N.")
    ],
    harmful_heldout: Annotated[Text, typer.Option(help="Harmful prompts: file or dataset:split:column.")] = None,
    harmless_heldout: Annotated[Text, typer.Option(help="Harmless prompts.")] = None,
    over_refusal: Annotated[Text, typer.Option(help="Harmless prompts that look harmful.")] = None,
    markers: Annotated[Text, typer.Option(help="File of refusal markers, one a line.")] = None,
    benchmark: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Task of lm-eval too; repeatable.")] = None,
    benchmark_limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task. Default: all.")] = None,
    benchmark_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own.")] = None,
    config: Config = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time. Default: found by probes.")] = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Measure CANDIDATE against BASE on prompts that neither directions nor a search have seen."""
    given = {
        "model": base,
        "device": device,
        "cache_dir": cache_dir,
        "load": {"dtypes": [dtype] if dtype else None},
        "prompts": {
            "harmful_heldout": harmful_heldout,
            "harmless_heldout": harmless_heldout,
            "over_refusal": over_refusal,
        },
        "evaluation": {"markers": markers, "batch_size": batch_size},
    }
    from abliterate.cli.evaluate import evaluate as evaluate_candidate
    from abliterate.evaluation.lm_eval import Tasks

    tasks = Tasks(tuple(benchmark or ()), benchmark_limit, benchmark_path)
    evaluate_candidate(candidate, given, config, assignments or [], tasks, as_json=as_json)


def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Run directory, or a Hub id, local directory, or demo.")],
    trial: Annotated[int | None, typer.Option("--trial", help="Of a run: another trial than it picked.")] = None,
    system: Annotated[Text, typer.Option(help="System prompt. Default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Longest answer. Default: the model's, or 2048.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token. Default: as the model is set.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what is drawn at random. Default: another each time.")] = None,
    response_prefix: Annotated[str, typer.Option(help="What every answer begins with.")] = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    cache_dir: CacheDir = None,
    as_json: Json = False,
) -> None:
    """Talk to a trial of RUN beside its base, or to MODEL; in a pipe every line is a message. The command /help shows more."""
    given = {
        "device": device,
        "cache_dir": cache_dir,
        "load": {"dtypes": [dtype] if dtype else None},
        "prompts": {"system": system},
    }
    from abliterate.cli.chat import ChatOptions
    from abliterate.cli.chat import chat as start

    options = ChatOptions(trial, max_new_tokens, temperature, seed, response_prefix)
    start(target, options, given, assignments or [], as_json=as_json)


# Brackets would be read as Rich markup in help texts, so none appear there.
app = typer.Typer(
    name="abliterate",
    help="Remove one behaviour, by default refusal, from an open-weight language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cache_app, name="cache")

app.command()(reproduce)

app.command()(evaluate)

app.command()(chat)

_MODEL = "Hub id, local directory, or demo. Left out: the setting model."

Model = Annotated[str, typer.Argument(help=_MODEL)]

Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=f"{_MODEL} Several: one run each.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from abliterate._version import __version__

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
    models: Models = None,
    trials: Annotated[int | None, typer.Option("-n", "--trials", help="Number of trials. Default 200.")] = None,
    startup_trials: Annotated[int | None, typer.Option(help="Random trials first. Default 30 % of all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    out: Annotated[
        Text, typer.Option("-o", "--out", help="Run directory; of several, the one they lie in. Default runs/MODEL-TIME.")
    ] = None,
    listed: Annotated[Path | None, typer.Option("--list", metavar="FILE", help="TOML file of several runs.")] = None,
    config: Config = "",
    assignments: Assignments = None,
    device: Device = None,
    dtype: Dtype = None,
    harmful: Annotated[Text, typer.Option(help="Prompts for the direction: file or dataset:split:column.")] = None,
    harmless: Annotated[Text, typer.Option(help="Harmless prompts for the direction.")] = None,
    harmful_eval: Annotated[Text, typer.Option(help="Harmful prompts for the scores.")] = None,
    harmless_eval: Annotated[Text, typer.Option(help="Harmless prompts for the scores.")] = None,
    harmful_heldout: Annotated[Text, typer.Option(help="Harmful prompts that only the final measurement sees.")] = None,
    harmless_heldout: Annotated[Text, typer.Option(help="Harmless prompts of that kind.")] = None,
    over_refusal: Annotated[Text, typer.Option(help="Harmless prompts that look harmful, for the final measurement.")] = None,
    markers: Annotated[Text, typer.Option(help="File of refusal markers, one a line.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time. Default: found by probes.")] = None,
    objectives: Annotated[
        list[str] | None,
        typer.Option(
            "--objective", metavar="NAME", help="Scorer, or FILE.py:CLASS; NAME:maximize. Repeat. Default refusals and kl."
        ),
    ] = None,
    select: Annotated[Text, typer.Option(help="auto, knee, trial:N, kl<=X, refusals<=N, NAME<=X or NAME>=X.")] = None,
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
    """Find the best ablation of MODEL and export the result; of several models, one after the other."""
    if resume and restart:
        raise InputError("The options --resume and --restart contradict each other; give one.")
    given = {
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
            "harmful_heldout": harmful_heldout,
            "harmless_heldout": harmless_heldout,
            "over_refusal": over_refusal,
        },
        "search": {
            "objectives": objectives or None,
            "trials": trials,
            "startup_trials": startup_trials,
            "storage": storage,
            "select": select,
        },
        "evaluation": {"markers": markers, "batch_size": batch_size},
        "export": {"kind": export, "push": push},
    }
    from abliterate.cli import batch
    from abliterate.cli import run as cli_run

    flags = cli_run.RunFlags(gpus, resume, restart, as_json, reference)
    if listed or len(models or []) > 1:
        batch.run(models or [], listed, cli_run.options_of(given, assignments or []), config, flags)
    else:
        cli_run.run({**given, "model": models[0] if models else None}, config, assignments or [], flags)


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
    from abliterate.cli import worker

    worker.work(run_directory, storage, study, own, as_json=as_json)


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
    from abliterate.cli import tune_batch

    tune_batch.tune_batch(given, config, assignments or [], as_json=as_json)


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
    from abliterate.cli import inspect as cli_inspect

    cli_inspect.inspect(given, config, assignments or [], weights=not no_weights, as_json=as_json)


@app.command()
def trials(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    front: Annotated[bool, typer.Option("--front", help="Only trials on the front.")] = False,
    state: Annotated[str, typer.Option(help="Only complete, stopped or failed ones.")] = "",
    max_kl: Annotated[float | None, typer.Option(help="Only trials with a mean KL of at most this.")] = None,
    max_refusals: Annotated[int | None, typer.Option(help="Only complete trials with at most this many refusals.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="NAME<=X", help="Only trials to which another scorer gave so much; or >=.")
    ] = None,
    sort: Annotated[str, typer.Option(help="number, kl, refusals, seconds or another scorer's name.")] = "number",
    limit: Annotated[int | None, typer.Option(help="Only the first so many, in that order.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line a trial, for spreadsheets.")] = False,
    as_json: Json = False,
) -> None:
    """Show the front of a run and all its trials, or those that the options name; also while the run goes on."""
    from abliterate.cli.trials import TrialFilter, show_trials

    wanted = TrialFilter(front, state, max_kl, max_refusals, sort, limit, tuple(where or ()))
    show_trials(run_directory, wanted, as_json=as_json, as_csv=as_csv)


@app.command()
def export(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    trial: Annotated[int, typer.Option("--trial", help="Number of the trial.")],
    kind: Annotated[str, typer.Option("--kind", help="merged or adapter.")] = "merged",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to. Default RUN/model-trial-N.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also score the export on the run's prompts.")] = False,
    push: Annotated[str, typer.Option(metavar="REPO", help="Upload it to this Hub repository, owner/name.")] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code, where the run did.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Export any complete trial of a run, finished or not, and check its weights; needs neither prompts nor a GPU."""
    from abliterate.cli import export as cli_export

    trust = trust_remote_code
    cli_export.export_trial(run_directory, trial, kind, out, push, verify=verify, trust=trust, as_json=as_json)


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    png: Annotated[Path | None, typer.Option("--png", metavar="DIR", help="Also write the plots as images there.")] = None,
    terminal: Annotated[
        bool | None, typer.Option("--terminal/--no-terminal", help="Show it here, too. Default: on a terminal.")
    ] = None,
) -> None:
    """Write report.html of a run again, and show it here; reads the run directory only."""
    from abliterate.cli import report as cli_report

    cli_report.report(run_directory, png, sys.stdout.isatty() if terminal is None else terminal)


def main() -> None:
    """Entry point: errors become one sentence on standard error and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A Windows console or a C locale can't encode ★ or ≥; a run must not die of a character.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Imported by PEFT where it is installed, and advises at once to install more; its errors still raise.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    exit.run_to_its_end(_app)


def _app() -> None:
    odd = next((text for text in sys.argv[1:] if any("\ud800" <= character <= "\udfff" for character in text)), None)
    if odd is not None:
        raise InputError(f"The argument {odd} holds bytes that are no UTF-8 text; rename the file or folder.")
    app()


if __name__ == "__main__":
    main()
