"""FP8 stores 8-bit floating point weights with scales of blocks, rows or the whole matrix (some checkpoints have FP4 experts).

It covers transformers' `FP8Linear` and `FP8Experts` (integrations/finegrained_fp8.py) and the linear layers of FBGEMM and
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.model.formats.base import InFiles, Tensors, fp4_values, scaled

# Dtypes whose bytes hold two E2M1 numbers.
_FP4 = (torch.int8, getattr(torch, "float4_e2m1fn_x2", torch.int8))
_ROWS = ("FbgemmFp8Linear", "CompressedTensorsFP8Linear")


class FineGrainedFP8:
    """A linear layer, W = weight × scale. A weight that was loaded dense is W itself."""

    name = "FP8"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("FP8Linear", *_ROWS)

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        weight = module.weight.detach()
        if weight.element_size() > 1:
            return weight
        if type(module).__name__ in _ROWS:  # scales (d_out, 1), or (1, d_out) for the kernel
            return scaled(weight, module.weight_scale.detach().reshape(-1, 1))
        return scaled(_values(weight), module.weight_scale_inv.detach(), _block(module.block_size))


class FP8Experts:
    """Fused experts of FP8 checkpoints; they are read but not edited, since transformers runs them in special kernels."""

    name = "FP8 experts"
    editable = False

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("FP8Experts", "FbgemmFp8Llama4TextExperts")

    def shape(self, module: Any) -> tuple[int, ...]:
        count, rows, columns = module.down_proj.shape
        if type(module).__name__ != "FP8Experts":
            return count, columns, rows
        return count, rows, columns * (2 if module.down_proj.dtype in _FP4 else 1)

    def dense(self, module: Any) -> Tensor:
        down = module.down_proj.detach()
        if type(module).__name__ != "FP8Experts":  # weights (E, d_ff, d_model), scales (E, d_model, 1)
            return scaled(down.transpose(1, 2), module.down_proj_scale.detach())
        block = _block(module.block_size) if down.dtype not in _FP4 else None
        return scaled(_values(down), module.down_proj_scale_inv.detach(), block)


def _values(weight: Tensor) -> Tensor:
    return fp4_values(weight) if weight.dtype in _FP4 else weight


def _block(size: Any) -> tuple[int, int] | None:
    return None if size is None else (int(size[0]), int(size[1]))


def _from_files(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    weight, scale = tensors.values()
    return scaled(_values(weight), scale, _block(config.get("weight_block_size")) if weight.dtype not in _FP4 else None)


def _fbgemm_down(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    """Llama 4's fused experts (E, d_ff, d_model), stored with scales (E, d_model, 1)."""
    weight, scale = tensors.values()
    return scaled(weight.transpose(1, 2), scale).transpose(1, 2)


# A weight or a parameter of fused experts, and its scale under each of the names in use.
FP8_FILES = (
    InFiles(".weight", ".weight", (".weight_scale_inv",), _from_files),
    InFiles(".weight", ".weight", (".scale",), _from_files),
    InFiles(".weight", ".weight", (".qscale_weight",), _from_files),
    InFiles(".weight", ".weight", (".weight_scale",), _from_files),
    InFiles("_proj", "_proj", ("_proj_scale_inv",), _from_files),
)
FBGEMM_FILES = (
    InFiles(".weight", ".weight", (".weight_scale",), _from_files),
    InFiles(".down_proj", ".down_proj", (".down_proj_scale",), _fbgemm_down),
    InFiles(".gate_up_proj", ".gate_up_proj", (".gate_up_proj_scale",), _from_files),
)
