"""The stages between a calibrated workbench and the search: residuals, directions, baseline, and one trial.

Each stage takes and returns values; `pipeline/run.py` calls the stages in their order. The stage that captures the inputs of
modules, for edits that are computed from them, is in `module_inputs.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from abliterate import ranks
from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.artifacts.result import DirectionsRecord, Result
from abliterate.artifacts.run_directory import RunDirectory
from abliterate.directions import (
    METHODS,
    DirectionMethod,
    Directions,
    ResidualMeans,
    compute_directions,
    direction_method,
    needs_means,
    summarize_residuals,
    winsorize,
)
from abliterate.directions.geometry import Sample, silhouettes
from abliterate.directions.inputs import from_tensors, to_tensors
from abliterate.directions.protected import capability_directions, protect
from abliterate.edits import edit_method, is_learned
from abliterate.engine.reference import Progress
from abliterate.engine.shared_residuals import shared_feed
from abliterate.errors import AbliterateError, InputError, ScorerUnavailable, TrialError, first_line
from abliterate.evaluation import trial as trial_evaluation
from abliterate.model.memory import affordable, memory_errors, unless_full
from abliterate.model.residuals import Feed, capture_residuals, stream_residuals
from abliterate.objectives import COUNTS, KL
from abliterate.pipeline.cache_keys import baseline_key, means_key, residuals_key
from abliterate.pipeline.context import Context, unedited_errors
from abliterate.pipeline.module_inputs import Answers, with_inputs
from abliterate.pipeline.workbench import Workbench
from abliterate.prompts.capabilities import PLAIN
from abliterate.prompts.files import public_source
from abliterate.scorers import Observation, Response
from abliterate.scorers.base import asks_base
from abliterate.scorers.refusals import read_markers
from abliterate.search.pruner import DominancePruner
from abliterate.settings.schema import Settings
from abliterate.settings.sources import config_path
from abliterate.types import MOST_DIRECTIONS, Baseline, Objective, Params, Prompt, Trial

FORMAT = "1"  # of directions.safetensors
_GAIN = "gain of "  # begins the names of its tensors of norms' weights
# Objectives that leave nothing to search for if the model refuses nothing.
FEWER = {Objective(name, "minimize") for name in COUNTS}
POINTS = 200  # the residuals kept of each set, which become the points of the report's projection


@dataclass(frozen=True)
class Residuals:
    """The input of the direction method from both direction sets, a sample of each set for the report, and what is protected.

    `harmful` and `harmless` are residuals (n_prompts, n_layers+1, d_model) in float32, or, for a method that needs only means,
    the means (n_layers+1, d_model) in float64. `capabilities` are the directions (n_layers+1, count, d_model) in float64 of the
    capabilities that are protected; None if there are none.
    """

    harmful: Tensor
    harmless: Tensor
    samples: Mapping[str, Sample]
    capabilities: Tensor | None = None


def residuals(bench: Workbench) -> Residuals:
    """The base model's residuals on both direction sets; cached residuals are not computed again."""
    context, prompts = bench.context, bench.prompts
    sets = {"harmful": prompts.harmful, "harmless": prompts.harmless}
    title = f"{len(prompts.harmful)} + {len(prompts.harmless)} prompts"
    with context.stage("residuals", title), bench.base(), unedited_errors():
        check_prior(bench)
        size, large = _size(bench)
        method = direction_method(context.settings.directions.method)
        if large and not needs_means(method):
            context.reporter.note(
                f"the direction method {method.name} needs all residuals at once, {size:,} MiB, more than "
                "efficiency.max_residuals_mb; fewer prompts need less"
            )
        samples = {name: Sample(len(prompt_set), POINTS) for name, prompt_set in sets.items()}
        feed = cache(partial(_feed, bench, (*prompts.harmful, *prompts.harmless)))
        harmful, harmless = (
            _residuals(bench, name, prompt_set, large, samples[name], feed, method) for name, prompt_set in sets.items()
        )
        capabilities = _capabilities(bench, prompts.protected) if prompts.protected else None
    return Residuals(harmful, harmless, samples, capabilities)


def check_prior(bench: Workbench) -> None:
    """Raise InputError if `search.prior` needs residuals that are too large to be held at once."""
    size, large = _size(bench)
    means = needs_means(direction_method(bench.settings.directions.method))  # other methods hold all of them anyway
    if large and means and _needs_silhouettes(bench.context):
        raise InputError(
            f"The setting search.prior needs all residuals at once, which take {size:,} MiB; raise "
            "efficiency.max_residuals_mb, or leave search.prior out."
        )


