"""The protocol of a quantized format: which modules use it, the matrix they multiply by, and how weight files store it.

It also holds the arithmetic that several formats share: continuous bit packing, E2M1 values, grids of scales, and the product
with the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from abliterate.errors import InputError

# E2M1 (OCP Microscaling Formats 1.0, table 5): sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# How far a module's own product may differ from W x, relative to W x. Kernels that round their inputs to 8 or 4 bits differ by
# 1 to 10 %, other kernels by 0.1 %; a zero point that is off by one changes 8-bit weights by 2.5 %.
ROUNDS_INPUTS, ROUNDS_NOTHING = 0.15, 0.01


class Storage(Protocol):
    """One way in which a module stores W. `editable`: its outputs can be edited by a forward hook."""

    name: str
    editable: bool

    def holds(self, module: nn.Module) -> bool:
        """Whether this module stores W in this format."""

    def shape(self, module: Any) -> tuple[int, ...]:
        """(d_out, d_in), or (E, d_out, d_in) for fused experts."""

    def dense(self, module: Any) -> Tensor:
        """W in that shape, the matrix that the module multiplies by. InputError for a variant that we can't read."""


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class InFiles:
    """How weight files store a matrix: a tensor named STEM + `ending` and its `parts` replace the dense tensor STEM + `dense`.

    `make` computes the dense tensor, laid out as in a model without quantization, from {ending: tensor} and the config's
    quantization entry; `optional` parts may be missing.
    """

    ending: str
    dense: str
    parts: tuple[str, ...]
    make: Callable[[Tensors, Mapping[str, Any]], Tensor]
    optional: tuple[str, ...] = ()


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Words (…, n) int32 as `count` codes of `bits` bits each, read as a continuous stream, lowest bits first."""
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)[..., :count]
    first = torch.arange(count, device=words.device) * bits
    word, shift = first // 32, first % 32
    wide = nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))  # a code may reach into the next word
    return (((wide[..., word] | (wide[..., word + 1] << 32)) >> shift) & ((1 << bits) - 1)).int()


def fp4_values(packed: Tensor) -> Tensor:
    """Bytes (…, n) as numbers (…, 2n) float32: each byte holds two E2M1 numbers, the lower half first."""
    data = packed.contiguous().view(torch.uint8)
    table = torch.tensor(_FP4, device=packed.device)
    return torch.stack([table[(data & 15).long()], table[(data >> 4).long()]], dim=-1).flatten(-2)


def powers_of_two(scale: Tensor) -> Tensor:
    """Scales as float32; scales stored as bytes are E8M0 exponents with a bias of 127."""
    return (
        torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
        if scale.dtype == torch.uint8
        else scale.float()
    )


def scaled(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """`weight` (…, R, C) × `scale` in float32; `scale` is one number, or a grid (…, r, c) with one entry per block.

    `block`: the size of a block; the last block of a row or column may be cut off.

    Raises:
        InputError: the size of the blocks doesn't follow from the grid.
    """
    values, scale = weight.float(), powers_of_two(scale)
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.ndim < 2:
        scale = scale[:, None]  # one scale per row
    for axis in (-2, -1):
        size, cells = values.shape[axis], scale.shape[axis]
        step = block[axis] if block is not None and -(-size // block[axis]) == cells else size // cells
        if step < 1 or -(-size // step) != cells:
            raise InputError(
                f"A matrix of {size} rows or columns has {cells} scales, which don't fit blocks of one size; use another "
                "checkpoint."
            )
        if 1 < cells < size:
            scale = scale.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
    return values * scale


def device_of(module: nn.Module) -> torch.device:
    """The device that holds a module's weights."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


@torch.no_grad()
def product(module: Any, d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """W (d_out, d_in) from the module's own product W·I, 1,024 columns at a time."""
    bias = getattr(module, "bias", None)
    columns = []
    for start in range(0, d_in, 1024):
        unit = torch.zeros(min(1024, d_in - start), d_in, device=device_of(module), dtype=dtype)
        unit[:, start:].fill_diagonal_(1)
        out = module.forward(unit)  # not a call, which would run an edit's hook
        columns.append((out if bias is None else out - bias).T)
    return torch.cat(columns, dim=1)


@torch.no_grad()
def agrees(module: Any, weight: Tensor, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether a module multiplies by `weight` (d_out, d_in), up to `tolerance`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[1], generator=generator).to(weight.device, dtype)
    out, bias = module.forward(x).float(), getattr(module, "bias", None)
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    return bool((out - expected).norm() <= tolerance * expected.norm())


def float_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a quantized module computes in: that of its half-precision scales, otherwise float32."""
    dtypes = (tensor.dtype for tensor in itertools.chain(module.buffers(), module.parameters()))
    return next((dtype for dtype in dtypes if dtype in (torch.float16, torch.bfloat16)), torch.float32)
