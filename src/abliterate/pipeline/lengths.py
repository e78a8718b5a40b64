"""Compares the lengths of prompts with what the model can read, before its weights are loaded.

A model with learned positions has none beyond its limit, so a longer prompt is an error. A model whose positions are computed
(rotary embeddings) reads longer prompts, but wasn't trained on them, which is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from abliterate.edits import edit_method, needs_answers
from abliterate.errors import InputError
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.checkpoint import empty_model
from abliterate.objectives import UNANSWERED
from abliterate.prompts.sets import HeldoutSets, PromptSets
from abliterate.settings.schema import Settings
from abliterate.types import Prompt

# The sets to which whole responses are always generated; for the directions only the prompts' last positions are read.
_ANSWERED = ("harmful_eval", "harmless_eval", "harmful_heldout", "harmless_heldout", "over_refusal")
# Tables with rows before the first position, of which OPT has two.
_OFFSETS = 8


@dataclass(frozen=True)
class _Long:
    """A prompt that the model can't read with its response; `number` counts from 1 in its set."""

    name: str
    number: int
    tokens: int
    response: int


def named_sets(prompts: PromptSets | None, held: HeldoutSets | None = None) -> dict[str, Sequence[Prompt]]:
    """The prompts of all sets by the names of their settings."""
    sets: dict[str, Sequence[Prompt]] = dict(prompts.by_name()) if prompts else {}
    if held is not None:
        sets |= {"harmful_heldout": held.harmful, "harmless_heldout": held.harmless, "over_refusal": held.over_refusal}
    return sets


def check_lengths(
    settings: Settings,
    config: PretrainedConfig,
    chat: PromptEncoder,
    sets: Mapping[str, Sequence[Prompt]],
    warn: Callable[[str], None],
) -> None:
    """Warn of prompts that are longer than the model was trained on.

    Raises:
        InputError: a prompt is longer than the model's table of positions.
    """
    limit = positions_of(config)
    long = list(_long(chat, sets, limit, _response_tokens(settings))) if limit else []
    if not long:
        return
    worst = max(long, key=lambda entry: entry.tokens + entry.response)
    remedy = "shorten the prompt or leave it out" + (", or lower response.max_new_tokens" if worst.response else "")
    what = _what(worst, len(long) - 1)
    if has_table(empty_model(config, settings.load), limit):
        raise InputError(f"{what}, but the model can read {limit} tokens; {remedy}.")
    warn(f"{what}, but the model was trained on {limit}; beyond that its answers mean little, and so do scores: {remedy}.")


def positions_of(config: PretrainedConfig) -> int:
    """The number of positions that the model was made for; 0 if it has no limit, or doesn't say."""
    text_config = config.get_text_config()
    # MPT's name for the length of its table of distances
    limit = getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "max_seq_len", None)
    return limit if isinstance(limit, int) and limit > 0 else 0


def has_table(model: PreTrainedModel, limit: int) -> bool:
    """Whether positions are rows of a table, learned or fixed, so that there are no more of them than `limit`."""
    if not hasattr(model.config.get_text_config(), "max_position_embeddings"):
        return True
    tables = [(name, module.num_embeddings) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    tables += [(name, len(buffer)) for name, buffer in model.named_buffers() if buffer.ndim == 2]
    leaves = [(name.rpartition(".")[2], rows) for name, rows in tables]
    return any((leaf == "wpe" or "pos" in leaf) and limit <= rows <= limit + _OFFSETS for leaf, rows in leaves)


def _response_tokens(settings: Settings) -> dict[str, int]:
    """The most tokens of the responses to each set's prompts; the yardstick and refinement have training prompts answered."""
    whole = settings.response.max_new_tokens
    found = dict.fromkeys(_ANSWERED, whole)
    if UNANSWERED in settings.scorers or settings.refine.enabled:
        found["harmless"] = whole
    if settings.refine.enabled:
        found["harmful"] = settings.refinement_response_tokens
    if needs_answers(edit_method(settings.edit.mode)):  # inputs of modules are captured along answers
        found["harmless"] = max(found.get("harmless", 0), settings.edit.capture_tokens)
    return found


def _long(
    chat: PromptEncoder, sets: Mapping[str, Sequence[Prompt]], limit: int, response_tokens: Mapping[str, int]
) -> Iterator[_Long]:
    for name, prompts in sets.items():
        response = response_tokens.get(name, 0)
        for number, prompt in enumerate(prompts, start=1):
            tokens = len(chat.token_ids(prompt))
            # The last token of a response isn't read any more.
            if tokens + max(0, response - 1) > limit:
                yield _Long(name, number, tokens, response)


def _what(worst: _Long, others: int) -> str:
    """The longest of the prompts, and how many others are too long."""
    answer = f" and its response up to {worst.response}" if worst.response else ""
    more = f" ({others} more {'is' if others == 1 else 'are'} too long)" if others else ""
    return f"Prompt {worst.number} of the set {worst.name} has {worst.tokens} tokens{answer}{more}"
