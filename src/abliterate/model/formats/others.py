"""Quantized formats that return W themselves: tensor classes with `dequantize` (torchao, Quanto), HQQ, and linear layers.

A linear layer in a packing we don't read returns W as its product with the identity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.formats.base import ROUNDS_INPUTS, agrees, float_dtype, product

# Modules of EETQ, HIGGS, AQLM and Gemma, VPTQ, BitNet, Metal, NVFP4, FP-Quant, in transformers or the package that it requires.
_BY_PRODUCT = {"EetqLinear", "HiggsLinear", "QuantizedLinear", "VQuantLinear", "BitLinear", "AutoBitLinear", "MetalLinear"}
_BY_PRODUCT |= {"NVFP4Linear", "FPQuantLinear"}


class TensorClass:
    """A linear layer whose weight belongs to torchao's or Quanto's own tensor class."""

    name = "torchao or Quanto"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and weight is not None and type(weight).dequantize is not Tensor.dequantize

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        return module.weight.detach().dequantize()


class Hqq:
    """HQQ's own linear layer."""

    name = "HQQ"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ == "HQQLinear"

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        return module.dequantize().detach()


class ByProduct:
    """Layers whose packing we don't read; if they are linear, their product with the identity is W."""

    name = "another quantization"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        return type(module).__name__ in _BY_PRODUCT

    def shape(self, module: Any) -> tuple[int, ...]:
        if hasattr(module, "in_features"):
            return module.out_features, module.in_features
        return module.weight.shape[1], module.weight.shape[0]  # EETQ

    def dense(self, module: Any) -> Tensor:
        """W as the product with the identity. InputError if the layer isn't linear or also normalizes its input."""
        dtype = float_dtype(module)
        weight = product(module, self.shape(module)[1], dtype)
        if not agrees(module, weight, dtype, ROUNDS_INPUTS):
            raise InputError(
                f"A {type(module).__name__} doesn't multiply by one matrix, so it can't be edited; use the model in full "
                "precision."
            )
        return weight


def is_other_class(weight: Tensor) -> bool:
    """Whether a tensor belongs to a class of another package than torch, so that its data aren't plain numbers."""
    return not f"{type(weight).__module__}.".startswith("torch.")


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is dense: plain floating point numbers of at least 16 bits."""
    return weight.is_floating_point() and weight.element_size() >= 2 and not is_other_class(weight)


def opaque(module: nn.Module) -> bool:
    """Whether any of a module's own matrices is stored in a way that isn't dense."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(
        tensor is not None and tensor.ndim >= 2 and tensor.dtype != torch.bool and not is_plain(tensor) for tensor in own
    )
