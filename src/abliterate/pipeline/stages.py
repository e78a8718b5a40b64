"""The stages between a calibrated bench and the search: residuals, directions, baseline, and one trial.

Each takes and returns values. Knows no terminal, and no order: `pipeline/run.py` has that.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.directions import Directions, ResidualMeans, direction_method, needs_means, summarize_residuals
from abliterate.directions.geometry import Kept, Sample
from abliterate.edits import SvdMemo
from abliterate.engine.prefill import resume_layers
from abliterate.engine.reference import Progress, ReferenceEngine
from abliterate.engine.self_check import Engine, EngineSetup, trusted_engine
from abliterate.engine.trial_engine import TrialEngine
from abliterate.errors import AbliterateError, InputError, TrialError
from abliterate.evaluation import trial as evaluation
from abliterate.evaluation.trial import early_scorer
from abliterate.files import write_atomically
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.editor import Editor
from abliterate.model.memory import affordable, memory_errors, unless_full
from abliterate.model.residuals import capture_residuals, stream_residuals
from abliterate.pipeline.cache_keys import baseline_key, means_key, residuals_key
from abliterate.pipeline.context import Context
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.sets import PromptSets
from abliterate.scorers import Observation, Response
from abliterate.search.pruner import DominancePruner
from abliterate.search.space import Space
from abliterate.settings.schema import EfficiencySettings, Settings
from abliterate.types import Baseline, Objective, Prompt, Trial, TrialParams

FORMAT = "1"  # of directions.safetensors
FEWER = Objective("refusals", "minimize")
SAMPLES = 256  # random trials from which the layers to start at are chosen


def residuals(context: Context, bench: Workbench, prompts: PromptSets, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
    """What the direction method takes of both direction sets, from the cache where known; some of them stay in `kept`.

    Residuals (n_prompts, n_layers+1, d_model) float32, or where means will do, those (n_layers+1, d_model) float64.
    """
    with context.result.stage("residuals", f"{len(prompts.harmful)} + {len(prompts.harmless)} prompts"):
        sets = {"harmful": prompts.harmful, "harmless": prompts.harmless}
        info = bench.loaded.info
        size = sum(map(len, sets.values())) * (info.n_layers + 1) * info.d_model * 4
        large = size > context.settings.efficiency.max_residuals_mb * 2**20
        harmful, harmless = (_residuals(context, bench, name, part, large, kept or {}) for name, part in sets.items())
    return harmful, harmless


def directions(context: Context, harmful: Tensor, harmless: Tensor, path: Path | None) -> Directions:
    """One direction per layer, from what `residuals` gives; also left in the run directory, if there is one."""
    with context.result.stage("directions", context.settings.directions.method):
        settings = context.settings.directions
        found = Directions(direction_method(settings.method).compute(harmful, harmless))
        if not found.by_layer().any():
            raise AbliterateError(
                "The two prompt sets give the same residuals in every layer, so there is no direction to remove; check "
                "that --harmful and --harmless are different prompts."
            )
        # One entry: of two, the order would be another at each save, and a run that goes on must write the same bytes.
        content = save({"directions": found.vectors}, metadata={"format": FORMAT})
        if path is not None:
            write_atomically(path, content)
        # What another run can be compared by, whatever wrote the file.
        vectors = hashlib.sha256(found.vectors.cpu().contiguous().numpy().tobytes()).hexdigest()
        context.result.record["directions"] = {"sha256": hashlib.sha256(content).hexdigest(), "vectors_sha256": vectors}
    return found


def read_directions(path: Path, result: Mapping[str, Any]) -> Directions:
    """What `directions` left in the directory of the run whose `result.json` is given.

    Raises:
        InputError: it is missing, unreadable, or not what the run left.
    """
    try:
        content = path.read_bytes()
        recorded = result.get("directions", {}).get("sha256")  # not by a run of an earlier version
        if recorded and hashlib.sha256(content).hexdigest() != recorded:
            raise ValueError("another file than the run's")
        if b'"format":' in content[:200] and f'"format":"{FORMAT}"'.encode() not in content[:200]:
            raise ValueError("of another version")
        found = Directions(load(content)["directions"])
        shape = tuple(result["model"].get(name, 0) for name in ("n_layers", "d_model"))
        if all(shape) and (found.n_layers, found.vectors.shape[1]) != shape:
            raise ValueError("directions of another model")
        return found
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"The directions of the run can't be read or aren't its own ({path.name}); abliterate run --resume computes them "
            "again."
        ) from error


def make_editor(context: Context, bench: Workbench, found: Directions) -> Editor:
    """Adapters on every target, all modules prepared."""
    settings = context.settings
    adapters = EditHooks(
        bench.loaded.targets,
        incremental=settings.efficiency.use_incremental_adapter_updates,
        free=settings.efficiency.use_free_adapters,
    )
    memo = SvdMemo(settings.efficiency.max_svd_cache_size if settings.efficiency.enable_svd_cache else 0)
    room = settings.efficiency.max_kept_mb * 2**20
    editor = Editor(bench.loaded.targets, found, settings.edit, adapters, memo, room)
    with context.result.stage("prepare edits", settings.edit.mode):
        editor.prepare(lambda done, total: context.reporter.progress(done, total, "modules"))
        for names, what in ((editor.offloaded, "kept in main memory"), (editor.unprepared, "prepared again in each trial")):
            if names:
                context.reporter.note(f"the edits of {len(names)} modules are {what} (efficiency.max_kept_mb)")
    return editor


def trial_engine(context: Context, bench: Workbench, editor: Editor, prompts: PromptSets) -> Workbench:
    """The bench with the engine for trials: the fastest one that agrees with the reference."""
    assert isinstance(bench.engine, ReferenceEngine)
    space = search_space(context.settings, bench)
    # Where trials are likely to begin; also an edit for the self-check that leaves lower layers alone.
    firsts = editor.first_layers(space.samples(SAMPLES, seed=0))
    setup = EngineSetup(
        bench.engine,
        bench.loaded.layers,
        editor.adapters,
        early_scorer(bench.scorers),
        prompts.harmful_eval,
        prompts.harmless_eval,
        resume_layers(firsts),
        editor.budget_bytes,  # prepared edits come first
    )
    with context.result.stage("trial engine"):
        edit = partial(editor.apply_exactly, space.upper_half())  # it skips lower layers
        switches = context.settings.efficiency
        engine = trusted_engine(setup, switches, edit, editor.clear, context.reporter.warn)
        for what in _left_out(engine, setup, switches):
            context.reporter.note(what)
    return replace(bench, engine=engine)


def _left_out(engine: Engine, setup: EngineSetup, switches: EfficiencySettings) -> Iterator[str]:
    """What this model or these scorers don't allow the engine."""
    if not isinstance(engine, TrialEngine):
        return
    if switches.use_shared_prefix and engine.sharing == "none":
        yield "the model's states can't be cut, so prompts share no prefix"
    if switches.use_drafts and not engine.drafting:
        yield "this model allows no holes in its cache, so responses aren't drafted"
    if setup.early is None:
        yield "a scorer needs whole responses, so no response and no trial ends early"
    yield from engine.left_out.values()