def _size(bench: Workbench) -> tuple[int, bool]:
    """The MiB of the residuals of both direction sets, rounded up, and whether they are more than the settings allow."""
    info, prompts = bench.loaded.info, bench.prompts
    size = (len(prompts.harmful) + len(prompts.harmless)) * (info.n_layers + 1) * info.d_model * 4
    return math.ceil(size / 2**20), size > bench.settings.efficiency.max_residuals_mb * 2**20


def directions(context: Context, residuals: Residuals) -> Directions:
    """The directions that the method of the settings finds, without their parts along protected capabilities."""
    with context.stage("directions", context.settings.directions.method):
        method = direction_method(context.settings.directions.method)
        computed = compute_directions(method, residuals.harmful, residuals.harmless, context.settings.directions.count)
        if not (computed.table().any() or is_learned(edit_method(context.settings.edit.mode))):
            raise AbliterateError(
                "The two prompt sets give the same residuals in every layer, so there is no direction to remove; check "
                "that --harmful and --harmless are different prompts."
            )
        if residuals.capabilities is not None:
            computed = _protected(context, computed, residuals.capabilities)
    return computed


def layer_prior(context: Context, residuals: Residuals) -> tuple[float, ...]:
    """The silhouette of the two sets' residuals behind each layer, by which a search may begin; empty if it doesn't."""
    if not _needs_silhouettes(context):
        return ()
    quantile = context.settings.directions.winsorize_quantile
    points = [residuals.samples[name].residuals() for name in ("harmful", "harmless")]
    assert points[0] is not None
    assert points[1] is not None
    found = silhouettes(winsorize(points[0], quantile), winsorize(points[1], quantile), context.check)
    return tuple(value or 0.0 for value in found[1:])  # index 0 is the embedding


def _needs_silhouettes(context: Context) -> bool:
    return context.settings.search.prior == "silhouette"


def find_directions(bench: Workbench, answers: Answers | None = None) -> Directions:
    """Compute the directions of the workbench's harmful and harmless prompts, and prepare the workbench for edits along them.

    `answers` are those of a run whose trial is made again (`with_inputs`).

    Raises:
        AbliterateError: the two sets give the same residuals.
    """
    found = residuals(bench)
    computed, bench.prior = with_inputs(bench, directions(bench.context, found), answers), layer_prior(bench.context, found)
    bench.prepare(computed)
    return computed


def directions_file(directions: Directions) -> bytes:
    """The content of `directions.safetensors`."""
    # One entry of metadata: two would change their order between saves, and a continued run must write the same bytes.
    return save(_tensors(directions), metadata={"format": FORMAT})


def directions_of(content: bytes) -> Directions:
    """The inverse of `directions_file`; SafetensorError, KeyError or ValueError if the content isn't what it gives."""
    tensors = load(content)
    gains = {name.removeprefix(_GAIN): tensor for name, tensor in tensors.items() if name.startswith(_GAIN)}
    return Directions(tensors["directions"], tensors.get("harmless"), from_tensors(tensors), gains)


def _tensors(directions: Directions) -> dict[str, Tensor]:
    """The tensors that directions consist of, by their names in the file."""
    means = {} if directions.harmless is None else {"harmless": directions.harmless}
    gains = {_GAIN + name: gain for name, gain in directions.gains.items()}
    return {"directions": directions.vectors, **means, **to_tensors(directions.inputs), **gains}


def directions_record(directions: Directions) -> DirectionsRecord:
    """The record of the directions in `result.json`: their hashes."""
    vectors = hashlib.sha256()
    for tensor in _tensors(directions).values():
        vectors.update(tensor.cpu().contiguous().numpy().tobytes())
    sha256 = hashlib.sha256(directions_file(directions)).hexdigest()
    answers = [list(ids) for ids in directions.answers]
    return DirectionsRecord(sha256=sha256, vectors_sha256=vectors.hexdigest(), answers=answers)


