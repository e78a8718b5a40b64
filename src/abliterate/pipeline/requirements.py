"""Describe a model's editable modules, and the memory and time that a run on it needs (`abliterate inspect`).

A loaded model or a skeleton, which is made from the config alone, can be described.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from abliterate.directions.inputs import MOST_ROWS
from abliterate.edits import edit_method, needs_answers, needs_inputs
from abliterate.export.base_weights import whole_because
from abliterate.model.architectures import decoder_layers, missing_components
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.coverage import coverage_of
from abliterate.model.devices import device_name, memory_text
from abliterate.model.experts import is_fused
from abliterate.model.footprint import Shape, learning_bytes, row_bytes, visited_experts
from abliterate.model.loader import LoadedModel, Skeleton, runs_own_code
from abliterate.model.memory import usable_memory
from abliterate.model.quantized import DEQUANTIZED, checkpoint_quantization
from abliterate.model.weights import in_features, n_matrices, out_features
from abliterate.objectives import UNANSWERED
from abliterate.pipeline.batch_size import known_speeds, reserved_bytes
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import plain_engine
from abliterate.pipeline.preflight import adapter_refusal
from abliterate.pipeline.yardstick import ANSWERS, LOOKED
from abliterate.prompts.sets import PromptSets
from abliterate.refine.descent import LOOK
from abliterate.refine.teachers import COMPARED, TEACHERS
from abliterate.scorers.unanswered import ALIKE
from abliterate.scorers.yardstick import TELLING
from abliterate.settings.schema import Settings
from abliterate.terminal.quantities import USUAL_TOKENS, duration_text, in_words
from abliterate.types import OPERATIONS

# The prompt counts that are assumed if prompts can't be read; they are usual in the field.
_USUAL = {"harmful": 400, "harmless": 400, "harmful_eval": 100, "harmless_eval": 100}


@dataclass(frozen=True)
class Workload:
    """The prompts of a run: {set: (count, tokens of the longest prompt, tokens of all prompts)}.

    `assumed` is the reason if the numbers are guessed, else "".
    """

    sets: Mapping[str, tuple[int, int, int]]
    assumed: str = ""

    @staticmethod
    def of(prompts: PromptSets, chat: PromptEncoder) -> Workload:
        """The workload of these prompts, counted."""
        lengths = {name: [len(chat.token_ids(prompt)) for prompt in getattr(prompts, name)] for name in _USUAL}
        return Workload({name: (len(tokens), max(tokens), sum(tokens)) for name, tokens in lengths.items()})

    @staticmethod
    def usual(reason: str) -> Workload:
        """A usual workload, assumed for `reason`."""
        return Workload({name: (count, USUAL_TOKENS, count * USUAL_TOKENS) for name, count in _USUAL.items()}, reason)


def describe(context: Context, loaded: LoadedModel, device: torch.device, prompts: PromptSets) -> tuple[dict[str, Any], bool]:
    """Show the loaded model, and report which parts of it can't be edited.

    Returns the record of its coverage, and whether the time of a run was shown, which needs speeds measured here before.
    """
    settings = context.settings
    engine = plain_engine(context, loaded)
    speeds, work = known_speeds(context, loaded, engine, prompts), Workload.of(prompts, engine.chat)
    record = requirements_of(settings, loaded, device, work, speeds)
    context.reporter.header(in_words(record, arithmetic=False))
    if loaded.info.quantization.endswith(DEQUANTIZED) and not settings.load.dequantize:
        stored = checkpoint_quantization(loaded.info.quantization)
        context.reporter.note(
            f"the checkpoint is quantized ({stored}), which can't run here as it is; its weights were made dense"
        )
    if loaded.architecture.found_by == "structure":
        named = "; ".join(f"{component}: {', '.join(paths)}" for component, paths in loaded.architecture.components.items())
        is_own = runs_own_code(loaded.model.config, settings.load)
        why = "the model has code of its own" if is_own else "the family isn't in the table"
        context.reporter.note(f"{why}; by a test of its layers, these modules write to the residual stream: {named}")
    for component, count in record["coverage"]["layers_without"].items():
        context.reporter.warn(f"{count} of {loaded.info.n_layers} layers have no {component}; nothing is edited there.")
    return dict(record["coverage"]), speeds is not None


def note_time(context: Context, loaded: LoadedModel, chat: PromptEncoder, prompts: PromptSets) -> None:
    """Say how long a run takes at most, by the speeds at which batch sizes were found."""
    speeds = known_speeds(context, loaded, plain_engine(context, loaded), prompts)
    if speeds is not None:
        seconds = _cost(context.settings, loaded, Workload.of(prompts, chat), speeds)["seconds"]["run_at_most"]
        context.reporter.note(f"the whole run takes at most {duration_text(seconds)}", seconds_at_most=round(seconds, 1))


def requirements_of(
    settings: Settings,
    loaded: LoadedModel | Skeleton,
    device: torch.device,
    work: Workload,
    speeds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The record of `abliterate inspect`. `speeds` is {operation: tokens a second}, if they were measured."""
    info, coverage = loaded.info, coverage_of(loaded.model, loaded.architecture, loaded.targets)
    config = loaded.model.config.get_text_config()
    kinds = Counter(getattr(config, "layer_types", None) or ())
    without = missing_components(loaded.targets, loaded.architecture, info.n_layers)
    return {
        "model": {
            "id": info.id,
            "class": type(loaded.model).__name__,
            "family": info.family,
            "found_by": loaded.architecture.found_by,
            "layers_at": loaded.architecture.layers,
            "n_layers": info.n_layers,
            "d_model": info.d_model,
            "layer_kinds": dict(kinds),
            "n_parameters": info.n_parameters,
            "dtype": info.dtype,
            "quantization": info.quantization,
        },
        "device": {"name": device_name(device), "memory": memory_text(device)},
        "edit": {"mode": settings.edit.mode, "representation": settings.edit.representation},
        "coverage": coverage.to_record() | {"layers_without": without},
        "exports": {
            "merged": whole_because(info.source, settings.load, loaded.architecture),
            "adapter": adapter_refusal(settings, loaded.model.config, loaded.targets),
        },
        "memory": _memory(settings, loaded, device, work),
        "cost": _cost(settings, loaded, work, speeds),
    }


