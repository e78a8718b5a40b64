"""Reduces a model's generation config to what changes which tokens come, and sets the length limit of a response.

A generation config may also say how tokens are searched, returned and timed: beams, drafts of an assistant or from the prompt,
kinds of cache, several answers, time limits. None of that belongs to a measurement, so it is left out for the reference, the
trial engine and the chat alike.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from abliterate.errors import InputError, first_line

# The parameters that change which tokens come, beside `watermarking_config`; the sampling parameters count in a chat. All
# others are left out, so that a mode of a later version of transformers can't change a run. `min_length` is left out, too: it
# counts the prompt with its pads, so a response would depend on the other rows of its batch.
_SAMPLING = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_new_tokens", "use_cache"),
)
_PENALTIES = (
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "min_new_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "remove_invalid_values"),
    *("renormalize_logits", "guidance_scale"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

# The entry of a reduced generation config that holds its stop texts.
STOP_TEXTS = "stop_texts"


def stored_generation_config(source: str, revision: str) -> GenerationConfig | None:
    """The reduced generation config that a model ships; None if it ships none.

    It is reduced before `transformers` checks it, because a config with modes that exclude each other isn't loaded at all.

    Raises:
        InputError: the file can't be read, or a parameter that counts is wrong.
    """
    try:
        path = cached_file(source, "generation_config.json", revision=revision or None)
        record = json.loads(Path(path or "").read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError("it holds no JSON object")
        return _reduced(record)
    except OSError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"The generation_config.json of {source} can't be used ({first_line(error)}); correct the file, or remove it."
        ) from error


def reduce_generation_config(model: PreTrainedModel) -> None:
    """Reduce the generation config of a model that was just loaded, in place; it may have been made from the model's config.

    `generate` takes whatever a given config leaves open from the model's own, so it isn't enough to leave it out there. Stop
    texts are moved to the entry `stop_texts`, because `generate` would search the vocabulary for them at every call; `Ends`
    searches it once.
    """
    if model.generation_config is not None:  # None: the model can't generate
        model.generation_config = _reduced(vars(model.generation_config))


def _reduced(record: Mapping[str, Any]) -> GenerationConfig:
    """The generation config of the parameters in `record` that count."""
    given = record.get(STOP_TEXTS) or record.get("stop_strings") or ()
    texts = [text for text in ([given] if isinstance(given, str) else given) if text]
    # A dictionary in a file, which becomes an object.
    reduced = GenerationConfig(watermarking_config=record.get("watermarking_config"))
    # Set one by one: a config that is made or updated with them warns of values that other values make useless.
    for name in (*_TOKENS, *_SAMPLING, *_PENALTIES):
        setattr(reduced, name, copy.deepcopy(record.get(name)))
    if texts:
        setattr(reduced, STOP_TEXTS, texts)
    return reduced


def stop_texts(model: PreTrainedModel) -> tuple[str, ...]:
    """The texts that end a response."""
    return tuple(getattr(model.generation_config, STOP_TEXTS, None) or ())


def limited_config(model: PreTrainedModel, max_new_tokens: int) -> GenerationConfig:
    """A copy of the model's generation config that allows a response at most `max_new_tokens`."""
    config: Any = copy.deepcopy(model.generation_config)
    config.update(num_beams=1, max_length=None, max_new_tokens=max_new_tokens)
    if config.min_new_tokens:
        config.min_new_tokens = min(config.min_new_tokens, max_new_tokens)
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = next(iter(ends), None) if isinstance(ends, list) else ends
    assert isinstance(config, GenerationConfig)
    return config


def rope_switch(config: Any) -> int:
    """The number of tokens beyond which a model with LongRoPE turns all positions by other angles; 0 for other models.

    Plain `generate` then feeds the text once more, which a cache of earlier passes would spare.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(given, Mapping) or given.get("rope_type", given.get("type")) != "longrope":
        return 0
    return int(given.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0) or 0)
