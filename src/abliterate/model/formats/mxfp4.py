"""MXFP4 stores GPT-OSS's experts as blocks of 32 E2M1 numbers, each block with a power of two as its scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from abliterate.model.formats.base import InFiles, Tensors, fp4_values, powers_of_two


class Mxfp4Experts:
    """transformers' `Mxfp4GptOssExperts`; read but not edited, since a fused kernel runs them from router to output."""

    name = "MXFP4 experts"
    editable = False

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Mxfp4GptOssExperts"

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.num_experts, module.hidden_size, module.intermediate_size

    def dense(self, module: Any) -> Tensor:
        """W from blocks and scales; the kernel's own functions undo its layout of them."""
        weight, scales = module.down_proj.storage, module.down_proj_precision_config.weight_scale.storage
        blocks = weight.layout.unswizzle_data(weight.data).transpose(-1, -2)
        exponents = scales.layout.unswizzle_data(scales.data).transpose(-1, -2)
        return mxfp4(blocks.reshape(*exponents.shape, -1), exponents)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """W (E, d_out, 32 G) float32 from bytes: `blocks` (E, d_out, G, 16) and `scales` (E, d_out, G)."""
    return (fp4_values(blocks) * powers_of_two(scales)[..., None]).flatten(-2)


def _from_files(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    """W as (E, d_in, d_out), the layout of GPT-OSS's experts."""
    return mxfp4(*tensors.values()).transpose(1, 2)


MXFP4_FILES = (InFiles("_blocks", "", ("_scales",), _from_files),)
