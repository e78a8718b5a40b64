"""Loads a PEFT adapter onto a model; PEFT wraps the model's own layers in place."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from abliterate.errors import InputError
from abliterate.model.checkpoint import quiet_bitsandbytes
from abliterate.model.model_files import damaged_file, library_errors, reason_of


def check_adapter(path: Path) -> None:
    """InputError for an adapter that acts outside the model's own layers, since only these are run; no weights are read.

    Prompt, prefix and P-tuning put vectors before the model's input, and X-LoRA mixes adapters in a pass of its own: the
    model alone would answer as it does without them.
    """
    quiet_bitsandbytes()
    from peft import PeftConfig

    with library_errors(lambda error: _unreadable(path, damaged_file(path) or reason_of(error))):
        config = PeftConfig.from_pretrained(str(path))
    if config.peft_type is None:
        raise _unreadable(path, "its adapter_config.json doesn't name its kind")
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind == "XLORA":
        raise InputError(
            f"The adapter in {path} is of a kind ({kind}) that acts outside the model's layers, so it would have no "
            "effect; give an adapter that changes layers, as LoRA does."
        )


def with_adapter(model: Any, path: Path) -> Any:
    """The model with the adapter, as PEFT's `PeftModel`. InputError if they don't belong together."""
    quiet_bitsandbytes()
    from peft import PeftModel

    def sentence(error: BaseException) -> InputError:
        reason = damaged_file(path) or reason_of(error)
        return InputError(f"The adapter in {path} doesn't fit the base: {reason}; give the base that it was made from.")

    with warnings.catch_warnings(), library_errors(sentence):
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return PeftModel.from_pretrained(model, str(path)).eval()


def _unreadable(path: Path, reason: str) -> InputError:
    return InputError(f"The adapter in {path} can't be read: {reason}; export it again.")