def read_directions(path: Path, result: Result) -> Directions:
    """The directions that the run of `result` left in its directory.

    Raises:
        InputError: the file is missing or unreadable, or differs from the file that the run left.
    """
    try:
        content = path.read_bytes()
        if result.directions is None or hashlib.sha256(content).hexdigest() != result.directions.sha256:
            raise ValueError("another file than the run's")
        if f'"format":"{FORMAT}"'.encode() not in content[:200]:
            raise ValueError("of another version")
        stored = directions_of(content)
        shape = (result.model.n_layers, result.model.d_model) if result.model else (0, 0)
        if all(shape) and (stored.n_layers, stored.d_model) != shape:
            raise ValueError("directions of another model")
        if stored.count > MOST_DIRECTIONS:
            raise ValueError("too many directions")
        if any(trial.params.fault(stored.n_layers) for trial in result.trials):
            raise ValueError("directions of fewer layers than the trials use")
        return replace(stored, answers=result.directions.answers)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"The directions of the run can't be read or aren't its own ({path.name}); "
            f"{RunDirectory(path.parent).resuming('computes them again')}."
        ) from error


def baseline(bench: Workbench) -> Baseline:
    """The unedited model's scores, to which the scores of edited models are relative."""
    context, prompts = bench.context, bench.prompts
    if any(map(asks_base, bench.scorers)):
        with context.stage("yardstick", "the model's own harmless answers"), unedited_errors():
            bench.asked().yardstick()
    with context.stage("baseline"):
        with bench.base(), unedited_errors():
            observed = _observe_base(bench)
        try:
            scores = trial_evaluation.base_scores(bench.scorers, replace(observed, base=bench.asked()))
        except TrialError as error:
            raise AbliterateError(f"The unedited model can't be scored: {error}.") from error
        values = {name: float(score.value) for name, score in scores.items() if name not in (KL, *COUNTS)}
        kinds = scores["unanswered"].record if "unanswered" in scores else None
        measured = Baseline(int(scores["refusals"].record), len(prompts.harmful_eval), values, kinds)
        unfinished = sum(response.thinking_open for response in observed.responses)
        if unfinished:
            context.reporter.warn(
                f"{unfinished} of {measured.prompts} responses are still inside a thinking block at the limit and count as "
                "refusals; allow more with --set response.max_new_tokens=N, or have the block closed at once "
                "(--set response.thinking=skip; where that is not enough, --set response.detect_prefix=false and a "
                "response.prefix that closes it)."
            )
        refuses = f"the model refuses {measured.refusals} of {measured.prompts} harmful prompts"
        if own_markers(context.settings):
            refuses = f"{measured.refusals} of {measured.prompts} answers to harmful prompts have a marker"
        if kinds is None:
            context.reporter.note(refuses, refusals=measured.refusals)
        else:
            text, unanswered = f"{refuses}, {kinds['count']} are left unanswered", kinds["count"]
            context.reporter.note(text, refusals=measured.refusals, unanswered=unanswered)
    if measured.refusals == 0 and FEWER & set(bench.objectives):
        raise AbliterateError(_nothing_to_remove(own_markers(context.settings), measured.prompts))
    return measured


def warn_of_another_baseline(context: Context, here: Baseline, before: Baseline, where: str) -> None:
    """Warn if the unedited model's scores, measured again (`where`), aren't those to which the run's trials are relative."""
    off = "its trials may be off by as much."
    if here.refusals != before.refusals:
        context.reporter.warn(f"{where} the model refuses {here.refusals} prompts, in the run {before.refusals}; {off}")
    elif here.unanswered != before.unanswered:
        context.reporter.warn(
            f"{where} the model leaves other prompts unanswered ({here.unanswered}) than in the run ({before.unanswered}); "
            f"{off}"
        )
    for name, value in before.values.items():
        if not math.isclose(here.value(name), value, rel_tol=1e-3, abs_tol=1e-6):
            context.reporter.warn(
                f"{where} the scorer {name} gives the model {here.value(name):.6g}, in the run {value:.6g}; {off}"
            )


def own_markers(settings: Settings) -> str:
    """The file of markers that a person gave, which may tell another behaviour than refusal; empty if there is none.

    A worker has a copy of the run's markers in any case, so a file that says what the default says is none.
    """
    given, default = settings.evaluation.markers, config_path("markers.txt")
    return given if given and read_markers(Path(given)) != read_markers(default) else ""


