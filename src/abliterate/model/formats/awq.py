"""AWQ stores 4 bits: eight codes a word along d_out, interleaved (0, 2, 4, 6, 1, 3, 5, 7); W = scale × (code − zero)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.formats.base import ROUNDS_NOTHING, InFiles, Tensors, agrees, product, unpacked

# The position in a word of each of eight neighbouring outputs.
_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """A layer with `qweight`, `qzeros` and `scales` but no `g_idx`: AutoAWQ's `WQLinear_*`, GPTQModel's `Awq*`."""

    name = "AWQ"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        named = all(getattr(module, name, None) is not None for name in ("qweight", "scales", "in_features"))
        return named and getattr(module, "g_idx", None) is None

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        """W from the words, or from the module's own product for kernels with other layouts (GEMV, Marlin)."""
        shape, zeros = self.shape(module), getattr(module, "qzeros", None)
        if zeros is not None and module.qweight.shape == (shape[1], shape[0] // 8):
            try:
                weight = awq(module.qweight, zeros, module.scales)
            except InputError:
                weight = torch.empty(0)
            if weight.shape == shape and agrees(module, weight, module.scales.dtype, ROUNDS_NOTHING):
                return weight
        return product(module, shape[1], module.scales.dtype)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """W (d_out, d_in) float32 of `qweight` (d_in, d_out/8), `qzeros` (groups, d_out/8) int32 and `scales` (groups, d_out).

    Raises:
        InputError: the shapes don't belong to the GEMM layout.
    """
    groups, d_out = scales.shape
    d_in = len(qweight)
    if qweight.shape[1] * 8 != d_out or qzeros.shape != (groups, d_out // 8) or d_in % groups:
        raise InputError(
            f"An AWQ matrix of shape {tuple(qweight.shape)} isn't in the GEMM layout of 4 bits, so it can't be read; use a "
            "checkpoint in that layout."
        )
    codes, zeros = (
        _codes(words, d_out).repeat_interleave(step, dim=0) for words, step in ((qweight, 1), (qzeros, d_in // groups))
    )
    return (scales.float().repeat_interleave(d_in // groups, dim=0) * (codes - zeros)).T


def _codes(words: Tensor, d_out: int) -> Tensor:
    in_words = unpacked(words, 4, d_out).unflatten(-1, (-1, 8))
    return in_words[..., list(_POSITIONS)].flatten(-2)


def _from_files(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    layout = str(config.get("version") or config.get("format") or "gemm").lower()
    if layout != "gemm":
        raise InputError(f"AWQ weights in the layout {layout!r} can't be read from files; use a checkpoint in the layout gemm.")
    return awq(*tensors.values())


AWQ_FILES = (InFiles(".qweight", ".weight", (".qzeros", ".scales"), _from_files),)
