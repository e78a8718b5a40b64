"""Reading and writing a module's matrix as W (d_out, d_in), whatever its storage: Linear, Conv1D, bitsandbytes.

Of fused experts, W is the stack of all experts' matrices (E, d_out, d_in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from abliterate.errors import InputError
from abliterate.model.experts import is_stack, stack_of


def out_features(module: nn.Module) -> int | None:
    """d_out of a module that multiplies by a matrix, else None."""
    if isinstance(module, nn.Linear):  # bitsandbytes' linear layers are subclasses
        return module.out_features
    if isinstance(module, Conv1D):
        return module.nf
    return stack_of(module).shape[1] if is_stack(module) else None


def in_features(module: nn.Module) -> int:
    """d_in of a module that multiplies by a matrix."""
    if is_stack(module):
        return stack_of(module).shape[2]
    return module.in_features if isinstance(module, nn.Linear) else module.nx  # type: ignore[return-value]


def n_matrices(module: nn.Module) -> int:
    """How many matrices W a module holds: 1, or the number of its experts."""
    return len(stack_of(module)) if is_stack(module) else 1


def stored_weight(module: nn.Module) -> Tensor:
    """The parameter that holds W, as it is stored."""
    return module.down_proj if is_stack(module) else module.weight  # type: ignore[return-value]


def dense_weight(module: nn.Module) -> Tensor:
    """W (d_out, d_in), or (E, d_out, d_in): a view where the storage is dense, else dequantized; never kept by us.

    Raises:
        InputError: a storage we can't read.
    """
    weight = stored_weight(module).detach()
    kind = type(module).__name__
    if kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        state: Any = module.weight.quant_state  # type: ignore[union-attr]
        if getattr(state, "packing_format_for_cpu", False):
            return _by_product(module)
        return dequantize_4bit(weight.data, state)
    if kind == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        state = module.state if module.state.SCB is not None else module.weight  # type: ignore[union-attr]
        return int8_vectorwise_dequant(weight, state.SCB)  # type: ignore[union-attr,arg-type]
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise InputError(f"The weights of a {kind} are stored as {weight.dtype}, which can't be read; load them in bf16.")
    if is_stack(module):
        return stack_of(module)
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def _by_product(module: nn.Module) -> Tensor:
    """W read off W·I, some columns at a time: bitsandbytes repacks 4-bit weights at the first pass on a CPU, and
    `dequantize_4bit` then gives another matrix without an error."""
    d_in: Any = module.in_features
    bias: Any = module.bias
    columns = []
    for start in range(0, d_in, 1024):
        unit = torch.zeros(min(1024, d_in - start), d_in, device=module.weight.device)  # type: ignore[arg-type]
        unit[:, start:].fill_diagonal_(1)
        product = module.forward(unit)  # type: ignore[operator] # not a call: the module may carry an edit's hook
        columns.append((product if bias is None else product - bias).T)
    return torch.cat(columns, dim=1)


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace W of a dense module, in its own dtype. The old values are gone (DESIGN §8.8)."""
    target = dense_weight(module)  # a view
    target.copy_(weight.to(target.dtype))
