"""Held-out prompts, and a run's chosen trial on them: its last figures before the export, on what nothing was fitted to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from abliterate.bench import Bench, make_engine, scorers_of
from abliterate.errors import AbliterateError, InputError, Interrupted
from abliterate.evaluation.editor import Editor
from abliterate.evaluation.forced import Side
from abliterate.evaluation.heldout import HeldoutSets, measure, rate
from abliterate.evaluation.refusals import normalize
from abliterate.inputs import Context
from abliterate.model import loader
from abliterate.model.data import load_prompts
from abliterate.model.loader import DEMO
from abliterate.prompts import digest, public_source
from abliterate.settings import Settings
from abliterate.types import Baseline, Prompt, Trial

_LEFT_OUT = {"dropped": "that other sets have", "repeated": "repeated"}
HUB = {
    "harmful_heldout": "JailbreakBench/JBB-Behaviors@behaviors:harmful:Goal",
    "harmless_heldout": "mlabonne/harmless_alpaca:test[100:200]:text",
    "over_refusal": "JailbreakBench/JBB-Behaviors@behaviors:benign:Goal",
}


@dataclass(frozen=True)
class Heldout:
    """The sets, and what `result.json` says of them."""

    sets: HeldoutSets
    record: dict[str, dict[str, Any]]


def heldout_sources(settings: Settings) -> dict[str, str]:
    """{set: source}: as given, else the demo's own, else public sets that overlap least with the default ones."""
    folder = loader.demo_path() / "prompts"
    defaults = {name: str(folder / f"{name}.jsonl") for name in HUB} if settings.model == DEMO else HUB
    return {name: getattr(settings.prompts, name) or default for name, default in defaults.items()}


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
    with context.result.stage("held-out prompts"):
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


def evaluate_trial(
    context: Context, bench: Bench, editor: Editor, baseline: Baseline, trial: Trial, held: Heldout | None
) -> None:
    """The trial on held-out prompts, into `result.json`; what goes wrong is a warning: the search is done."""
    context.result.record.pop("heldout", None)
    if held is None:
        return
    sizes = f"{len(held.sets.harmful)} + {len(held.sets.harmless)} prompts"
    with context.result.stage("held-out", sizes):
        sides = edited_sides(context, bench, editor, trial)
        try:
            found = measured(context, *sides, held)
            json.dumps(found, allow_nan=False)  # a user's scorer may give anything
        except Interrupted:
            raise
        except Exception as error:  # scorers of users and judges among what may fail: no reason to lose hours of search
            known = isinstance(error, AbliterateError | torch.OutOfMemoryError)
            said = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            reason = said if known else f"{type(error).__name__}: {said}"
            context.reporter.warn(f"The trial could not be measured on held-out prompts ({reason}); its search scores stand.")
            return
        finally:
            editor.clear()
        context.result.record["heldout"] = {"trial": trial.number, **found, **against_search(found, trial, baseline)}
    context.result.save()


def measured(context: Context, base: Side, candidate: Side, held: Heldout) -> dict[str, Any]:
    """`measure` with the settings' scorers, and which prompts it was."""
    scorers = scorers_of(context.settings, heldout=True)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, "prompts")

    return {"prompts": held.record, **measure(base, candidate, held.sets, scorers, progress)}


def edited_sides(context: Context, bench: Bench, editor: Editor, trial: Trial) -> tuple[Side, Side]:
    """One loaded model as base and under the trial's edit. With the plain engine: whole answers, and no fast path to trust."""
    engine = make_engine(context, bench.loaded.model, bench.chat, bench.calibration.sizes)

    @contextlib.contextmanager
    def base() -> Iterator[None]:
        editor.clear()
        yield

    @contextlib.contextmanager
    def edited() -> Iterator[None]:
        editor.apply(trial.params)
        yield

    return Side(engine, base), Side(engine, edited)


def against_search(found: dict[str, Any], trial: Trial, baseline: Baseline) -> dict[str, Any]:
    """The trial's scores in the search beside those held out; optimism: by how much the latter are worse."""
    search = {"refusals": rate(trial.refusals, baseline.prompts), "kl": dict(trial.scores["kl"])}
    optimism = {
        "refusals": found["candidate"]["refusals"]["share"] - search["refusals"]["share"],
        "kl": found["kl"]["mean"] - trial.kl,
    }
    return {"search": search, "optimism": optimism}
