"""The stage that captures what goes into each module to edit, for edits that are computed from it.

Inputs come from the last position of some training prompts of each set and, for the edits that ask for them, from along the
model's own answers to the harmless ones. A run keeps what the edit needs of them with its directions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.directions import Directions, Keys, ModuleInputs
from abliterate.directions.inputs import MOST_ROWS, from_tensors, to_tensors
from abliterate.edits import EditMethod, edit_method, needs_answers, needs_inputs
from abliterate.errors import InputError
from abliterate.model.architectures import Target
from abliterate.model.inputs import Text, capture_inputs
from abliterate.model.memory import affordable, unless_full, usable_memory
from abliterate.model.readers import with_gains
from abliterate.model.weights import in_features
from abliterate.pipeline.cache_keys import answers_key, inputs_key
from abliterate.pipeline.context import unedited_errors
from abliterate.pipeline.workbench import Workbench
from abliterate.types import Prompt

Answers = Sequence[Sequence[int]]  # the ids of each answer


def with_inputs(bench: Workbench, directions: Directions, answers: Answers | None = None) -> Directions:
    """The directions with what the modules to edit need beside them: weights of the norms that they read through, and inputs.

    Inputs are captured or come from the cache, if the edit mode needs them. `answers` are the run's, for its workers and for
    `reproduce`: another device may choose other words.

    Raises:
        InputError: the given answers aren't of these prompts or of this model.
    """
    context, prompts = bench.context, bench.prompts
    directions = with_gains(directions, bench.loaded.model, bench.loaded.targets)
    if not needs_inputs(edit_method(context.settings.edit.mode)):
        return directions
    most = context.settings.edit.capture_prompts
    sets = {"harmful": _spread(prompts.harmful, most), "harmless": _spread(prompts.harmless, most)}
    title = " + ".join(str(len(chosen)) for chosen in sets.values()) + " prompts"
    with context.stage("module inputs", title), bench.base(), unedited_errors():
        inputs = _inputs(bench, sets, answers)
    return replace(directions, inputs=inputs, answers=bench.own_answers)


def _spread(prompts: Sequence[Prompt], most: int) -> tuple[Prompt, ...]:
    """At most so many of the prompts, evenly spread, because data sets are often sorted by subject."""
    count = min(most, len(prompts))
    return tuple(prompts[place * len(prompts) // count] for place in range(count))


def _inputs(bench: Workbench, sets: Mapping[str, Sequence[Prompt]], answers: Answers | None) -> dict[str, ModuleInputs | Keys]:
    """What the edit mode needs of each module's inputs, by the module's name."""
    context, loaded, edit = bench.context, bench.loaded, bench.settings.edit
    method = edit_method(edit.mode)
    # Fewer prompts where more tokens are asked for: all rows of a module are decomposed together.
    tokens = edit.capture_tokens if needs_answers(method) else 0
    asked = _spread(sets["harmless"], MOST_ROWS // tokens) if tokens else ()
    if answers is None or not asked:
        answers = _own_answers(bench, asked, tokens) if asked else ()
    elif len(answers) != len(asked) or not all(_may_be_answer(bench, ids, tokens) for ids in answers):
        raise InputError(
            f"The run's {len(answers)} answers aren't this model's to {len(asked)} prompts; continue the run with --resume and "
            "join it then, or give the recipe's own model and settings."
        )
    bench.own_answers = answers
    key = inputs_key(context.settings, loaded, bench.chat, list(sets.values()), answers)
    stored = context.store.get("inputs", key)
    if stored is not None:
        context.reporter.note("module inputs come from the cache", cached=True)
        return from_tensors(stored)
    texts = {name: [Text(bench.chat.token_ids(p)) for p in chosen] for name, chosen in sets.items()}
    along = [Text(bench.chat.token_ids(prompt), ids) for prompt, ids in zip(asked, answers, strict=True) if ids]
    texts |= {"answers to harmless": along} if along else {}
    inputs: dict[str, ModuleInputs | Keys] = {}
    home = loaded.device if loaded.device.type == "cuda" else torch.device("cpu")  # decompositions in float64
    for group in _groups(loaded.targets, sum(len(text.answer) or 1 for several in texts.values() for text in several)):
        captured = [_captured(bench, group, name, several) for name, several in texts.items()]
        for target in group:
            kept = _reduced(method, [rows.pop(target.name) for rows in captured], home)
            inputs[target.name] = replace(kept, **{part: rows.cpu() for part, rows in vars(kept).items() if rows is not None})
            context.reporter.progress(len(inputs), len(loaded.targets), "modules")
            context.check()
    label = f"{loaded.info.id}: inputs of {len(inputs)} modules for {edit.mode}"
    context.store.put("inputs", key, to_tensors(inputs), label)
    return inputs


def _may_be_answer(bench: Workbench, ids: Sequence[int], most: int) -> bool:
    """Whether the model can have given an answer of these ids, of which a stranger's recipe may have any."""
    return len(ids) <= most and max(ids, default=0) < bench.loaded.model.config.get_text_config().vocab_size


def _groups(targets: Sequence[Target], rows: int) -> list[list[Target]]:
    """The modules in groups whose inputs, so many rows of each, fit half of the free memory; a pass is made for each group.

    While they are put together, inputs are in memory twice. An 8B model's take 2.7 GB once, a 70B model's 13.
    """
    most = usable_memory(torch.device("cpu")) // 4  # all ranks of a model find the same
    groups: list[list[Target]] = []
    taken = 0
    for target in targets:
        needed = 4 * rows * in_features(target.module)
        if not groups or taken + needed > most:
            groups.append([])
            taken = 0
        groups[-1].append(target)
        taken += needed
    return groups


def _reduced(method: EditMethod, captured: Sequence[Tensor], home: torch.device) -> ModuleInputs | Keys:
    """What the method needs of a module's inputs, computed at `home`, or on the CPU where memory runs out there."""
    found = unless_full(lambda: method.reduced(ModuleInputs(*(rows.to(home) for rows in captured))), home)
    return found or method.reduced(ModuleInputs(*captured))


def _own_answers(bench: Workbench, prompts: Sequence[Prompt], tokens: int) -> Answers:
    """The ids of the base's own answers, each without its end; an answer that ends at once has none."""
    context, key = bench.context, answers_key(bench.settings, bench.loaded, bench.chat, prompts, tokens)
    stored = context.store.get("answers", key)
    if stored is None:
        report = context.reporter.progress
        responses = bench.plain.respond(
            prompts, lambda done, total: report(done, total, "harmless prompts answered"), length=tokens
        )
        assert responses is not None  # only a limit can stop it
        ids = [list(bench.plain.ends.without_end(response.ids)) for response in responses]
        stored = {"record": to_bytes(json.dumps(ids))}
        context.store.put("answers", key, stored, f"{bench.loaded.info.id}: {tokens} tokens of {len(ids)} answers")
    return [list(ids) for ids in json.loads(from_bytes(stored["record"]))]


def _captured(bench: Workbench, targets: Sequence[Target], name: str, texts: Sequence[Text]) -> dict[str, Tensor]:
    context, loaded = bench.context, bench.loaded

    def progress(done: int, total: int) -> None:
        context.reporter.progress(done, total, f"{name} prompts")
        context.check()

    size = affordable(bench.sizes.residuals, bench.sizes.row_bytes[0], loaded.device)
    return capture_inputs(loaded.model, targets, texts, batch_size=size, device=loaded.device, progress=progress)