def _memory(settings: Settings, loaded: LoadedModel | Skeleton, device: torch.device, work: Workload) -> dict[str, Any]:
    """The bytes of the weights, of a prompt in each operation, of a row of refinement, and of what is kept between trials."""
    model, dtype = loaded.model, getattr(torch, loaded.info.dtype)
    shape = Shape.of(model.config.get_text_config(), dtype)
    weights = _weights_bytes(loaded, dtype)
    longest = {
        "residuals": max(work.sets["harmful"][1], work.sets["harmless"][1]),
        "prefill": work.sets["harmless_eval"][1],
        "decode": work.sets["harmful_eval"][1],
    }
    reserved = reserved_bytes(
        settings, shape, loaded, work.sets["harmful_eval"][0], work.sets["harmless_eval"][0], max(longest.values())
    )
    empty = any(parameter.is_meta for parameter in model.parameters())
    free = max(0, usable_memory(device) - reserved - (weights if empty else 0))
    operations = {}
    for name in OPERATIONS:
        bytes_per_prompt = row_bytes(shape, name, longest[name], settings.response.max_new_tokens)
        operations[name] = {"bytes_per_prompt": bytes_per_prompt, "prompts_that_fit": free // bytes_per_prompt}
    learned = settings.refine.tokens
    tokens = longest["residuals"] + learned
    row = {
        name: learning_bytes(shape, tokens, learned, checkpointing=on) for name, on in (("row", False), ("checkpointed", True))
    }
    return {"weights_bytes": weights, "kept_bytes": reserved, "operations": operations, "refinement": row}


def _weights_bytes(loaded: LoadedModel | Skeleton, dtype: torch.dtype) -> int:
    """The bytes of the weights; a skeleton's weights are counted in `dtype`, or by the size of their quantized files."""
    parameters, info = list(loaded.model.parameters()), loaded.info
    if not any(parameter.is_meta for parameter in parameters):
        return sum(parameter.nbytes for parameter in parameters)
    if checkpoint_quantization(info.quantization) == info.quantization and Path(info.source).is_dir():
        return sum(path.stat().st_size for path in Path(info.source).glob("*.safetensors"))
    return sum(parameter.numel() for parameter in parameters) * dtype.itemsize


def _cost(
    settings: Settings, loaded: LoadedModel | Skeleton, work: Workload, speeds: Mapping[str, float] | None
) -> dict[str, Any]:
    """The tokens that pass through the model, and their cost; an upper bound, as if every trial were evaluated in full."""
    response, trials = settings.response.max_new_tokens, settings.search.trials
    harmful, _, harmful_tokens = work.sets["harmful_eval"]
    harmless, _, harmless_tokens = work.sets["harmless_eval"]
    directions = sum(work.sets[name][2] for name in ("harmful", "harmless")) + _module_inputs(settings, work)
    prompts, decoded = harmful_tokens + harmless_tokens, harmful * response
    layers, head = _multiplied(loaded)
    trial = 2 * (layers * (prompts + decoded) + head * (harmless + decoded))
    tokens: dict[str, float] = {"residuals": directions, "trial_at_most": prompts + decoded}
    flop: dict[str, float] = {"residuals": 2 * layers * directions, "trial_at_most": trial}
    seconds: dict[str, float] | None = None
    if speeds:
        once = prompts / speeds["prefill"] + decoded / speeds["decode"]
        seconds = {"residuals": directions / speeds["residuals"], "trial_at_most": once}
    asked, yardstick = _asked(settings, work)
    fed, measured = _refinement(settings, work)
    of_token = (1, 2 * (layers + head), 1 / speeds["prefill"] if speeds else 0)
    costs: list[tuple[dict[str, float] | None, float]] = list(zip((tokens, flop, seconds), of_token, strict=True))
    for cost, each in costs:
        if cost is not None:
            cost["trial_at_most"] += asked * each
            cost["yardstick_at_most"] = yardstick * each
            cost["refinement_at_most"] = fed * each + measured * cost["trial_at_most"]
            # The baseline costs as much as a trial.
            whole = (trials + 1) * cost["trial_at_most"] + cost["refinement_at_most"]
            cost["run_at_most"] = cost["residuals"] + cost["yardstick_at_most"] + whole
    return {
        "trials": trials,
        "response_tokens": response,
        "prompts": {
            name: {"count": count, "longest_tokens": longest, "tokens": total}
            for name, (count, longest, total) in work.sets.items()
        },
        "assumed": work.assumed,
        "parameters_per_token": layers + head,
        "tokens": tokens,
        "flop": flop,
        "seconds": seconds,
    }


def _module_inputs(settings: Settings, work: Workload) -> int:
    """The tokens that are fed to capture the inputs of modules, where the edit is computed from them."""
    method, edit = edit_method(settings.edit.mode), settings.edit
    if not needs_inputs(method):
        return 0
    mean = {name: work.sets[name][2] / max(1, work.sets[name][0]) for name in ("harmful", "harmless")}
    captured = {name: min(work.sets[name][0], edit.capture_prompts) for name in mean}
    tokens = edit.capture_tokens if needs_answers(method) else 0
    answered = min(captured["harmless"], MOST_ROWS // tokens) if tokens else 0
    # Answers are generated, and then fed once more behind their prompts.
    along = 2 * answered * (mean["harmless"] + tokens)
    return math.ceil(sum(captured[name] * mean[name] for name in mean) + along)


def _asked(settings: Settings, work: Workload) -> tuple[int, int]:
    """The tokens that the base is fed, at most, about a trial's answers, and for its yardstick."""
    response = settings.response.max_new_tokens
    telling = min(TELLING, response)
    (harmful, _, harmful_tokens), (harmless, _, harmless_tokens) = work.sets["harmful_eval"], work.sets["harmless"]
    of_trial = harmful_tokens + harmful * response + ALIKE * (harmful_tokens + harmful * telling)
    answers = min(ANSWERS, harmless)
    prompt = math.ceil(harmless_tokens / max(1, harmless))
    # All are sampled; `generate` doesn't note their log-probabilities, so the base is then shown them. Some are also greedy,
    # and shown after one prompt more than a trial's.
    times = 1 if settings.efficiency.use_trial_engine else 2
    looked = min(LOOKED, answers) * (prompt + response + (ALIKE + 1) * (prompt + telling))
    yardstick = (
        answers * times * (prompt + response) + looked if UNANSWERED in settings.scorers or settings.refine.enabled else 0
    )
    return of_trial if UNANSWERED in settings.scorers else 0, yardstick


def _refinement(settings: Settings, work: Workload) -> tuple[int, int]:
    """At most: the tokens that refinement feeds, forward once and backward twice, and the trials whose answers it makes."""
    refine = settings.refine
    if not refine.enabled:
        return 0, 0
    (n_harmful, _, harmful), (n_harmless, _, harmless) = work.sets["harmful"], work.sets["harmless"]
    rows = {"harmful": harmful / max(1, n_harmful) + refine.tokens, "harmless": harmless / max(1, n_harmless) + refine.tokens}
    step = refine.batch * 3 * (rows["harmful"] + rows["harmless"])
    used = {"harmful": min(n_harmful, refine.prompts), "harmless": min(n_harmless, refine.prompts)}
    looked = refine.validation * (used["harmful"] * rows["harmful"] + 2 * used["harmless"] * rows["harmless"])
    steps = refine.n_descents * refine.steps
    # The base sees all harmless rows at the start if its logits fit into main memory and are kept, else those of every step.
    seen = max(used["harmless"], steps * refine.batch) * rows["harmless"]
    looks = refine.n_descents * math.ceil(refine.steps / LOOK) + 2
    # The answers of teachers that are compared, those of the one that teaches, the base's own, and each descent's to validation
    # prompts, under its edit and under a weaker one, as shares of the evaluation prompts.
    answers = TEACHERS * COMPARED + used["harmless"]
    answers += math.ceil(used["harmful"] * (1 + 2 * refine.n_descents * refine.validation))
    trials = refine.n_descents + math.ceil(answers / max(1, work.sets["harmful_eval"][0]))
    return round(seen + steps * step + looks * looked), trials


def _multiplied(loaded: LoadedModel | Skeleton) -> tuple[int, int]:
    """(layers, head): the number of parameters that a token is multiplied with, counting only the routed experts it visits."""
    visited, total = visited_experts(loaded.model.config.get_text_config()), 0
    for module in decoder_layers(loaded.model, loaded.architecture).modules():
        if is_fused(module):
            parameters = sum(parameter.numel() for parameter in module.parameters(recurse=False) if parameter.dim() == 3)
            total += parameters * min(visited, n_matrices(module)) // n_matrices(module)
        elif out_features(module) is not None:  # counted by shape, because quantized storage has fewer elements
            total += (out_features(module) or 0) * in_features(module)
    head = loaded.model.get_output_embeddings()
    return total, 0 if head is None else sum(parameter.numel() for parameter in head.parameters() if parameter.dim() == 2)
