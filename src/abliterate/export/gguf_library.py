"""What the `gguf` library of llama.cpp knows: how each type of tensor packs its entries, and how tensors are named.

The library is an extra and is imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from abliterate.errors import InputError, install_extra
from abliterate.export.job import half_step

# Types that lose little of an edit. With fewer bits an edit of entries that lie on the type's own grid is mostly smaller than
# half a step and is rounded away (docs/decisions.md, Export).
_FINE = ("F32", "F16", "BF16", "Q8_0")
_BLOCKS, _PLAIN = "Q8_0", "F16"
# The dtypes whose rounding `torch.finfo` describes.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A block's scale is stored in float16, so its largest entry may be off by this share more; half of it would do without the
# float32 rounding of the scale itself.
_SCALE = 2.0**-10


def library() -> Any:
    """The `gguf` package.

    Raises:
        InputError: it isn't installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(
            f"Exports to GGUF need the package gguf, which can't be imported ({error}); run {install_extra('gguf')}."
        ) from error
    return gguf


def block_sizes() -> dict[int, tuple[int, int]]:
    """{ggml's number of a type: (entries of a block, bytes of a block)}."""
    return {int(kind): sizes for kind, sizes in library().GGML_QUANT_SIZES.items()}


def type_name(kind: int) -> str:
    """`Q8_0` of 8."""
    return str(library().GGMLQuantizationType(kind).name)


def type_of(name: str) -> int:
    """8 of `Q8_0`, written in any case. InputError if it isn't a type that the library can write."""
    names = [kind.name for kind in library().GGMLQuantizationType if _writable(int(kind))]
    found = next((known for known in names if known.upper() == name.upper()), None)
    if found is None:
        raise InputError(f"The library gguf can't write tensors as {name}; choose --gguf-type from {', '.join(names)}.")
    return int(library().GGMLQuantizationType[found])


def kept_type(stored: int, row: int) -> int:
    """The type for an edited matrix with rows of `row` entries that was stored as `stored`: the same if it holds the edit."""
    if type_name(stored) in _FINE:
        return stored
    return type_of(_BLOCKS if row % block_sizes()[type_of(_BLOCKS)][0] == 0 else _PLAIN)


@cache
def readable(kind: int) -> bool:
    """Whether the library can unpack a type."""
    return _works(lambda: dequantize(bytes(block_sizes()[kind][1]), kind, block_sizes()[kind][0]))


@cache
def _writable(kind: int) -> bool:
    return readable(kind) and _works(lambda: quantize(torch.zeros(1, block_sizes()[kind][0]), kind))


def _works(call: Callable[[], object]) -> bool:
    try:
        call()
    except NotImplementedError:
        return False
    return True


def dequantize(data: bytes, kind: int, row: int) -> Tensor:
    """The rows (n, row) in float32 that are packed in `data`."""
    entries, nbytes = block_sizes()[kind]
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, row // entries * nbytes)
    rows = library().dequantize(packed.numpy(), library().GGMLQuantizationType(kind))
    return torch.from_numpy(rows.reshape(-1, row).astype("float32", copy=False))


def quantize(rows: Tensor, kind: int) -> bytes:
    """The rows (n, row) float32, packed."""
    return bytes(library().quantize(rows.contiguous().numpy(), library().GGMLQuantizationType(kind)).tobytes())


def largest_error(rows: Tensor, kind: int) -> Tensor:
    """How far each entry of `rows` (n, row) float64 may be off once it is stored.

    Floating-point types are off by half a step. In a packed type an entry may be off by as much as any entry of its block
    is when the library packs `rows`, and by the rounding of the block's scale.
    """
    if (dtype := _FLOATS.get(type_name(kind))) is not None:
        return half_step(rows, dtype)
    stored = dequantize(quantize(rows.float(), kind), kind, rows.shape[1])
    blocks = (len(rows), -1, block_sizes()[kind][0])
    error = (stored - rows).abs().view(blocks).amax(dim=2, keepdim=True)
    scale = _SCALE * rows.abs().view(blocks).amax(dim=2, keepdim=True)
    return (error + scale).expand(-1, -1, blocks[2]).reshape(rows.shape)
