"""The names that a command takes as MODEL: `demo`, a local directory, or a Hub id.

It is free of torch, so that the command line can refuse a mistyped path before torch is loaded.
"""

from __future__ import annotations

from pathlib import Path

from abliterate.errors import InputError, as_command
from abliterate.files import expanded

DEMO = "demo"


def demo_path() -> Path:
    """The directory of the demo model and prompts that ship in the package."""
    return Path(__file__).parents[1] / "demo"


def is_path(model: str) -> bool:
    """Whether a name can only be a path, because no Hub id is written like it."""
    return expanded(model).is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or "\\" in model


def check_model_name(model: str, command: str = "run") -> None:
    """InputError if no model is named, or if the name is a path that is no directory.

    `command` is the command that the remedy shows. Whether a directory holds a model is not looked at.
    """
    if not model:
        example = as_command(command, DEMO)
        raise InputError(f"No model was given; name a Hub id, a local directory, or demo: {example}.")
    path = expanded(model)
    if model == DEMO or path.is_dir():
        return
    if path.exists():
        raise InputError(f"The path {model} is a file; give the directory that holds config.json and the weights.")
    if is_path(model):
        raise InputError(f"There is no model directory {model}; check the path, or give a Hub id like owner/name.")
