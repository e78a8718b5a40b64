"""Calibrate a loaded model once per run: warm it up, and find the prefix that all of its responses share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import torch

from abliterate import ranks
from abliterate.artifacts.cache import from_bytes, to_bytes
from abliterate.engine.prefill import NoEdit
from abliterate.engine.reference import ReferenceEngine
from abliterate.engine.self_check import FAULTS
from abliterate.engine.trial_engine import TrialEngine, Unsupported
from abliterate.errors import TrialError
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.loader import LoadedModel
from abliterate.model.thinking import Markup
from abliterate.model.threads import THREADS
from abliterate.pipeline.cache_keys import prefix_key
from abliterate.pipeline.context import Context
from abliterate.pipeline.from_settings import chat_of, make_engine, markup_of
from abliterate.prompts.sets import PromptSets
from abliterate.settings.schema import EfficiencySettings
from abliterate.types import BatchSizes, Prompt


def detect_prefix(
    respond: Callable[[str], Sequence[str]], markup: Markup, tails: Sequence[str] = (), *, skip: bool = True
) -> tuple[str, list[str]]:
    """The beginning that all responses share, after which the first *response* token comes, and notes for the user.

    `respond(prefix)` gives raw responses to prompts of both sets, continued after `prefix`; `tails` are the texts that the chat
    template puts after each prompt. Unless `skip` is off, a thinking block that a template or a response opens is closed for
    all prompts, and the responses after it are compared again, since some models put white space or a tag there.
    """
    closed, notes = _closed_by_prompts(markup, tails, skip=skip)
    texts = respond(closed)
    start = _shared_start(texts, markup)
    if closed == "":
        inside = markup.open_block(start)
        opened = [block for text in texts if (block := markup.begins_with(text[len(start) :]))]
        if inside is not None or opened:
            position, block = inside or (len(start), opened[0])
            count = "all" if inside else f"{len(opened)} of {len(texts)}"
            notes.append(f"{count} responses open a thinking block {block.opening}, which is {_treatment(skip)}")
            if skip:
                closed = start[:position] + block.closed
                start = _shared_start(respond(closed), markup)
    if skip and (again := markup.open_block(start)) is not None:
        notes.append("the model begins to think again after its thinking block was closed; responses are read after that")
        start = start[: again[0]].rstrip(" ")
    return closed + start, notes


def _closed_by_prompts(markup: Markup, tails: Sequence[str], *, skip: bool) -> tuple[str, list[str]]:
    """The text that closes the thinking block which the chat template leaves open after the prompts, and notes."""
    opened = [markup.open_block(tail) for tail in tails]
    blocks = {open_block[1] for open_block in opened if open_block is not None}
    if not blocks:
        return "", []
    block = sorted(blocks, key=lambda block: block.opening)[0]
    if len(blocks) > 1 or None in opened:  # one prefix can't be right for all prompts
        return "", ["the chat template opens a thinking block for some prompts; their responses are read after that block"]
    notes = [f"the chat template opens a thinking block {block.opening}, which is {_treatment(skip)}"]
    # The closing goes after a line break, because an empty block, as models are trained on it, has two line breaks.
    return ("\n" * tails[0].endswith("\n") + block.closing) if skip else "", notes


def _treatment(skip: bool) -> str:
    return "skipped: it is closed at once" if skip else "kept: the response follows it, within response.max_new_tokens"


def _shared_start(texts: Sequence[str], markup: Markup) -> str:
    """The common start without a partial tag; empty if it is a whole response, which would leave nothing to score."""
    start = common_start(texts)
    return "" if any(text.rstrip() == start.rstrip() for text in texts) else markup.without_partial(start).rstrip(" ")


def common_start(texts: Sequence[str]) -> str:
    """The longest common start without trailing spaces, since a space would change how the next word is tokenized."""
    return os.path.commonprefix(list(texts)).rstrip(" ")


class WarmUp:
    """Runs a throw-away pass once per process, so that no measurement pays for lazy initialization.

    With `once` off it runs at every call, as comparable tools do before each probe.
    """

    def __init__(self, work: Callable[[], object], *, once: bool = True) -> None:
        self._work = work
        self._once = once
        self.runs = 0

    def __call__(self) -> None:
        if self.runs == 0 or not self._once:
            self._work()
            self.runs += 1


def choose_threads(engine: ReferenceEngine, prompts: PromptSets, note: Callable[[str], None]) -> None:
    """Take half of the CPU's threads where a few passes are clearly faster with them; other devices stay as they are.

    So do several ranks, whose clocks would ask for different passes.
    """
    if engine.chat.device.type != "cpu" or ranks.size() > 1:
        return
    lengths = {prompt: len(engine.chat.token_ids(prompt)) for prompt in prompts.harmful_eval}
    shortest = min(lengths, key=lambda prompt: lengths[prompt])  # the cheapest to probe with
    tokens = sum(lengths.values()) + sum(len(engine.chat.token_ids(prompt)) for prompt in prompts.harmless_eval)
    THREADS.compare(
        lambda rows, passes, after: engine.generate_ids([shortest] * rows, 1 + passes, after),
        tokens / lengths[shortest],
        note,
    )


def prefix_responses(
    reference: ReferenceEngine, layers: torch.nn.ModuleList, switches: EfficiencySettings, prompts: Sequence[Prompt]
) -> list[str]:
    """Raw responses of the base model; those of the trial engine end once their shared beginning is known."""
    if switches.use_trial_engine:
        # The prefills are plain, because no mechanism has been checked yet.
        plain = switches.model_copy(update={"use_shared_prefix": False, "use_layer_skip": False, "use_static_cache": False})
        with contextlib.suppress(Unsupported, TrialError, *FAULTS):  # the self-check, which comes later, says what is wrong
            return TrialEngine(reference, layers, NoEdit(), plain, None).raw_responses(prompts)
    return reference.raw_responses(prompts)


def known_prefix(context: Context, loaded: LoadedModel, sizes: BatchSizes, prompts: PromptSets) -> str:
    """The response prefix, from the cache if it is there and none is given; reports the prefix."""
    plain = chat_of(context.settings, loaded.tokenizer, loaded.device)
    key = prefix_key(context.settings, loaded, plain, prompts.all_sets())
    cached = None if context.settings.response.prefix else context.store.get("response-prefix", key)
    prefix = response_prefix(context, loaded, sizes, prompts) if cached is None else from_bytes(cached["prefix"])
    if cached is None:
        context.store.put("response-prefix", key, {"prefix": to_bytes(prefix)}, f"{loaded.info.id}: {prefix!r}")
    if prefix:
        origin = "" if cached is None else " (from the cache)"
        context.reporter.note(f"response prefix: {prefix!r}{origin}", response_prefix=prefix)
    return prefix


def response_prefix(context: Context, loaded: LoadedModel, sizes: BatchSizes, prompts: PromptSets) -> str:
    """The given prefix, or the common beginning of the responses to a few prompts of both sets."""
    response = context.settings.response
    if response.prefix or not response.detect_prefix:
        return response.prefix
    count = response.prefix_prompts
    sample = (*prompts.harmful_eval[:count], *prompts.harmless_eval[:count])

    def chat(prefix: str = "") -> PromptEncoder:
        return chat_of(context.settings, loaded.tokenizer, loaded.device, prefix)

    def respond(prefix: str) -> list[str]:
        engine = make_engine(context, loaded.model, chat(prefix), sizes)
        return prefix_responses(engine, loaded.layers, context.settings.efficiency, sample)

    plain = chat()
    tails = [plain.tail(prompt) for prompt in sample]
    skip = response.thinking == "skip"
    prefix, notes = detect_prefix(respond, markup_of(context.settings, loaded.tokenizer), tails, skip=skip)
    if notes and (switches := [name for name in plain.template.options if "think" in name or "reason" in name]):
        notes.append(f"the chat template itself has {', '.join(switches)} (load.template_options)")
    for note in notes:
        context.reporter.note(note)
    return prefix