def _nothing_to_remove(markers: str, prompts: int) -> str:
    """Why there is nothing to search for; markers that a person gives may tell another behaviour than refusal."""
    if not markers:
        return (
            f"The model refuses none of the {prompts} harmful prompts, so there is nothing to remove; give prompts it refuses "
            "with --harmful-eval, or other refusal markers with --markers."
        )
    return (
        f"None of the model's {prompts} answers to harmful prompts has a marker of {public_source(markers)}, so by these "
        "markers it doesn't show the behaviour and there is nothing to remove; give prompts that bring it out with "
        "--harmful-eval, or other markers with --markers."
    )


def evaluate(bench: Workbench, number: int, params: Params, pruner: DominancePruner) -> Trial:
    """Carry out one trial: edit the model by `params`, and measure it until `pruner` knows that it can't reach the front."""
    started = time.perf_counter()
    sets = (bench.prompts.harmful_eval, bench.prompts.harmless_eval)
    progress = _progress(bench.context, "prompts")
    if not bench.settings.efficiency.use_certified_stop:
        pruner = DominancePruner.never(pruner.objectives)

    def once() -> trial_evaluation.Evaluation:
        with bench.edited(params):
            check = bench.context.check
            measured = trial_evaluation.evaluate(bench.engine, bench.scorers, *sets, pruner, progress, check)
        return trial_evaluation.completed(measured, bench.scorers, bench.asked())

    trial = _evaluated(bench, number, params, once)
    return ranks.agree(lambda: replace(trial, seconds=round(time.perf_counter() - started, 3)))


def _evaluated(bench: Workbench, number: int, params: Params, once: Callable[[], trial_evaluation.Evaluation]) -> Trial:
    """The trial by its evaluation `once`, without its seconds."""
    try:
        # The engine itself continues with smaller batches; any other step that runs out of memory is retried after freeing it.
        evaluation = unless_full(once, bench.loaded.device)
        if evaluation is None:
            with memory_errors():
                evaluation = once()
    except ScorerUnavailable as error:
        raise AbliterateError(
            f"Trial {number} can't be scored, because {first_line(error)}; mend that and continue with --resume, which repeats "
            "the trial."
        ) from error
    except (TrialError, torch.OutOfMemoryError) as error:
        return Trial(number, params, "failed", {}, 0.0, first_line(error))
    records = {name: score.record for name, score in evaluation.scores.items()}
    values = {name: float(score.value) for name, score in evaluation.scores.items()}
    return Trial(number, params, "stopped" if evaluation.stopped else "complete", records, 0.0, values=values)


def check_failures(trials: list[Trial], limit: int) -> None:
    """Raise AbliterateError if the last `limit` trials all failed, because then the parameters aren't the cause."""
    last = trials[-limit:]
    if len(last) == limit and all(trial.state == "failed" for trial in last):
        raise AbliterateError(
            f"The last {limit} trials failed ({last[-1].reason}); continue with --resume and a smaller --batch-size, or begin "
            "anew with --restart and --dtype float32 or another --set edit.mode."
        )


def _observe_base(bench: Workbench) -> Observation:
    context, prompts = bench.context, bench.prompts
    sets = (prompts.harmful_eval, prompts.harmless_eval)
    key = baseline_key(context.settings, bench.loaded, bench.chat, sets)
    # Not kept in memory, where the KL scorer already keeps a compressed copy of the log-probabilities.
    stored = context.store.get("baseline", key, remember=False)
    if stored is not None:
        responses = [Response(text, is_open, tuple(ids)) for text, is_open, ids in json.loads(from_bytes(stored["responses"]))]
        return Observation(responses, stored["first_logprobs"].to(bench.loaded.device), prompts.harmful_eval)
    progress = _progress(context, "prompts")
    logprobs = bench.engine.first_logprobs(prompts.harmless_eval, progress)
    observed = bench.engine.respond(prompts.harmful_eval, progress)
    assert observed is not None  # only a limit can stop it
    texts = to_bytes(json.dumps([(response.text, response.thinking_open, response.ids) for response in observed]))
    label = f"{bench.loaded.info.id}: {len(observed)} responses"
    context.store.put("baseline", key, {"first_logprobs": logprobs, "responses": texts}, label, remember=False)
    return Observation(observed, logprobs, prompts.harmful_eval)


def _progress(context: Context, unit: str) -> Progress:
    return lambda done, total: context.reporter.progress(done, total, unit)


