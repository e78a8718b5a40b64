"""Reads offloaded parameters: if a model is larger than its devices, accelerate holds some parameters elsewhere.

Such a parameter is on the meta device except during its module's forward pass. A skeleton's parameters always are.
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
    """A parameter or other tensor of a module; an offloaded tensor is read again on each call."""
    tensor = getattr(module, name)
    if isinstance(tensor, Tensor) and tensor.is_meta:
        weights = _of_hooks(module, "weights_map")
        if weights is not None:
            return weights[name]  # type: ignore[no-any-return]
    return tensor  # type: ignore[return-value]


def home_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """The device on which a module multiplies by its own `tensor`."""
    device = _of_hooks(module, "execution_device") if tensor.is_meta else None
    return tensor.device if device is None else torch.device(device)


@functools.cache
def temporary_folder() -> str:
    """The folder to which this process offloads by default; it is deleted when the process ends."""
    name = tempfile.mkdtemp(prefix="abliterate-offload-")
    atexit.register(shutil.rmtree, name, ignore_errors=True)
    return name


def _of_hooks(module: nn.Module, name: str) -> Any:
    """An attribute of accelerate's hooks on a module; None if no hook has it."""
    hook: Any = getattr(module, "_hf_hook", None)
    values = (getattr(single, name, None) for single in getattr(hook, "hooks", (hook,)))
    return next((value for value in values if value is not None), None)
