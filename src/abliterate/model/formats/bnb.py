"""bitsandbytes stores 4 or 8 bits: quantized while loading (`load.quantization`), or already in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abliterate.model.formats.base import product


class BitsAndBytes:
    """`Linear4bit` (NF4 or FP4 blocks) and `Linear8bitLt` (int8 rows)."""

    name = "bitsandbytes"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ in ("Linear4bit", "Linear8bitLt")

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        weight = module.weight.detach()
        if type(module).__name__ == "Linear8bitLt":
            from bitsandbytes.functional import int8_vectorwise_dequant

            if weight.dtype != torch.int8:  # not quantized yet: on a CPU this happens in the first pass
                return weight
            state = module.state if module.state.SCB is not None else module.weight
            return int8_vectorwise_dequant(weight, state.SCB)
        from bitsandbytes.functional import dequantize_4bit

        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # The first pass on a CPU repacks 4-bit weights; `dequantize_4bit` then returns another matrix without an error.
            return product(module, module.in_features)
        return dequantize_4bit(weight.data, state)