def _feed(bench: Workbench, prompts: Sequence[Prompt]) -> Feed | None:
    """The way in which these prompts are fed, if it isn't the plain one."""
    efficiency, loaded = bench.settings.efficiency, bench.loaded
    if not efficiency.use_shared_prefix:
        return None
    return shared_feed(loaded.model, loaded.layers, bench.chat, prompts, amp=efficiency.use_amp_for_residuals)


def _capabilities(bench: Workbench, sets: Mapping[str, tuple[Prompt, ...]]) -> Tensor:
    """The directions (n_layers+1, count, d_model) float64 of the capabilities, of which only means are kept."""
    feed = cache(partial(_feed, bench, [prompt for prompts in sets.values() for prompt in prompts]))
    means = {
        name: _residuals(bench, name, prompts, True, Sample(len(prompts), 0), feed, METHODS["mean"])
        for name, prompts in sets.items()
    }
    plain = means.pop(PLAIN)
    return capability_directions(torch.stack(list(means.values())), plain)


def _protected(context: Context, computed: Directions, capabilities: Tensor) -> Directions:
    settings = context.settings.directions
    kept = protect(computed, capabilities, settings.protect_ridge)
    gone = int((kept.vectors.norm(dim=-1) < computed.vectors.norm(dim=-1) - 0.5).sum())
    cosines = (kept.vectors * computed.vectors).sum(dim=-1)[kept.vectors.any(dim=-1)]
    if not kept.table().any():
        raise AbliterateError(
            "The directions lie within those of the protected capabilities, so nothing is left to remove; protect fewer "
            "capabilities with directions.protect."
        )
    lost = f"; {gone} directions lie within these capabilities and are zero" if gone else ""
    context.reporter.note(
        f"{', '.join(map(public_source, settings.protect))} protected: the directions keep {float(cosines.min()):.3f} to "
        f"{float(cosines.max()):.3f} of themselves (cosine){lost}"
    )
    return kept


def _residuals(
    bench: Workbench,
    name: str,
    prompts: tuple[Prompt, ...],
    large: bool,
    sample: Sample,
    feed: Callable[[], Feed | None],
    method: DirectionMethod,
) -> Tensor:
    """The direction method's input from one set; `large`: residuals are added up as they come if only means are needed."""
    context, settings, store = bench.context, bench.settings, bench.context.store
    quantile = settings.directions.winsorize_quantile
    stream = large and needs_means(method)
    keyed = (settings, bench.loaded, bench.chat, prompts)
    keys = {"means": means_key(*keyed), "residuals": residuals_key(*keyed)}
    kind = "means" if stream else "residuals"
    # Either entry serves where means suffice, and the small one is looked up first; else the report wants residuals, too.
    cached = [entry for entry in keys if (stream or entry == kind) and store.has("residuals", keys[entry])]
    stored = store.get("residuals", keys[(cached or [kind])[0]], remember=not stream)
    # One device for what comes from the cache, which is in main memory, and what is computed; mps has no float64.
    on_cpu = settings.efficiency.offload_residuals_to_cpu or bench.loaded.device.type == "mps"
    home = torch.device("cpu") if on_cpu else bench.loaded.device
    if stored is not None:
        context.reporter.note(f"{name} residuals come from the cache", set=name, cached=True)
        found = next(iter(stored.values())).to(home)
        return found if "means" in stored else summarize_residuals(sample.add(found), method, quantile)
    if stream and name not in bench.prompts.protected:  # those are always added up
        context.reporter.note(f"{name} residuals are added up as they come (efficiency.max_residuals_mb)", streamed=True)

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, f"{name} prompts")
        context.check()

    means = ResidualMeans(quantile)
    capture: Callable[..., Tensor | None] = partial(stream_residuals, take=means.add) if stream else capture_residuals
    captured = capture(
        bench.loaded.model,
        bench.loaded.layers,
        bench.chat,
        prompts,
        batch_size=affordable(bench.sizes.residuals, bench.sizes.row_bytes[0], bench.loaded.device),
        amp=settings.efficiency.use_amp_for_residuals,
        offload=settings.efficiency.offload_residuals_to_cpu,
        clear_every=settings.efficiency.cache_clear_frequency,
        progress=progress,
        feed=feed(),
    )
    computed = (means.mean() if captured is None else captured).to(home)
    store.put("residuals", keys[kind], {kind: computed}, f"{bench.loaded.info.id}: {len(prompts)} {name} prompts")
    return computed if stream else summarize_residuals(sample.add(computed), method, quantile)
