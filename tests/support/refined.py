"""Refined trials made by hand: from a trial's own directions, or left in a finished run as its refinement would leave them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abliterate.artifacts.refined import RefinedStore
from abliterate.artifacts.result import Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.model.editor import Editor
from abliterate.pipeline import stages
from abliterate.pipeline.context import Context, read_prompts
from abliterate.pipeline.workbench import load_calibrated
from abliterate.search.front import pareto_front
from abliterate.search.pruner import DominancePruner
from abliterate.search.study import open_study
from abliterate.settings.schema import Settings
from abliterate.types import RefinedParams, Trial, TrialParams
from support.runs import Recorder

FACTS: dict[str, Any] = {
    "beta": 10.0,
    "steps": 40,
    "learn": "directions",
    "seed": 0,
    "prompts": {"harmful": {"count": 30, "digest": "d1"}, "harmless": {"count": 30, "digest": "d2"}},
    "start": 0,
}


def own_edits(editor: Editor, params: TrialParams, noise: float = 0.0, share: float = 1.0) -> tuple[Any, dict[str, Tensor]]:
    """(λ by module, v by module) of what a trial edits, with `share` of its λ and `noise` added to its directions."""
    generator = torch.Generator().manual_seed(1)
    coeffs, directions = {}, {}
    for name, key in editor.plan(params).items():
        rows, own = editor.vectors(params, key)
        coeff = math.copysign(math.hypot(*own), own[0])
        rows = rows * torch.tensor(own)[:, None] / coeff
        moved = rows + noise * torch.randn(rows.shape, generator=generator, dtype=rows.dtype) / rows.shape[1] ** 0.5
        coeffs[name], directions[name] = share * coeff, (moved / moved.norm()).float().squeeze(0)
    return coeffs, directions


def cosines(editor: Editor, params: TrialParams, directions: dict[str, Tensor]) -> dict[str, float]:
    """By module, the cosine of each direction to that of the trial it came from."""
    plan = editor.plan(params)
    return {name: float(v.double() @ editor.vectors(params, plan[name])[0][0]) for name, v in directions.items()}


def refine_by_hand(run: Path, settings: Settings) -> Trial:
    """Add a refined trial to a finished run: measured, in its study and in its result, where it is selected."""
    directory, recorder = RunDirectory(run), Recorder()
    result = Result.read(directory)
    context = Context.of(settings, recorder)
    start = result.trial(int(result.selected or 0), run)
    assert isinstance(start.params, TrialParams)
    with load_calibrated(context, read_prompts(context)) as bench:
        bench.refined = RefinedStore(directory.refined)
        bench.prepare(stages.read_directions(directory.directions, result))
        baseline = stages.baseline(bench)
        study = open_study("", directory.journal, bench.space, settings.seed)
        number = study.free_slot(settings.search.trials)
        coeffs, directions = own_edits(bench.editor, start.params, noise=0.3, share=0.7)
        facts = FACTS | {"start": start.number, "cosine": cosines(bench.editor, start.params, directions)}
        params = bench.refined.put(number, coeffs, directions, facts)
        trial = stages.evaluate(bench, number, params, DominancePruner.never())
        assert study.add(trial)
        trials = study.trials()
        result.searched(trials, pareto_front(trials, baseline, bench.objectives), baseline, bench.objectives)
    result.update(selected=number, heldout=None)
    result.write(directory)
    return trial


def refined_trial(number: int, kl: float = 0.01, refusals: int = 0, **facts: Any) -> Trial:
    """A made-up refined trial, whose directions are nowhere."""
    modules = {
        f"model.layers.{layer}.{part}": 0.1 * layer for layer in range(4) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    kinds = {"count": refusals, "refused": refusals, "broken": 0, "off_topic": 0, "answered": 12 - refusals}
    scores = {"refusals": refusals, "unanswered": kinds, "kl": {"mean": kl, "median": kl, "max": kl}}
    cosine = {name: 1 - coeff for name, coeff in modules.items()}
    params = RefinedParams(modules, f"refined/{number}.safetensors", "0" * 64, FACTS | {"cosine": cosine} | facts)
    return Trial(
        number, params, "complete", scores, 1.5, values={"refusals": refusals / 12, "unanswered": refusals / 12, "kl": kl}
    )
