"""Models over several devices that aren't here: fake tensors have a device, a shape and no values.

The devices are cpu:1 and cpu:2, since fake tensors of devices that torch isn't built for can't be sliced. An operation on
tensors of two devices fails as it does on real ones. Values can't be read, so a test gives the engine the tokens that it would
have read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextlib.contextmanager
def fake_devices() -> Iterator[None]:
    """While active, new tensors are fake."""
    real = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        """`torch.tensor` forgets a CPU's number."""
        made = real(*args, **kwargs)
        return made if device is None else torch.empty(made.shape, dtype=made.dtype, device=device)

    select = torch.Tensor.index_select

    def index_select(self: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
        """Fake tensors don't look at an index's device."""
        assert index.device == self.device
        return select(self, dim, index)

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch.Tensor, "index_select", index_select)
        yield


class _Moving(AlignDevicesHook):
    """Moves a module's inputs to its device, as accelerate's dispatch does; `place` has moved the module itself."""

    def init_hook(self, module: Any) -> Any:
        return module


def place(model: nn.Module, devices: Mapping[str, str]) -> None:
    """Put modules {path: device} on fake devices, with accelerate's hooks around them; inside `fake_devices` only.

    The device of "" is that of the inputs, to which the outputs return.
    """
    for path, device in devices.items():
        module = model.get_submodule(path)
        for part in module.modules() if path else ():
            for name, tensor in part._parameters.items():
                if tensor is not None:
                    part._parameters[name] = nn.Parameter(torch.empty_like(tensor, device=device), requires_grad=False)
            for name, tensor in part._buffers.items():
                if tensor is not None:
                    part._buffers[name] = torch.empty_like(tensor, device=device)
        hook = _Moving(execution_device=torch.device(device), io_same_device=not path, skip_keys="past_key_values")
        add_hook_to_module(module, hook)
    model.hf_device_map = {path: device for path, device in devices.items() if path}  # type: ignore[assignment]
