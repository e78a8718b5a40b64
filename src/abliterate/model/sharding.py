"""A matrix that writes to the residual stream, sharded by columns over ranks (row-parallel, in transformers' words).

Each rank multiplies its columns of W by its part of x; the products are summed. An edit's low rank part needs the same: a rank
has its columns of `a`, and a·x is a sum over ranks. Backward passes return whole gradients on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank, if it is sharded (all ranks must ask); otherwise itself."""
    full = getattr(tensor, "full_tensor", None)
    if full is None:
        return tensor
    with torch.no_grad():
        return full()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Columns:
    """This rank's columns [start, stop) of a matrix with `total` columns, shared by the ranks of `group`."""

    start: int
    stop: int
    total: int
    group: Any

    def of(self, a: Tensor) -> Tensor:
        """This rank's columns of `a` (…, total); the gradient is whole."""
        return _Own.apply(a, self)  # type: ignore[no-any-return]

    def summed(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors. Its gradient is the same on all ranks, and so is each summand's."""
        return _Sum.apply(partial, self.group)  # type: ignore[no-any-return]

    def shared(self, tensor: Tensor) -> Tensor:
        """`tensor`, which all ranks have and whose products are summed later; its gradients are summed over ranks."""
        return _Shared.apply(tensor, self.group)  # type: ignore[no-any-return]


def columns_of(weight: Any, dim: int = -1) -> Columns | None:
    """This rank's share of a sharded weight, whose input features are in dimension `dim`; None if it isn't sharded there."""
    placements = getattr(weight, "placements", None)
    if placements is None:
        return None
    dim %= weight.ndim
    if [(type(each).__name__, getattr(each, "dim", None)) for each in placements] != [("Shard", dim)]:
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, placements)
    return Columns(offset[dim], offset[dim] + shape[dim], weight.shape[dim], weight.device_mesh.get_group())


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module itself is spread over ranks."""
    return any(hasattr(parameter, "placements") for parameter in module.parameters(recurse=False))


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, columns: Columns) -> Tensor:
        ctx.columns = columns
        return a[..., columns.start : columns.stop].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        columns = ctx.columns
        total = gradient.new_zeros((*gradient.shape[:-1], columns.total))
        total[..., columns.start : columns.stop] = gradient
        torch.distributed.all_reduce(total, group=columns.group)
        return total, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None
