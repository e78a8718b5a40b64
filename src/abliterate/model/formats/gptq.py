"""GPTQ packs integers into words along d_in and zero points along d_out; each group of inputs has a scale per output.

GPTQModel's and AutoGPTQ's layers use it. Version 1 of the format stores zero points minus one, version 2 as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.formats.base import ROUNDS_NOTHING, InFiles, Tensors, agrees, product, unpacked

_LAYOUTS = ("gptq", "gptq_v2", "auto_round:auto_gptq", "auto_round:gptq")


class Gptq:
    """A layer of any class with `qweight`, `qzeros`, `scales` and `g_idx`."""

    name = "GPTQ"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        return all(getattr(module, name, None) is not None for name in ("qweight", "scales", "g_idx", "in_features"))

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        """W from the words, or from the module's own product for kernels that repack them (Marlin, ExLlama)."""
        shape, scales = self.shape(module), module.scales
        version = module.qzero_format() if hasattr(module, "qzero_format") else 1
        zeros, index = getattr(module, "qzeros", None), module.g_idx
        if zeros is not None and zeros.numel() and index.numel() == shape[1] and not getattr(module, "planar", False):
            try:
                weight = gptq(module.qweight, zeros, scales, index, version)
            except InputError:
                weight = torch.empty(0)
            if weight.shape == shape and agrees(module, weight, scales.dtype, ROUNDS_NOTHING):
                return weight
        return product(module, shape[1], scales.dtype)


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, version: int) -> Tensor:
    """W (d_out, d_in) float32 = scale × (code − zero); `g_idx` (d_in) is the group of each input.

    `qweight` (d_in·bits/32, d_out), `qzeros` (groups, d_out·bits/32) int32, `scales` (groups, d_out). In version 1, a
    stored zero point of 2^bits − 1 wraps round to 0.

    Raises:
        InputError: the shapes don't belong to 2, 3, 4 or 8 bits.
    """
    groups, d_out = scales.shape
    bits = qzeros.shape[1] * 32 // d_out if qzeros.ndim == 2 else 0
    d_in = len(g_idx)
    if bits not in (2, 3, 4, 8) or qweight.shape != (-(-d_in * bits // 32), d_out) or len(qzeros) != groups:
        raise InputError(
            f"A GPTQ matrix of shape {tuple(qweight.shape)} is packed in an unknown way; use a checkpoint of 2, 3, 4 "
            "or 8 bits in the format gptq or gptq_v2."
        )
    codes = unpacked(qweight.T.contiguous(), bits, d_in)  # (d_out, d_in)
    zeros = unpacked(qzeros, bits, d_out).T  # (d_out, groups)
    if version == 1:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    index = g_idx.long()
    return scales.float().T[:, index] * (codes - zeros[:, index])


def _from_files(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    qweight, qzeros, scales = (tensors[name] for name in (".qweight", ".qzeros", ".scales"))
    layout = str(config.get("checkpoint_format") or config.get("format") or config.get("packing_format") or "gptq")
    if layout not in _LAYOUTS:
        raise InputError(
            f"GPTQ weights in the format {layout!r} can't be read from files; use a checkpoint in the format gptq."
        )
    index = tensors.get(".g_idx")
    if index is None or not index.numel():
        bits = qzeros.shape[1] * 32 // scales.shape[1]
        d_in = qweight.shape[0] * 32 // max(bits, 1)
        index = torch.arange(d_in) // -(-d_in // len(scales))
    return gptq(qweight, qzeros, scales, index, 2 if layout == "gptq_v2" else 1)


GPTQ_FILES = (InFiles(".qweight", ".weight", (".qzeros", ".scales"), _from_files, optional=(".g_idx",)),)
