"""Measure a run's selected trial on held-out prompts, which neither the directions nor the search have seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.evaluation.heldout import HeldoutSets, measure, rate
from abliterate.evaluation.teacher_forced import ModelView
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import scorers_of
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.datasets import load_prompts
from abliterate.prompts.files import digest, public_source
from abliterate.prompts.sets import Heldout, heldout_sources
from abliterate.scorers.refusals import normalize
from abliterate.settings.schema import Settings
from abliterate.types import Baseline, Prompt, Trial

_LEFT_OUT = {"dropped": "that other sets have", "repeated": "repeated"}


def read_heldout(context: Context, known: Sequence[Sequence[Prompt]], *, required: bool = False) -> Heldout | None:
    """The held-out sets without what is in `known` sets; None where they are switched off, or a default can't be loaded.

    Raises:
        InputError: a set that was given can't be loaded, or nothing of it is left; with `required`, a default one either.
    """
    settings = context.settings
    if not (settings.evaluation.heldout or required):
        return None
    seen = {normalize(prompt.text) for part in known for prompt in part}
    found: dict[str, tuple[Prompt, ...]] = {}
    record: dict[str, dict[str, Any]] = {}
    with context.stage("held-out prompts", at_once=True):
        for name, source in heldout_sources(settings).items():
            try:
                found[name], record[name] = _one_set(source, settings, seen)
            except InputError as error:
                optional = name == "over_refusal"
                if getattr(settings.prompts, name) or (required and not optional):
                    raise
                context.reporter.warn(f"Nothing is measured on {name.replace('_', '-')} prompts: {error}")
                if not optional:
                    return None
        sizes = ", ".join(f"{len(part)} {name.replace('_', '-')}" for name, part in found.items())
        counts = {what: sum(one[name] for one in record.values()) for name, what in _LEFT_OUT.items()}
        left_out = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        context.reporter.note(f"held out: {sizes} prompts" + (f" (left out: {left_out})" if left_out else ""))
    sets = HeldoutSets(found["harmful_heldout"], found["harmless_heldout"], found.get("over_refusal", ()))
    return Heldout(sets, record)


def _one_set(source: str, settings: Settings, seen: set[str]) -> tuple[tuple[Prompt, ...], dict[str, Any]]:
    """A set without what is in `seen`, which grows by it; and its record."""
    loaded = load_prompts(source, settings.prompts)
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
    """The trial on held-out prompts, as `result.json` records it; a failure is a warning and None, since the search is done."""
    if held is None:
        return None
    context = bench.context
    sizes = f"{len(held.sets.harmful)} + {len(held.sets.harmless)} prompts"
    with context.stage("held-out", sizes):
        try:
            figures = measured(context, *views(bench, trial), held)
            json.dumps(figures, allow_nan=False)  # a user's scorer may give anything
        except Interrupted:
            raise
        except Exception as error:  # scorers of users and judges among what may fail: no reason to lose hours of search
            known = isinstance(error, AbliterateError | torch.OutOfMemoryError)
            said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            reason = said if known else f"{type(error).__name__}: {said}"
            context.reporter.warn(f"The trial could not be measured on held-out prompts ({reason}); its search scores stand.")
            return None
    return {"trial": trial.number, **figures, **against_search(figures, trial, baseline)}


def measured(context: Context, base: ModelView, candidate: ModelView, held: Heldout) -> dict[str, Any]:
    """`measure` with the settings' scorers, and which prompts it was."""
    scorers = scorers_of(context.settings, heldout=True)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "prompts")

    return {"prompts": held.record, **measure(base, candidate, held.sets, scorers, progress)}


def views(bench: Workbench, trial: Trial) -> tuple[ModelView, ModelView]:
    """One loaded model as base and under the trial's edits. With the plain engine: whole answers, and no fast path to trust."""
    return ModelView(bench.plain, bench.base), ModelView(bench.plain, partial(bench.edited, trial.params))


def against_search(found: dict[str, Any], trial: Trial, baseline: Baseline) -> dict[str, Any]:
    """The trial's scores in the search beside those held out; optimism: by how much the latter are worse."""
    search = {"refusals": rate(trial.refusals, baseline.prompts), "kl": dict(trial.scores["kl"])}
    optimism = {
        "refusals": found["candidate"]["refusals"]["share"] - search["refusals"]["share"],
        "kl": found["kl"]["mean"] - trial.kl,
    }
    return {"search": search, "optimism": optimism}
