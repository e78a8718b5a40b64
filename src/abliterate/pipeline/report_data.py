"""What a run leaves for a person to look at beside its scores: how the residuals lie, and answers before and after.

Owns the layout of `geometry.json` and `answers.json`; the report is made of them without a model. Knows no HTML.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.directions import Directions, winsorize
from abliterate.directions.geometry import Kept, Sample, all_layers, mean_geometry, rounded
from abliterate.errors import TrialError
from abliterate.files import write_atomically
from abliterate.model.editor import Editor
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import make_engine
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.sets import PromptSets
from abliterate.scorers import Response
from abliterate.scorers.refusals import Refusals, marker_spans, read_markers
from abliterate.settings.sources import config_path
from abliterate.types import Prompt, TrialParams

FORMAT = 1
# Prompts of each set: as points in the projection, and with their answers side by side.
POINTS, ANSWERS = 200, 8
# Characters of a prompt that stand beside its point.
_SHOWN = 120


def samples(prompts: PromptSets) -> dict[str, Sample]:
    """What is to be kept of the residuals of both direction sets as they pass."""
    return {"harmful": Sample(len(prompts.harmful), POINTS), "harmless": Sample(len(prompts.harmless), POINTS)}


def geometry(
    context: Context,
    prompts: PromptSets,
    kept: Kept,
    sets: tuple[Tensor, Tensor],
    directions: Directions,
    path: Path,
) -> None:
    """How the two sets lie in each layer. `sets`: what `stages.residuals` gave.

    Where residuals were only added up, there is what means tell, and the reason why there is no more.
    """
    with context.result.stage("geometry"):
        means = [one.double().mean(dim=0) if one.ndim == 3 else one for one in sets]
        layers: list[dict[str, Any]] = [
            {"index": index, **{name: rounded(value) for name, value in row.items()}}
            for index, row in enumerate(mean_geometry(means[0], means[1], directions.vectors))
        ]
        record: dict[str, Any] = {
            "format": FORMAT,
            "directions": context.result.record["directions"]["sha256"],
            "layers": layers,
            "sampled": {},
            "prompts": {},
            "projection": [],
            "reason": "",
        }
        found = {name: sample.residuals() for name, sample in kept.items()}
        if found["harmful"] is None or found["harmless"] is None:
            record["reason"] = (
                "The residuals were too large to be held at once (efficiency.max_residuals_mb) and only their means were kept, "
                "so there is no separation and no projection."
            )
        else:
            quantile = context.settings.directions.winsorize_quantile
            clamped = (winsorize(found["harmful"], quantile), winsorize(found["harmless"], quantile))
            record["sampled"] = {name: len(sample.places) for name, sample in kept.items()}
            for name, sample in kept.items():
                part: Sequence[Prompt] = getattr(prompts, name)
                record["prompts"][name] = [part[place].text[:_SHOWN] for place in sample.places]
            for row, (separation, projection) in zip(layers, all_layers(*clamped, context.check), strict=True):
                row |= {"silhouette": rounded(separation.silhouette), "probe": rounded(separation.probe)}
                shown = {"harmful": projection.harmful, "harmless": projection.harmless}
                record["projection"].append(
                    {name: [[rounded(x, 4) for x in point] for point in points.tolist()] for name, points in shown.items()}
                    | {"explained": [rounded(share) for share in projection.explained]}
                )
        _write(path, record)


def answers(context: Context, bench: Workbench, editor: Editor, prompts: PromptSets, params: TrialParams, path: Path) -> None:
    """Whole answers of the base model and of the selected trial to some evaluation prompts of both sets.

    Edits the model, and gives the base model back. A device too small for it costs the answers, not the run.
    """
    number = context.result.record["selected"]
    # The plain engine: answers to be read are whole ones, not cut where they are decided.
    engine = make_engine(context, bench.loaded.model, bench.chat, bench.calibration.sizes)
    sets = {"harmful": _spread(prompts.harmful_eval), "harmless": _spread(prompts.harmless_eval)}
    some = [prompt for part in sets.values() for prompt in part]
    with context.result.stage("answers", f"trial {number}"):
        try:
            base = engine.respond(some)
            editor.apply(params)
            edited = engine.respond(some)
        except TrialError as error:
            context.reporter.warn(f"There are no answers to look at in the report: {error}")
            return
        finally:
            editor.clear()
        assert base is not None
        assert edited is not None
        markers = read_markers(Path(context.settings.evaluation.markers or config_path("markers.txt")))
        judged = Refusals(markers)
        rows = [
            {"prompt": prompt.text, "base": _answer(before, judged, markers), "edited": _answer(after, judged, markers)}
            for prompt, before, after in zip(some, base, edited, strict=True)
        ]
        cut = len(sets["harmful"])
        record = {
            "format": FORMAT,
            "trial": number,
            "params": params.to_record(),
            "max_new_tokens": context.settings.response.max_new_tokens,
            "response_prefix": bench.calibration.response_prefix,
            "harmful": rows[:cut],
            "harmless": rows[cut:],
        }
        _write(path, record)


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Some of them, evenly spaced."""
    count = min(len(prompts), ANSWERS)
    return [prompts[index * len(prompts) // count] for index in range(count)]


def _answer(response: Response, judged: Refusals, markers: Iterable[str]) -> dict[str, Any]:
    return {
        "text": response.text,
        "refusal": judged.is_refusal(response),
        "thinking_open": response.thinking_open,
        "markers": [list(span) for span in marker_spans(response.text, tuple(markers))],
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    """On one line: a projection has many numbers."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")
