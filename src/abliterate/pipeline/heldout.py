"""Measure a run's selected trial on held-out prompts, which neither the directions nor the search have seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from abliterate import ranks
from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.evaluation.heldout import HeldoutSets, measure, rate
from abliterate.evaluation.teacher_forced import ModelView
from abliterate.objectives import UNANSWERED
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import scorers_of
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.files import digest, public_source
from abliterate.prompts.sets import Heldout, heldout_sources
from abliterate.scorers.refusals import normalize
from abliterate.settings.schema import Settings
from abliterate.types import Baseline, Prompt, Trial

_LEFT_OUT = {"dropped": "that other sets have", "repeated": "repeated"}  # {count in a set's record: its words in the note}


def read_heldout(context: Context, known: Sequence[Sequence[Prompt]], *, required: bool = False) -> Heldout | None:
    """The held-out sets without prompts of the `known` sets; None if they are switched off, or a default set can't be loaded.

    Raises:
        InputError: a given set, or with `required` a default set, can't be loaded or has no prompt that isn't known.
    """
    settings = context.settings
    if not (settings.evaluation.heldout or required):
        return None
    seen = {normalize(prompt.text) for prompts in known for prompt in prompts}
    sets: dict[str, tuple[Prompt, ...]] = {}
    record: dict[str, dict[str, Any]] = {}
    with context.stage("held-out prompts", at_once=True):
        for name, source in heldout_sources(settings).items():
            try:
                sets[name], record[name] = _one_set(source, settings, seen, context.reporter.note)
            except InputError as error:
                optional = name == "over_refusal"
                if getattr(settings.prompts, name) or (required and not optional):
                    raise
                context.reporter.warn(f"Nothing is measured on {name.replace('_', '-')} prompts: {error}")
                if not optional:
                    return None
        sizes = ", ".join(f"{len(prompts)} {name.replace('_', '-')}" for name, prompts in sets.items())
        counts = {words: sum(each[name] for each in record.values()) for name, words in _LEFT_OUT.items()}
        left_out = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
        context.reporter.note(f"held out: {sizes} prompts" + (f" (left out: {left_out})" if left_out else ""))
    return Heldout(HeldoutSets(sets["harmful_heldout"], sets["harmless_heldout"], sets.get("over_refusal", ())), record)


def _one_set(
    source: str, settings: Settings, seen: set[str], note: Callable[[str], None]
) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
    """A set without the prompts in `seen`, and its record; the set's prompts are added to `seen`."""
    loaded = load_prompts(source, settings.prompts, note)
    own: dict[str, Prompt] = {}
    for prompt in loaded:
        own.setdefault(normalize(prompt.text), prompt)
    kept = [prompt for text, prompt in own.items() if text not in seen]
    dropped = len(own) - len(kept)
    seen.update(own)
    if not kept:
        raise InputError(
            f"No prompt of {public_source(source)} is held out: the other sets have all {len(loaded)}; give another set with "
            "--harmful-heldout, --harmless-heldout or --over-refusal."
        )
    counts = {"count": len(kept), "dropped": dropped, "repeated": len(loaded) - len(own)}
    return tuple(kept), {"source": public_source(source), **counts, "digest": digest(kept)}


def evaluate_trial(bench: Workbench, baseline: Baseline, trial: Trial, held: Heldout | None) -> dict[str, Any] | None:
    """The trial's held-out record for `result.json`; a failure only warns and gives None, because the search is done."""
    if held is None:
        return None
    context = bench.context
    sizes = f"{len(held.sets.harmful)} + {len(held.sets.harmless)} prompts"
    with context.stage("held-out", sizes):
        try:
            figures = measured(bench, *views(bench, trial), held)
            json.dumps(figures, allow_nan=False)  # a custom scorer may return anything
        except Interrupted:
            raise
        except Exception as error:  # custom scorers and judges may fail in any way, which must not lose hours of search
            if ranks.size() > 1:  # other ranks may not have failed, and none may go on without them
                raise
            is_own_error = isinstance(error, AbliterateError | torch.OutOfMemoryError)
            cause = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            reason = cause if is_own_error else f"{type(error).__name__}: {cause}"
            context.reporter.warn(f"The trial could not be measured on held-out prompts ({reason}); its search scores stand.")
            return None
    return {"trial": trial.number, **figures, **against_search(figures, trial, baseline)}


def measured(bench: Workbench, base: ModelView, candidate: ModelView, held: Heldout) -> dict[str, Any]:
    """`measure` with the settings' scorers, and the record of the prompts."""
    context = bench.context
    scorers = scorers_of(context.settings, heldout=True)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "prompts")

    return {"prompts": held.record, **measure(base, candidate, held.sets, scorers, progress, bench.asked(base))}


def views(bench: Workbench, trial: Trial) -> tuple[ModelView, ModelView]:
    """One loaded model as base and as edited by the trial, on the plain engine: whole answers, and no fast path to trust."""
    return ModelView(bench.plain, bench.base), ModelView(bench.plain, partial(bench.edited, trial.params))


def against_search(figures: dict[str, Any], trial: Trial, baseline: Baseline) -> dict[str, Any]:
    """The trial's scores in the search, and their optimism: by how much the held-out `figures` are worse."""
    search: dict[str, Any] = {"refusals": rate(trial.refusals, baseline.prompts), "kl": dict(trial.scores["kl"])}
    if UNANSWERED in trial.scores:
        kinds = trial.scores[UNANSWERED]
        search["unanswered"] = {name: rate(count, baseline.prompts) for name, count in kinds.items()}
    optimism = {
        "refusals": figures["candidate"]["refusals"]["share"] - search["refusals"]["share"],
        "kl": figures["kl"]["mean"] - trial.kl,
    }
    return {"search": search, "optimism": optimism}
