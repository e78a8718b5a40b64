"""Reads a prompt set from its source: a file (`prompts/files.py`), or a Hub data set through the package `datasets`."""

from __future__ import annotations

from abliterate.errors import InputError, first_line
from abliterate.model.hub import skip_retries_without_network
from abliterate.prompts.files import DatasetName, parse_source, read_prompts, wrap
from abliterate.settings.schema import PromptSettings
from abliterate.types import Prompt


def load_prompts(source: str, settings: PromptSettings) -> tuple[Prompt, ...]:
    """The prompts of a text file, a JSONL file or a column of a data set, with prefix, suffix and system prompt.

    Raises:
        InputError: the source is missing, unreadable or empty, or the Hub can't be reached.
    """
    parsed = parse_source(source)
    wrapping = {"prefix": settings.prefix, "suffix": settings.suffix, "system": settings.system}
    if isinstance(parsed, DatasetName):
        return _load_dataset(parsed, settings)
    return read_prompts(parsed, **wrapping)


def _load_dataset(name: DatasetName, settings: PromptSettings) -> tuple[Prompt, ...]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"The data set {name.name} needs the package datasets; install it with pip install datasets, or give a text file."
        ) from error
    skip_retries_without_network()
    try:
        rows = load_dataset(name.name, *([name.config] if name.config else []), split=name.split)
    # datasets raises many errors of its own, of huggingface_hub and of httpx; they all mean that there is no data set.
    except Exception as error:
        raise InputError(
            f"The data set {name.name} (split {name.split}) can't be loaded: {first_line(error)}; without a network, "
            "give a text file in its place (--harmful FILE or --set prompts.harmful=FILE, and likewise for the other sets)."
        ) from error
    if name.column not in rows.column_names:
        raise InputError(f"The data set {name.name} has no column {name.column!r}; name one of {', '.join(rows.column_names)}.")
    texts = [text for text in rows[name.column] if text is not None]  # a null row is not the prompt "None"
    not_text = next((text for text in texts if not isinstance(text, str)), None)
    if not_text is not None:
        raise InputError(
            f"The column {name.column!r} of the data set {name.name} holds {type(not_text).__name__} values, not text; name a "
            f"column of text, of {', '.join(rows.column_names)}."
        )
    prompts = [Prompt(text, settings.system) for text in texts if text.strip()]
    if not prompts:
        raise InputError(f"The data set {name.name} (split {name.split}) holds no prompts; choose another split.")
    return wrap(prompts, settings.prefix, settings.suffix)