def baseline(context: Context, bench: Workbench, prompts: PromptSets) -> Baseline:
    """The unedited model's scores, which the edited ones are relative to."""
    with context.result.stage("baseline"):
        observed = _observe_base(context, bench, prompts)
        try:
            scores = evaluation.base_scores(bench.scorers, observed)
        except TrialError as error:
            raise AbliterateError(f"The unedited model can't be scored: {error}.") from error
        values = {name: float(score.value) for name, score in scores.items() if name not in ("refusals", "kl")}
        found = Baseline(int(scores["refusals"].record), len(prompts.harmful_eval), values)
        unfinished = sum(response.thinking_open for response in observed.responses)
        if unfinished:
            context.reporter.warn(
                f"{unfinished} of {found.prompts} responses are still inside a thinking block at the limit and count as "
                "refusals; allow more with --set response.max_new_tokens=N, or have the block closed at once "
                "(--set response.thinking=skip; where that is not enough, --set response.detect_prefix=false and a "
                "response.prefix that closes it)."
            )
        context.reporter.note(f"the model refuses {found.refusals} of {found.prompts} harmful prompts", refusals=found.refusals)
    if found.refusals == 0 and FEWER in bench.objectives:
        raise AbliterateError(
            f"The model refuses none of the {found.prompts} harmful prompts, so there is nothing to remove; give prompts it "
            "refuses with --harmful-eval, or other refusal markers with --markers."
        )
    return found


def search_space(settings: Settings, bench: Workbench) -> Space:
    """The space over the components that the model has."""
    components = tuple(dict.fromkeys(target.component for target in bench.loaded.targets))
    return Space(settings.search, bench.loaded.info.n_layers, components, bench.objectives)


