"""What belongs beside weights: tokenizer, chat template, processor, generation config, licence files, model card."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from transformers import AutoProcessor, GenerationConfig, PreTrainedTokenizerBase

from abliterate.export.base import ExportJob

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def save_companions(job: ExportJob, folder: Path) -> None:
    """Save everything but weights and config into `folder`."""
    job.tokenizer.save_pretrained(folder)
    _save_processor(job, folder)
    revision = job.load.revision or "main"
    with contextlib.suppress(OSError):  # the base has none, so the export has none
        GenerationConfig.from_pretrained(job.source, revision=revision).save_pretrained(folder)
    source = Path(job.source)
    if source.is_dir():
        for pattern in _LICENCES:
            for path in source.glob(pattern):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(job.card, encoding="utf-8")


def _save_processor(job: ExportJob, folder: Path) -> None:
    try:
        processor = AutoProcessor.from_pretrained(job.source, trust_remote_code=job.load.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError):
        return  # text-only models have no processor
    if not isinstance(processor, PreTrainedTokenizerBase):
        processor.save_pretrained(folder)
