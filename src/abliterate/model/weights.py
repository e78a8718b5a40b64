"""Reads a module's matrix as W (d_out, d_in), whether it is a Linear, a Conv1D, or quantized in one of `model/formats`.

For fused experts, W holds all experts' matrices (E, d_out, d_in).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from abliterate.errors import InputError
from abliterate.model.experts import fused_weight, is_fused
from abliterate.model.formats import device_of, is_plain, storage_of
from abliterate.model.offload import held, home_of
from abliterate.model.sharding import whole


def shape_of(module: nn.Module) -> tuple[int, ...] | None:
    """(d_out, d_in), or (E, d_out, d_in), if the module multiplies by a matrix, else None."""
    if is_fused(module):
        return tuple(fused_weight(module).shape)
    storage = storage_of(module)
    if storage is not None:
        return storage.shape(module)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def out_features(module: nn.Module) -> int | None:
    """d_out if the module multiplies by a matrix, else None."""
    shape = shape_of(module)
    return shape[-2] if shape is not None else None


def in_features(module: nn.Module) -> int:
    """d_in of a module; it must multiply by a matrix."""
    shape = shape_of(module)
    assert shape is not None
    return shape[-1]


def n_matrices(module: nn.Module) -> int:
    """The number of matrices in a module: 1, or the number of its fused experts."""
    shape = shape_of(module)
    return shape[0] if shape is not None and len(shape) == 3 else 1


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter that stores W in a module that isn't quantized, in its stored layout."""
    return module.down_proj if is_fused(module) else module.weight  # type: ignore[return-value]


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """The device of W, and the dtype of its products; None for a quantized W, which doesn't show it."""
    if is_fused(module) or storage_of(module) is None:
        weight = stored_weight(module)
        return home_of(module, weight), weight.dtype if is_plain(weight) else None
    return device_of(module), None


def dense_weight(module: nn.Module) -> Tensor:
    """W (d_out, d_in), or (E, d_out, d_in): a view of a dense weight, otherwise a dequantized copy that we never keep.

    A weight that is sharded over ranks is gathered, so every rank must ask for it.

    Raises:
        InputError: we can't read the format.
    """
    if is_fused(module):
        return whole(fused_weight(module))
    storage = storage_of(module)
    if storage is not None:
        return storage.dense(module)
    weight = whole(held(module, "weight").detach())
    if not is_plain(weight):
        raise InputError(
            f"The weights of a {type(module).__name__} are stored as {weight.dtype}, which can't be read; load them in bf16."
        )
    return weight.T if isinstance(module, Conv1D) else weight
