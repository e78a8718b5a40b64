"""Data of the report beside the scores: the geometry of residuals (`geometry.json`) and answers (`answers.json`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from abliterate.directions import Directions, winsorize
from abliterate.directions.geometry import all_layers, mean_geometry, rounded
from abliterate.errors import TrialError
from abliterate.files import write_atomically
from abliterate.pipeline.context import Context
from abliterate.pipeline.stages import Residuals, directions_record
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.sets import PromptSets
from abliterate.scorers import Response
from abliterate.scorers.refusals import Refusals, marker_spans, read_markers
from abliterate.settings.sources import config_path
from abliterate.types import Prompt, Trial

FORMAT = 1
# The number of prompts of each evaluation set whose answers are shown side by side.
ANSWERS = 8
# The number of characters of a prompt that are shown beside its point.
_SHOWN = 120


def geometry(context: Context, prompts: PromptSets, residuals: Residuals, directions: Directions) -> dict[str, Any]:
    """The content of `geometry.json`: how the residuals of the two direction sets are placed in each layer.

    If only means of the residuals were kept, the record has the figures that means can give, and the reason for the others'
    absence.
    """
    with context.stage("geometry"):
        sets = (residuals.harmful, residuals.harmless)
        means = [residual.double().mean(dim=0) if residual.ndim == 3 else residual for residual in sets]
        layers: list[dict[str, Any]] = [
            {"index": index, **{name: rounded(value) for name, value in row.items()}}
            for index, row in enumerate(mean_geometry(means[0], means[1], directions.first()))
        ]
        record: dict[str, Any] = {
            "format": FORMAT,
            "directions": directions_record(directions).sha256,
            "layers": layers,
            "sampled": {},
            "prompts": {},
            "projection": [],
            "reason": "",
        }
        harmful, harmless = (residuals.samples[name].residuals() for name in ("harmful", "harmless"))
        if harmful is None or harmless is None:
            record["reason"] = (
                "The residuals were too large to be held at once (efficiency.max_residuals_mb) and only their means were kept, "
                "so there is no separation and no projection."
            )
            return record
        quantile = context.settings.directions.winsorize_quantile
        clamped = (winsorize(harmful, quantile), winsorize(harmless, quantile))
        record["sampled"] = {name: len(sample.places) for name, sample in residuals.samples.items()}
        for name, sample in residuals.samples.items():
            prompt_set: Sequence[Prompt] = getattr(prompts, name)
            record["prompts"][name] = [prompt_set[place].text[:_SHOWN] for place in sample.places]
        for row, (separation, projection) in zip(layers, all_layers(*clamped, context.check), strict=True):
            row |= {"silhouette": rounded(separation.silhouette), "probe": rounded(separation.probe)}
            shown = {"harmful": projection.harmful, "harmless": projection.harmless}
            record["projection"].append(
                {name: [[rounded(x, 4) for x in point] for point in points.tolist()] for name, points in shown.items()}
                | {"explained": [rounded(share) for share in projection.explained]}
            )
        return record


def answers(bench: Workbench, trial: Trial) -> dict[str, Any] | None:
    """The content of `answers.json`: whole answers of the base model and of a trial to a few evaluation prompts of both sets.

    If the device is too small for them, the run continues without answers: a warning, and None.
    """
    context, prompts = bench.context, bench.prompts
    sets = {"harmful": _spread(prompts.harmful_eval), "harmless": _spread(prompts.harmless_eval)}
    shown = [prompt for prompts in sets.values() for prompt in prompts]
    with context.stage("answers", f"trial {trial.number}"):
        try:
            # The plain engine, because the trial engine cuts a response once its scores are decided.
            with bench.base():
                base = bench.plain.respond(shown)
            with bench.edited(trial.params):
                edited = bench.plain.respond(shown)
        except TrialError as error:
            context.reporter.warn(f"The report shows no answers: {error}")
            return None
        assert base is not None
        assert edited is not None
        markers = read_markers(Path(context.settings.evaluation.markers or config_path("markers.txt")))
        scorer = Refusals(markers)
        rows = [
            {"prompt": prompt.text, "base": _answer(before, scorer, markers), "edited": _answer(after, scorer, markers)}
            for prompt, before, after in zip(shown, base, edited, strict=True)
        ]
        cut = len(sets["harmful"])
        return {
            "format": FORMAT,
            "trial": trial.number,
            "params": trial.params.to_record(),
            "max_new_tokens": context.settings.response.max_new_tokens,
            "response_prefix": bench.response_prefix,
            "harmful": rows[:cut],
            "harmless": rows[cut:],
        }


def write_one_line(path: Path, record: dict[str, Any]) -> None:
    """Write the record as JSON on one line, because a projection has many numbers."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """At most `ANSWERS` of the prompts, evenly spaced."""
    count = min(len(prompts), ANSWERS)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _answer(response: Response, scorer: Refusals, markers: Iterable[str]) -> dict[str, Any]:
    return {
        "text": response.text,
        "refusal": scorer.is_refusal(response),
        "thinking_open": response.thinking_open,
        "markers": [list(span) for span in marker_spans(response.text, tuple(markers))],
    }
