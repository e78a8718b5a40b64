"""The command line: every command with its options. It has over 500 lines, because all options of all commands stand here.

Imports neither torch nor pydantic-settings at the top, because `--help` must answer at once.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from abliterate import ranks
from abliterate.cli import exit
from abliterate.cli.cache import cache_app
from abliterate.cli.command import Command, Group, prepared, show_tracebacks
from abliterate.cli.completion import run_directories, runs_or_demo
from abliterate.cli.config import config_app
from abliterate.cli.options import (
    Assignments,
    BatchSize,
    CacheDir,
    Config,
    Device,
    Dtype,
    Harmful,
    HarmfulEval,
    HarmfulHeldout,
    Harmless,
    HarmlessEval,
    HarmlessHeldout,
    Json,
    Live,
    Markers,
    Model,
    Models,
    NoOpen,
    OverRefusal,
    RecipePath,
    Run,
    Text,
    for_answers,
    for_efficiency,
    for_filters,
    for_model,
    for_output,
    for_prompts,
    for_search,
    for_set,
    for_trial,
    prompt_settings,
    shared,
)
from abliterate.errors import InputError
from abliterate.terminal import streams


def reproduce(
    recipe: RecipePath,
    model: Annotated[str, for_model(help="The model, if the recipe's model was a directory.")] = "",
    device: Device = None,
    chat_template: Annotated[Text, for_model(help="Chat template file, if the recipe used one.")] = None,
    trust_remote_code: Annotated[
        bool, for_model("--trust-remote-code", help="Run the model's own code, if the recipe needs it.")
    ] = False,
    harmful: Annotated[
        Text, for_prompts(metavar="SOURCE", help="Harmful prompts for the direction, if the recipe's were a file.")
    ] = None,
    harmless: Annotated[Text, for_prompts(metavar="SOURCE", help="Harmless prompts for the direction, likewise.")] = None,
    harmful_eval: Annotated[Text, for_prompts(metavar="SOURCE", help="Harmful prompts for the scores, likewise.")] = None,
    harmless_eval: Annotated[Text, for_prompts(metavar="SOURCE", help="Harmless prompts for the scores, likewise.")] = None,
    markers: Annotated[Text, for_prompts(metavar="FILE", help="File of refusal markers, if the recipe used one.")] = None,
    kind: Annotated[str, for_output("--kind", help="Kind of export: merged, adapter or none. Default: the recipe's.")] = "",
    out: Annotated[Path | None, for_output("-o", "--out", help="Folder of the export. Default: MODEL-reproduced.")] = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
) -> None:
    """Make the model of a recipe again without a search, and compare its files and scores with the recipe's."""
    given = {
        "device": device,
        "cache_dir": cache_dir,
        "load": {"chat_template": chat_template, "trust_remote_code": trust_remote_code or None},
        "prompts": {"harmful": harmful, "harmless": harmless, "harmful_eval": harmful_eval, "harmless_eval": harmless_eval},
        "evaluation": {"markers": markers},
    }
    from abliterate.cli import checks

    checks.check_recipe(recipe)
    from abliterate.cli import reproduce as cli_reproduce

    cli_reproduce.reproduce_recipe(recipe, model, given, kind, out, as_json=as_json)


_for_benchmarks = partial(typer.Option, rich_help_panel="Benchmarks")


def evaluate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The unedited model: Hub id, local directory, or demo.")],
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="CANDIDATE",
            help="Model or adapter directory, RUN, or RUN:N for its trial N.",
            autocompletion=runs_or_demo,
        ),
    ],
    device: Device = None,
    dtype: Dtype = None,
    harmful_heldout: HarmfulHeldout = None,
    harmless_heldout: HarmlessHeldout = None,
    over_refusal: OverRefusal = None,
    markers: Markers = None,
    benchmark: Annotated[
        list[str] | None, _for_benchmarks(metavar="TASK", help="Also run this task of lm-eval; repeatable.")
    ] = None,
    benchmark_limit: Annotated[int | None, _for_benchmarks(min=1, help="Questions of each task. Default: all.")] = None,
    benchmark_path: Annotated[Path | None, _for_benchmarks(help="Folder with your own tasks.")] = None,
    as_json: Json = False,
    batch_size: BatchSize = None,
    cache_dir: CacheDir = None,
    config: Config = "",
    assignments: Assignments = None,
) -> None:
    """Measure CANDIDATE against BASE on prompts that neither the directions nor a search have seen."""
    given = shared(base, device, dtype, cache_dir) | {
        "prompts": {
            "harmful_heldout": harmful_heldout,
            "harmless_heldout": harmless_heldout,
            "over_refusal": over_refusal,
        },
        "evaluation": {"markers": markers, "batch_size": batch_size},
    }
    from abliterate.cli import checks

    checks.check_evaluate(candidate, given, config, assignments or [])
    from abliterate.cli import evaluate as cli_evaluate
    from abliterate.evaluation.lm_eval import Tasks

    tasks = Tasks(tuple(benchmark or ()), benchmark_limit, benchmark_path)
    cli_evaluate.evaluate(candidate, given, config, assignments or [], tasks, as_json=as_json)


