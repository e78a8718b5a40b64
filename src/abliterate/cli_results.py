"""The command line of what is done with results: measuring a candidate, and talking to it. As light at import as `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli_cache import Assignments, CacheDir, Config, Device, Dtype, Json, Text


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
    from abliterate.benchmarks import Tasks
    from abliterate.evaluate_commands import evaluate as evaluate_candidate

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
    from abliterate.chat_commands import ChatOptions
    from abliterate.chat_commands import chat as start

    options = ChatOptions(trial, max_new_tokens, temperature, seed, response_prefix)
    start(target, options, given, assignments or [], as_json=as_json)
