"""Parameters that aren't where their module is: of models larger than their devices, accelerate holds some elsewhere.

Such a parameter is on the meta device but for a module's own forward pass; a skeleton's is there for good.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from typing import Any

import torch
from torch import Tensor, nn


def held(module: nn.Module, name: str) -> Tensor:
    """A parameter or other tensor of a module; an offloaded one from where it is held, read anew each time."""
    found = getattr(module, name)
    if isinstance(found, Tensor) and found.is_meta:
        weights = _of_hooks(module, "weights_map")
        if weights is not None:
            return weights[name]  # type: ignore[no-any-return]
    return found  # type: ignore[return-value]


def home_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """The device on which a module multiplies by a tensor of its own."""
    device = _of_hooks(module, "execution_device") if tensor.is_meta else None
    return tensor.device if device is None else torch.device(device)


@functools.cache
def temporary_folder() -> str:
    """Where this process offloads to if no other place is named; gone when it ends."""
    name = tempfile.mkdtemp(prefix="abliterate-offload-")
    atexit.register(shutil.rmtree, name, ignore_errors=True)
    return name


def _of_hooks(module: nn.Module, name: str) -> Any:
    hook: Any = getattr(module, "_hf_hook", None)
    return next((found for one in getattr(hook, "hooks", (hook,)) if (found := getattr(one, name, None)) is not None), None)
