"""Save the files that belong beside weights: tokenizer, chat template, processor, generation config, licences, model card."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, GenerationConfig, PreTrainedTokenizerBase

from abliterate.export.base_weights import fetched
from abliterate.export.job import ExportJob

_STEMS, _ENDINGS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"), ("", ".txt", ".md")
_LICENCES = tuple(f"{stem}*" for stem in _STEMS)


def save_companions(job: ExportJob, folder: Path) -> None:
    """Save everything except weights and config into `folder`."""
    revision = job.load.revision or "main"
    _save_processor(job, folder, revision)
    # After the processor, which saves a tokenizer and a chat template of its own.
    _save_tokenizer(job.tokenizer, folder)
    with contextlib.suppress(OSError):  # a base without a generation config gives an export without it
        GenerationConfig.from_pretrained(job.source, revision=revision).save_pretrained(folder)
    for path in _licences(job):
        shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(job.card, encoding="utf-8")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer without the arguments it was loaded with: with them, an export's bytes depend on the network."""
    kwargs: dict[str, Any] = tokenizer.init_kwargs
    removed: dict[str, Any] = {name: kwargs.pop(name) for name in ("is_local", "local_files_only") if name in kwargs}
    try:
        tokenizer.save_pretrained(folder)
    finally:
        kwargs.update(removed)


def _licences(job: ExportJob) -> list[Path]:
    """The licence files of a directory, or those files with a usual name that can be fetched of a Hub model."""
    source = Path(job.source)
    if source.is_dir():
        return [path for pattern in _LICENCES for path in source.glob(pattern) if path.is_file()]
    paths = (fetched(job.source, job.load, stem + ending, optional=True) for stem in _STEMS for ending in _ENDINGS)
    return [path for path in paths if path is not None]


def _save_processor(job: ExportJob, folder: Path, revision: str) -> None:
    try:
        # The pinned revision, above all if its code is run.
        processor = AutoProcessor.from_pretrained(job.source, revision=revision, trust_remote_code=job.load.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return  # text-only models have no processor
    if not isinstance(processor, PreTrainedTokenizerBase):
        processor.save_pretrained(folder)
