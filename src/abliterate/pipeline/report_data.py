"""What a run leaves for the report beside its scores: how the residuals lie (`geometry.json`), and answers (`answers.json`)."""

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
# Prompts of each evaluation set whose answers stand side by side.
ANSWERS = 8
# Characters of a prompt that stand beside its point.
_SHOWN = 120


def geometry(context: Context, prompts: PromptSets, residuals: Residuals, directions: Directions) -> dict[str, Any]:
    """How the two direction sets lie in each layer: the content of `geometry.json`.

    Where residuals were only added up, the record has what means can tell, and the reason why there is no more.
    """
    with context.stage("geometry"):
        sets = (residuals.harmful, residuals.harmless)
        means = [part.double().mean(dim=0) if part.ndim == 3 else part for part in sets]
        layers: list[dict[str, Any]] = [
            {"index": index, **{name: rounded(value) for name, value in row.items()}}
            for index, row in enumerate(mean_geometry(means[0], means[1], directions.vectors))
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
            part: Sequence[Prompt] = getattr(prompts, name)
            record["prompts"][name] = [part[place].text[:_SHOWN] for place in sample.places]
        for row, (separation, projection) in zip(layers, all_layers(*clamped, context.check), strict=True):
            row |= {"silhouette": rounded(separation.silhouette), "probe": rounded(separation.probe)}
            shown = {"harmful": projection.harmful, "harmless": projection.harmless}
            record["projection"].append(
                {name: [[rounded(x, 4) for x in point] for point in points.tolist()] for name, points in shown.items()}
                | {"explained": [rounded(share) for share in projection.explained]}
            )
        return record


def answers(bench: Workbench, trial: Trial) -> dict[str, Any] | None:
    """Whole answers of the base model and of a trial to some evaluation prompts of both sets: the content of `answers.json`.

    A device that is too small for them costs the answers, not the run: a warning, and None.
    """
    context, prompts = bench.context, bench.prompts
    sets = {"harmful": _spread(prompts.harmful_eval), "harmless": _spread(prompts.harmless_eval)}
    asked = [prompt for part in sets.values() for prompt in part]
    with context.stage("answers", f"trial {trial.number}"):
        try:
            # The plain engine: answers to be read are whole ones, not cut where they are decided.
            with bench.base():
                base = bench.plain.respond(asked)
            with bench.edited(trial.params):
                edited = bench.plain.respond(asked)
        except TrialError as error:
            context.reporter.warn(f"There are no answers to look at in the report: {error}")
            return None
        assert base is not None
        assert edited is not None
        markers = read_markers(Path(context.settings.evaluation.markers or config_path("markers.txt")))
        judged = Refusals(markers)
        rows = [
            {"prompt": prompt.text, "base": _answer(before, judged, markers), "edited": _answer(after, judged, markers)}
            for prompt, before, after in zip(asked, base, edited, strict=True)
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


def write_record(path: Path, record: dict[str, Any]) -> None:
    """On one line: a projection has many numbers."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """At most `ANSWERS` of the prompts, evenly spaced."""
    count = min(len(prompts), ANSWERS)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _answer(response: Response, judged: Refusals, markers: Iterable[str]) -> dict[str, Any]:
    return {
        "text": response.text,
        "refusal": judged.is_refusal(response),
        "thinking_open": response.thinking_open,
        "markers": [list(span) for span in marker_spans(response.text, tuple(markers))],
    }
