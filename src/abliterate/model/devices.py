"""Chooses the device that the settings name, and describes it: its common name and its free memory."""

from __future__ import annotations

import torch

from abliterate.errors import InputError
from abliterate.model.memory import free_memory, total_memory


def choose_device(device: str) -> torch.device:
    """The device of that name, or the best available one for `auto`. InputError if it can't be used."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"The device {device!r} can't be used here; choose --device auto or cpu.") from error
    return chosen


def device_name(device: torch.device) -> str:
    """The device's common name, such as the model of a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


def memory_text(device: torch.device) -> str:
    """Free and total memory of the device, in words."""
    free, total = free_memory(device), total_memory(device)
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
