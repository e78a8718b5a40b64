"""The options that several commands share, each with the panel of `--help` that it stands in.

As light at import as `cli`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli.completion import preset_names, run_directories, trial_numbers

for_model = partial(typer.Option, rich_help_panel="Model")
for_prompts = partial(typer.Option, rich_help_panel="Prompts")
for_search = partial(typer.Option, rich_help_panel="Search")
for_answers = partial(typer.Option, rich_help_panel="Answers")
for_filters = partial(typer.Option, rich_help_panel="Filters")
for_output = partial(typer.Option, rich_help_panel="Output")
for_efficiency = partial(typer.Option, rich_help_panel="Efficiency")
for_general = partial(typer.Option, rich_help_panel="General")
from_prompts = partial(for_prompts, metavar="SOURCE")

Text = str | None
_MODEL = "Hub id, local directory, or demo. Default: the model in the settings."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Models = Annotated[list[str] | None, typer.Argument(metavar="MODEL", help=f"{_MODEL} Several models: one run each.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", autocompletion=run_directories)]
_RECIPE = "recipe.json, or a run directory or export that has one."
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help=_RECIPE, autocompletion=run_directories)]
# A trial of the run that an argument names.
for_trial = partial(for_model, "--trial", autocompletion=trial_numbers)

Device = Annotated[Text, for_model("--device", metavar="NAME", help="Device: auto, cpu, cuda, cuda:1, mps, … Default: auto.")]
Dtype = Annotated[
    Text,
    for_model(
        "--dtype",
        metavar="NAME",
        help="Number format: auto, float32, bfloat16 or float16. Default: the first of auto, bfloat16 and float32 that works.",
    ),
]
BatchSize = Annotated[int | None, for_efficiency("--batch-size", help="Prompts at a time. Default: measured.")]
CacheDir = Annotated[
    Text, for_efficiency("--cache-dir", metavar="DIR", help="Folder of the cache. Default: that of abliterate cache path.")
]
Json = Annotated[bool, for_output("--json", help="Write JSON lines; the last is the result or error.")]
Live = Annotated[bool, for_output("--live", help="Show the report in a browser while the run goes on.")]
NoOpen = Annotated[bool, for_output("--no-open", help="With --live, only print the address and open no browser.")]
Config = Annotated[
    str,
    for_general(
        "-c",
        "--config",
        metavar="FILE",
        help="TOML file, or a preset: quick, thorough, biprojected, sycophancy, cliches. Default: none.",
        autocompletion=preset_names,
    ),
]
for_set = partial(for_general, "--set", metavar="KEY=VALUE")
Assignments = Annotated[list[str] | None, for_set(help="Set any setting that abliterate config shows; repeatable.")]

Harmful = Annotated[
    Text,
    from_prompts(
        help="Harmful prompts for the direction: file, file.csv:column or dataset:split:column. Default: "
        "mlabonne/harmful_behaviors; for the demo, its own."
    ),
]
Harmless = Annotated[Text, from_prompts(help="Harmless prompts for the direction. Default: mlabonne/harmless_alpaca.")]
HarmfulEval = Annotated[
    Text, from_prompts(help="Harmful prompts for the scores. Default: the test split of mlabonne/harmful_behaviors.")
]
HarmlessEval = Annotated[
    Text, from_prompts(help="Harmless prompts for the scores. Default: the test split of mlabonne/harmless_alpaca.")
]
HarmfulHeldout = Annotated[
    Text, from_prompts(help="Harmful prompts for the final measurement only. Default: JailbreakBench/JBB-Behaviors.")
]
HarmlessHeldout = Annotated[
    Text, from_prompts(help="Harmless prompts for the final measurement only. Default: others of mlabonne/harmless_alpaca.")
]
OverRefusal = Annotated[
    Text,
    from_prompts(
        help="Harmless prompts that look harmful, for the final measurement. Default: the benign ones of "
        "JailbreakBench/JBB-Behaviors."
    ),
]
Markers = Annotated[
    Text, for_prompts(metavar="FILE", help="File of refusal markers, one a line. Default: those that ship here.")
]


def shared(model: Text, device: Text, dtype: Text, cache_dir: Text) -> dict[str, Any]:
    """The settings behind the options that most commands share; None stands for an option that was not given."""
    return {"model": model or None, "device": device, "cache_dir": cache_dir, "load": {"dtypes": [dtype] if dtype else None}}


def prompt_settings(
    harmful: Text,
    harmless: Text,
    harmful_eval: Text,
    harmless_eval: Text,
    harmful_heldout: Text,
    harmless_heldout: Text,
    over_refusal: Text,
    markers: Text,
) -> dict[str, Any]:
    """The settings behind the prompt options of a run."""
    sets = {
        "harmful": harmful,
        "harmless": harmless,
        "harmful_eval": harmful_eval,
        "harmless_eval": harmless_eval,
        "harmful_heldout": harmful_heldout,
        "harmless_heldout": harmless_heldout,
        "over_refusal": over_refusal,
    }
    return {"prompts": sets, "evaluation": {"markers": markers}}
