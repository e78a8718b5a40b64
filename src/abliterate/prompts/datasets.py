"""Reads a prompt set from its source: a file (`prompts/files.py`), or a data set through the package `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from abliterate.errors import InputError, first_line
from abliterate.model.hub import skip_retries_without_network
from abliterate.prompts.files import DatasetName, FileColumn, FolderColumn, parse_source, read_prompts, wrap
from abliterate.settings.schema import PromptSettings
from abliterate.types import Prompt


def load_prompts(source: str, settings: PromptSettings, note: Callable[[str], None] = lambda text: None) -> tuple[Prompt, ...]:
    """The prompts of a file or of a column of a data set, with prefix, suffix and system prompt.

    `note` is told which column of a file was chosen.

    Raises:
        InputError: the source is missing, unreadable or empty, or the Hub can't be reached.
    """
    parsed = parse_source(source)
    if isinstance(parsed, DatasetName | FolderColumn):
        return _of_dataset(parsed, settings)
    path, column = (parsed.path, parsed.column) if isinstance(parsed, FileColumn) else (parsed, "")
    prefix, suffix, system = settings.prefix, settings.suffix, settings.system
    return read_prompts(path, column=column, prefix=prefix, suffix=suffix, system=system, note=note)


def _of_dataset(source: DatasetName | FolderColumn, settings: PromptSettings) -> tuple[Prompt, ...]:
    name = source.name if isinstance(source, DatasetName) else str(source.path)
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"The data set {name} needs the package datasets; install it with pip install datasets, or give a text file."
        ) from error
    rows = _rows(source) if isinstance(source, DatasetName) else _rows_of_folder(source)
    if source.column not in rows.column_names:
        raise InputError(f"The data set {name} has no column {source.column!r}; name one of {', '.join(rows.column_names)}.")
    texts = [text for text in rows[source.column] if text is not None]  # a null row is not the prompt "None"
    not_text = next((text for text in texts if not isinstance(text, str)), None)
    if not_text is not None:
        raise InputError(
            f"The column {source.column!r} of the data set {name} holds {type(not_text).__name__} values, not text; name a "
            f"column of text, of {', '.join(rows.column_names)}."
        )
    prompts = [Prompt(text, settings.system) for text in texts if text.strip()]
    if not prompts:
        raise InputError(f"The data set {name} (split {source.split}) holds no prompts; choose another split.")
    return wrap(prompts, settings.prefix, settings.suffix)


def _rows(name: DatasetName) -> Any:
    """The rows of a data set of the Hub."""
    from datasets import load_dataset

    skip_retries_without_network()
    try:
        return load_dataset(name.name, *([name.config] if name.config else []), split=name.split)
    # datasets raises many errors of its own, of huggingface_hub and of httpx; they all mean that there is no data set.
    except Exception as error:
        raise InputError(
            f"The data set {name.name} (split {name.split}) can't be loaded: {first_line(error)}; without a network, "
            "give a text file in its place (--harmful FILE or --set prompts.harmful=FILE, and likewise for the other sets)."
        ) from error


def _rows_of_folder(source: FolderColumn) -> Any:
    """The rows of a data set in a folder: its files, or what `save_to_disk` wrote there."""
    import datasets

    try:
        if not any((source.path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(str(source.path), split=source.split)
        saved = datasets.load_from_disk(str(source.path))
        # A single data set answers to any name of a split.
        name = source.split.partition("[")[0]
        parts = saved if isinstance(saved, datasets.DatasetDict) else {name: saved}
        sizes = {name: len(part) for name, part in parts.items()}
        slices = datasets.ReadInstruction.from_spec(source.split).to_absolute(sizes)
        return datasets.concatenate_datasets([parts[one.splitname].select(range(one.from_, one.to)) for one in slices])
    except Exception as error:  # as above; here a damaged file or a split that isn't there
        raise InputError(
            f"The data set in {source.path} (split {source.split}) can't be loaded: {first_line(error)}; name a split that it "
            "has, or give one of its files."
        ) from error