def evaluate(
    context: Context,
    bench: Workbench,
    editor: Editor,
    number: int,
    params: TrialParams,
    prompts: PromptSets,
    certificate: DominancePruner,
) -> Trial:
    """One trial."""
    started = time.perf_counter()
    sets = (prompts.harmful_eval, prompts.harmless_eval)

    def once() -> evaluation.Evaluation:
        editor.apply(params)
        return evaluation.evaluate(bench.engine, bench.scorers, *sets, certificate, _progress(context))

    try:
        # The engine goes on with smaller batches by itself; what else finds no memory is tried again with all that was freed.
        found = unless_full(once, bench.loaded.device)
        if found is None:
            with memory_errors():
                found = once()
    except (TrialError, torch.OutOfMemoryError) as error:
        return Trial(number, params, "failed", {}, round(time.perf_counter() - started, 3), str(error).splitlines()[0])
    seconds = round(time.perf_counter() - started, 3)
    records = {name: score.record for name, score in found.scores.items()}
    values = {name: float(score.value) for name, score in found.scores.items()}
    return Trial(number, params, "stopped" if found.stopped else "complete", records, seconds, values=values)


def check_failures(trials: list[Trial], limit: int) -> None:
    """Stop a study in which the last `limit` trials all failed: the cause is not the parameters."""
    last = trials[-limit:]
    if len(last) == limit and all(trial.state == "failed" for trial in last):
        raise AbliterateError(
            f"The last {limit} trials failed ({last[-1].reason}); continue with --resume and a smaller --batch-size, or begin "
            "anew with --restart and --dtype float32 or another --set edit.mode."
        )


def _observe_base(context: Context, bench: Workbench, prompts: PromptSets) -> Observation:
    key = baseline_key(
        context.settings, bench.loaded, bench.calibration.response_prefix, (prompts.harmful_eval, prompts.harmless_eval)
    )
    # Not remembered: in memory a scorer keeps what it needs of the log-probabilities, which is less.
    found = context.store.get("baseline", key, remember=False)
    if found is not None:
        responses = [Response(*pair) for pair in json.loads(from_bytes(found["responses"]))]
        return Observation(responses, found["first_logprobs"].to(bench.loaded.device), prompts.harmful_eval)
    logprobs = bench.engine.first_logprobs(prompts.harmless_eval, _progress(context))
    observed = bench.engine.respond(prompts.harmful_eval, _progress(context))
    assert observed is not None  # only a limit can stop it
    texts = to_bytes(json.dumps([(response.text, response.thinking_open) for response in observed]))
    label = f"{bench.loaded.info.id}: {len(observed)} responses"
    context.store.put("baseline", key, {"first_logprobs": logprobs, "responses": texts}, label, remember=False)
    return Observation(observed, logprobs, prompts.harmful_eval)


def _progress(context: Context) -> Progress:
    return lambda done, total: context.reporter.progress(done, total, "prompts")


def _residuals(context: Context, bench: Workbench, name: str, prompts: tuple[Prompt, ...], large: bool, kept: Kept) -> Tensor:
    """What the direction method takes of one set; `large`: they are more than may be held at once."""
    settings, store, sample = context.settings, context.store, kept.get(name, Sample(0, 0))
    method, quantile = direction_method(settings.directions.method), settings.directions.winsorize_quantile
    stream = large and needs_means(method)
    parts = (settings, bench.loaded, bench.calibration.response_prefix, prompts)
    keys = {"means": means_key(*parts), "residuals": residuals_key(*parts)}
    kind = "means" if stream else "residuals"
    # Either entry serves a method that needs means: what is there, the small one first.
    there = [one for one, key in keys.items() if (one == kind or needs_means(method)) and store.has("residuals", key)]
    found = store.get("residuals", keys[(there or [kind])[0]], remember=not stream)
    if found is not None:
        context.reporter.note(f"{name} residuals come from the cache", set=name, cached=True)
        return found["means"] if "means" in found else summarize_residuals(sample.add(found["residuals"]), method, quantile)
    if stream:
        context.reporter.note(f"{name} residuals are added up as they come (efficiency.max_residuals_mb)", streamed=True)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, f"{name} prompts")
        context.check()

    sizes = bench.calibration.sizes
    means = ResidualMeans(quantile)
    capture: Callable[..., Tensor | None] = partial(stream_residuals, take=means.add) if stream else capture_residuals
    captured = capture(
        bench.loaded.model,
        bench.loaded.layers,
        bench.chat,
        prompts,
        batch_size=affordable(sizes.residuals, sizes.row_bytes[0], bench.loaded.device),
        amp=settings.efficiency.use_amp_for_residuals,
        offload=settings.efficiency.offload_residuals_to_cpu,
        clear_every=settings.efficiency.cache_clear_frequency,
        progress=progress,
    )
    computed = means.mean() if captured is None else captured
    store.put("residuals", keys[kind], {kind: computed}, f"{bench.loaded.info.id}: {len(prompts)} {name} prompts")
    return computed if stream else summarize_residuals(sample.add(computed), method, quantile)