def chat(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="Run directory, or a Hub id, local directory, or demo.", autocompletion=runs_or_demo
        ),
    ],
    trial: Annotated[int | None, for_trial(help="Trial of RUN. Default: the trial that the run selected.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    system: Annotated[Text, for_answers(help="System prompt. Default: the run's.")] = None,
    max_new_tokens: Annotated[
        int, for_answers(min=0, show_default=False, help="Length limit of an answer in tokens. Default: the model's, or 2048.")
    ] = 0,
    temperature: Annotated[
        float | None, for_answers(help="Sampling temperature; 0 always takes the likeliest token. Default: the model's.")
    ] = None,
    seed: Annotated[int | None, for_answers(min=0, help="Seed of the sampling. Default: a new one each time.")] = None,
    response_prefix: Annotated[str, for_answers(help="Text that every answer begins with.")] = "",
    as_json: Json = False,
    cache_dir: CacheDir = None,
    assignments: Annotated[
        list[str] | None,
        for_set(help="Set a setting of load, or prompts.system, response.thinking_blocks or response.answer_tags; repeatable."),
    ] = None,
) -> None:
    """Talk to a trial of RUN beside its base, or to MODEL; see /help. In a pipe, each line is a message or a command."""
    given = shared(None, device, dtype, cache_dir) | {"prompts": {"system": system}}
    from abliterate.cli import checks

    checks.check_chat(target, trial)
    from abliterate.cli import chat as cli_chat

    options = cli_chat.ChatOptions(trial, max_new_tokens, temperature, seed, response_prefix)
    cli_chat.chat(target, options, given, assignments or [], as_json=as_json)


# Brackets would be read as Rich markup in help texts, so none appear there.
app = typer.Typer(
    name="abliterate",
    help="Remove one behaviour, by default refusal, from an open-weight language model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(show: bool) -> None:
    if show:
        from abliterate._version import __version__

        typer.echo(f"abliterate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; also after the command.")] = False,
    # Eager: otherwise Typer complains about a missing command first.
    version: Annotated[
        bool, typer.Option("-V", "--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    if ranks.launched() > 1 and ctx.invoked_subcommand != "run":
        raise InputError("Under torchrun only abliterate run works; start this command without it.")
    show_tracebacks(debug)


def run(
    models: Models = None,
    listed: Annotated[Path | None, for_model("--list", metavar="FILE", help="TOML file that lists several runs.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    allow_partial: Annotated[
        bool, for_model("--allow-partial", help="Run even if less than half of the writing parameters are edited.")
    ] = False,
    harmful: Harmful = None,
    harmless: Harmless = None,
    harmful_eval: HarmfulEval = None,
    harmless_eval: HarmlessEval = None,
    harmful_heldout: HarmfulHeldout = None,
    harmless_heldout: HarmlessHeldout = None,
    over_refusal: OverRefusal = None,
    markers: Markers = None,
    trials: Annotated[
        int | None, for_search("-n", "--trials", help="Number of trials. Default: 10; without refinement give 200.")
    ] = None,
    refine: Annotated[
        bool | None, for_search("--refine/--no-refine", help="Refine the front by gradient after the search. Default: yes.")
    ] = None,
    startup_trials: Annotated[int | None, for_search(help="Random trials at the start. Default: 30 % of all.")] = None,
    seed_from: Annotated[
        Text,
        for_search(
            "--seed-from",
            metavar="RUN",
            help="Run whose search's best trials are measured again first; of the same model or family. Default: none.",
            autocompletion=run_directories,
        ),
    ] = None,
    seed: Annotated[int | None, for_search(help="Seed of the search. Default: 0.")] = None,
    objectives: Annotated[
        list[str] | None,
        for_search(
            "--objective",
            metavar="NAME",
            help="Scorer, or FILE.py:CLASS; NAME:maximize to maximize it. Repeatable. Default: unanswered and kl.",
        ),
    ] = None,
    select: Annotated[
        Text,
        for_search(
            metavar="RULE",
            help="Rule that selects a trial: auto, knee, trial:N, kl<=X, unanswered<=N, NAME<=X or NAME>=X. Default: auto.",
        ),
    ] = None,
    storage: Annotated[
        Text, for_search(metavar="URL", help="Optuna RDB URL of the study. Default: a journal file in the run directory.")
    ] = None,
    out: Annotated[
        Text,
        for_output(
            "-o",
            "--out",
            metavar="DIR",
            help="Run directory; for several models, its parent. Default: runs/MODEL-TIME.",
            autocompletion=run_directories,
        ),
    ] = None,
    resume: Annotated[bool, for_output("--resume", help="Continue the run in the run directory.")] = False,
    restart: Annotated[bool, for_output("--restart", help="Start anew; the old run is renamed and kept.")] = False,
    export: Annotated[
        Text, for_output(metavar="KIND", help="Kind of export: merged, adapter or none. Default: merged.")
    ] = None,
    push: Annotated[
        Text, for_output(metavar="REPO", help="Upload the export to this Hub repository, owner/name. Default: no upload.")
    ] = None,
    yes: Annotated[bool, for_output("--yes", "-y", help="Export the proposed trial without asking.")] = False,
    wait: Annotated[
        float, for_output("--wait", min=0, help="Minutes after which it is exported if nobody answers; 0: never.")
    ] = 10.0,
    as_json: Json = False,
    batch_size: BatchSize = None,
    gpus: Annotated[int, for_efficiency(min=1, help="Devices of this machine to search on at once; unmeasured on GPUs.")] = 1,
    cache_dir: CacheDir = None,
    live: Live = False,
    no_open: NoOpen = False,
    reference: Annotated[
        bool, for_efficiency("--reference", help="Turn efficiencies off, to compare with plain generate.")
    ] = False,
    config: Config = "",
    assignments: Assignments = None,
) -> None:
    """Search for the best ablation of MODEL and export the edited model; several models run one after the other."""
    if resume and restart:
        raise InputError("The options --resume and --restart contradict each other; give one.")
    if ranks.launched() > 1 and (gpus > 1 or listed is not None or len(models or ()) > 1 or device not in (None, "auto")):
        raise InputError(
            "Under torchrun all processes work on one run of one model, each on a device of its own; leave --gpus, --device, "
            "--list and further models out."
        )
    prompts = prompt_settings(
        harmful, harmless, harmful_eval, harmless_eval, harmful_heldout, harmless_heldout, over_refusal, markers
    )
    given = {
        "seed": seed,
        "device": device,
        "out": out,
        "cache_dir": cache_dir,
        "load": {"dtypes": [dtype] if dtype else None, "allow_partial": allow_partial or None},
        "prompts": prompts["prompts"],
        "search": {
            "objectives": objectives or None,
            "trials": trials,
            "startup_trials": startup_trials,
            "seed_from": seed_from,
            "storage": storage,
            "select": select,
        },
        "refine": {"enabled": refine},
        "evaluation": {**prompts["evaluation"], "batch_size": batch_size},
        "export": {"kind": export, "push": push},
    }
    from abliterate.cli import batch, checks
    from abliterate.cli import run as cli_run
    from abliterate.settings.sources import options_of

    checks.check_live(live=live, no_open=no_open)
    flags = cli_run.RunFlags(gpus, resume, restart, as_json, reference, yes, wait, live, not no_open)
    if listed or len(models or []) > 1:
        batch.run(models or [], listed, options_of(given, assignments or []), config, flags)
    else:
        cli_run.run({**given, "model": models[0] if models else None}, config, assignments or [], flags)


def inspect(
    model: Model = "",
    no_weights: Annotated[bool, for_model("--no-weights", help="Read the config alone and measure nothing.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    harmful_eval: HarmfulEval = None,
    harmless_eval: HarmlessEval = None,
    harmful_heldout: HarmfulHeldout = None,
    harmless_heldout: HarmlessHeldout = None,
    over_refusal: OverRefusal = None,
    markers: Markers = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    config: Config = "",
    assignments: Assignments = None,
) -> None:
    """Show which modules of MODEL would be edited, which would not and why, and what a run needs and costs."""
    given = shared(model, device, dtype, cache_dir) | prompt_settings(
        harmful, harmless, harmful_eval, harmless_eval, harmful_heldout, harmless_heldout, over_refusal, markers
    )
    from abliterate.cli import checks

    checks.check_given("inspect", given, config, assignments or [])
    from abliterate.cli import inspect as cli_inspect

    cli_inspect.inspect(given, config, assignments or [], weights=not no_weights, as_json=as_json)


def tune_batch(
    model: Model = "",
    device: Device = None,
    dtype: Dtype = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    harmful_eval: HarmfulEval = None,
    harmless_eval: HarmlessEval = None,
    harmful_heldout: HarmfulHeldout = None,
    harmless_heldout: HarmlessHeldout = None,
    over_refusal: OverRefusal = None,
    markers: Markers = None,
    as_json: Json = False,
    cache_dir: CacheDir = None,
    config: Config = "",
    assignments: Assignments = None,
) -> None:
    """Measure the batch sizes at which MODEL is fastest on this machine, and keep them for later runs."""
    given = shared(model, device, dtype, cache_dir) | prompt_settings(
        harmful, harmless, harmful_eval, harmless_eval, harmful_heldout, harmless_heldout, over_refusal, markers
    )
    from abliterate.cli import checks

    checks.check_given("tune-batch", given, config, assignments or [])
    from abliterate.cli import tune_batch

    tune_batch.tune_batch(given, config, assignments or [], as_json=as_json)


def trials(
    run_directory: Run,
    front: Annotated[bool, for_filters("--front", help="Only trials on the front.")] = False,
    state: Annotated[str, for_filters(help="Only trials in this state: complete, stopped (pruned) or failed.")] = "",
    max_kl: Annotated[float | None, for_filters(help="Only trials with at most this mean KL.")] = None,
    max_refusals: Annotated[int | None, for_filters(help="Only complete trials with at most this many refusals.")] = None,
    where: Annotated[
        list[str] | None, for_filters(metavar="NAME<=X", help="Only trials whose score NAME is at most X; or NAME>=X.")
    ] = None,
    sort: Annotated[str, for_filters(help="Order: number, kl, unanswered, refusals, seconds or a scorer's name.")] = "number",
    limit: Annotated[int | None, for_filters(help="Show at most this many trials.")] = None,
    as_csv: Annotated[bool, for_output("--csv", help="Write the trials as CSV, for spreadsheets.")] = False,
    as_json: Json = False,
) -> None:
    """Show the trials of a run and its front; filters leave trials out. Works while the run goes on, too."""
    from abliterate.cli.trials import TrialFilter, show_trials

    wanted = TrialFilter(front, state, max_kl, max_refusals, sort, limit, tuple(where or ()))
    show_trials(run_directory, wanted, as_json=as_json, as_csv=as_csv)


def report(
    run_directory: Run,
    png: Annotated[Path | None, for_output("--png", metavar="DIR", help="Also write the plots as images there.")] = None,
    terminal: Annotated[
        bool | None, for_output("--terminal/--no-terminal", help="Also show the report here. Default: on a terminal.")
    ] = None,
    live: Live = False,
    no_open: NoOpen = False,
) -> None:
    """Write report.html of a run again and show the report here; no model is loaded."""
    from abliterate.cli import checks

    checks.check_run_directory(run_directory)
    checks.check_live(live=live, no_open=no_open)
    if live:
        if png is not None or terminal:
            raise InputError(
                "The option --live writes no files and shows the report in a browser; leave --png and --terminal out."
            )
        from abliterate.cli import live as cli_live

        cli_live.watch(run_directory, may_open=not no_open)
        return
    from abliterate.cli import report as cli_report

    cli_report.report(run_directory, png, sys.stdout.isatty() if terminal is None else terminal)


def compare(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN RUN", help="Two or more run directories.")],
    select: Annotated[str, for_search(help="Rule that names the best trial. Default: that of the runs, or auto.")] = "",
    out: Annotated[
        Path | None, for_output("-o", "--out", metavar="FILE.html", help="Also write the comparison as a page. Default: none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the fronts of several runs together, which trial is the best, and in which settings the runs differ."""
    from abliterate.cli import compare as cli_compare

    cli_compare.compare_runs(run_directories, out, select, as_json=as_json)


def export(
    run_directory: Run,
    trial: Annotated[int, for_trial(help="Number of a complete trial.")],
    trust_remote_code: Annotated[
        bool, for_model("--trust-remote-code", help="Run the model's own code, if the run did.")
    ] = False,
    kind: Annotated[str, for_output("--kind", help="Kind of export: merged or adapter.")] = "merged",
    gguf: Annotated[
        Path | None, for_output("--gguf", metavar="FILE", help="Edit a copy of this GGUF file of the model instead.")
    ] = None,
    gguf_type: Annotated[
        str, for_output("--gguf-type", metavar="TYPE", help="Type of edited tensors. Default: theirs; below 8 bits, Q8_0.")
    ] = "",
    out: Annotated[
        Path | None,
        for_output(
            "-o",
            "--out",
            help="Folder or GGUF file of the export. Default: RUN/model-trial-N[.gguf].",
        ),
    ] = None,
    verify: Annotated[bool, for_output("--verify", help="Also score the export on the run's prompts.")] = False,
    push: Annotated[str, for_output(metavar="REPO", help="Upload the export to this Hub repository, owner/name.")] = "",
    as_json: Json = False,
) -> None:
    """Export any complete trial of a finished or running run and check its weights; needs no prompts and no GPU."""
    from abliterate.cli import checks

    base = checks.checked_gguf(gguf, kind, push, out, verify=verify) if gguf is not None or gguf_type else None
    checks.check_export(run_directory, trial, kind, push)
    from abliterate.cli import export as cli_export

    trust = trust_remote_code
    if base is not None:
        cli_export.export_gguf(run_directory, trial, base, gguf_type, out, trust=trust, as_json=as_json)
        return
    cli_export.export_trial(run_directory, trial, kind, out, push, verify=verify, trust=trust, as_json=as_json)


def worker(
    run_directory: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Directory of the run to help.", autocompletion=run_directories)
    ] = None,
    model: Annotated[Text, for_model(help="The model, if it lies elsewhere on this machine. Default: the run's.")] = None,
    device: Device = None,
    storage: Annotated[str, for_search(help="The run's Optuna RDB URL, instead of RUN.")] = "",
    study: Annotated[str, for_search(help="Name of the study there, which the run directory's file study.name holds.")] = "",
    as_json: Json = False,
    batch_size: BatchSize = None,
    cache_dir: CacheDir = None,
    assignments: Annotated[
        list[str] | None, for_set(help="Set a setting of this machine, such as load.offload_folder; repeatable.")
    ] = None,
    end_with_input: Annotated[bool, typer.Option("--end-with-input", hidden=True)] = False,
) -> None:
    """Help a run on this device or machine: take trials from its budget until the budget is used up."""
    own = {"model": model, "device": device, "cache_dir": cache_dir, "evaluation": {"batch_size": batch_size}}
    from abliterate.cli import checks

    checks.check_run_directory(run_directory)
    from abliterate.cli import worker

    worker.work(run_directory, storage, study, own, assignments or [], as_json=as_json, end_with_input=end_with_input)


def doctor(as_json: Json = False, cache_dir: CacheDir = None) -> None:
    """Check this installation and machine: versions, devices, memory, cache, Hub token, extras, disk."""
    from abliterate.cli import doctor as cli_doctor

    cli_doctor.doctor(cache_dir, as_json=as_json)


# The order of `abliterate --help`: that in which a person meets the commands.
for _command in (run, inspect, tune_batch, trials, report, compare, chat, evaluate, export, reproduce, worker, doctor):
    app.command(cls=Command)(prepared(_command))

app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Entry point: an error becomes one sentence on standard error and an exit code."""
    streams.prepare()
    # PEFT imports bitsandbytes if it is installed, and that logs advice to install more; its errors still raise.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    exit.run_to_its_end(_app)


def _app() -> None:
    undecodable = next((text for text in sys.argv[1:] if any("\ud800" <= letter <= "\udfff" for letter in text)), None)
    if undecodable is not None:
        raise InputError(f"The argument {undecodable} is not valid UTF-8; rename the file or folder.")
    app(prog_name="abliterate")  # also under python -m abliterate, for its help and for shell completion


if __name__ == "__main__":
    main()
