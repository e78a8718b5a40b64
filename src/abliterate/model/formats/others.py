"""Storages that say themselves what W is: tensor classes with `dequantize` (torchao, Quanto), HQQ, and any linear layer
whose product with the identity is W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.formats.base import ROUNDS_INPUTS, agrees, float_dtype, product

# EETQ, HIGGS, AQLM and Gemma, VPTQ, BitNet, Metal, NVFP4, FP-Quant: modules of transformers or of the package it asks for.
_BY_PRODUCT = {"EetqLinear", "HiggsLinear", "QuantizedLinear", "VQuantLinear", "BitLinear", "AutoBitLinear", "MetalLinear"}
_BY_PRODUCT |= {"NVFP4Linear", "FPQuantLinear"}


class TensorClass:
    """A linear layer whose weight is an object of another class than Tensor: torchao's and Quanto's."""

    name = "torchao or Quanto"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        """See `Storage.holds`."""
        weight = module._parameters.get("weight")
        return isinstance(module, nn.Linear) and weight is not None and type(weight).dequantize is not Tensor.dequantize

    def shape(self, module: Any) -> tuple[int, ...]:
        """See `Storage.shape`."""
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        """See `Storage.dense`."""
        return module.weight.detach().dequantize()


class Hqq:
    """HQQ's own layer."""

    name = "HQQ"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        """See `Storage.holds`."""
        return type(module).__name__ == "HQQLinear"

    def shape(self, module: Any) -> tuple[int, ...]:
        """See `Storage.shape`."""
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        """See `Storage.dense`."""
        return module.dequantize().detach()


class ByProduct:
    """Layers whose packing we don't read: W is their product with the identity, if they are linear."""

    name = "another quantization"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        """See `Storage.holds`."""
        return type(module).__name__ in _BY_PRODUCT

    def shape(self, module: Any) -> tuple[int, ...]:
        """See `Storage.shape`."""
        if hasattr(module, "in_features"):
            return module.out_features, module.in_features
        return module.weight.shape[1], module.weight.shape[0]  # EETQ

    def dense(self, module: Any) -> Tensor:
        """See `Storage.dense`. InputError: the layer isn't linear, or also norms its input."""
        dtype = float_dtype(module)
        weight = product(module, self.shape(module)[1], dtype)
        if not agrees(module, weight, dtype, ROUNDS_INPUTS):
            raise InputError(
                f"A {type(module).__name__} doesn't multiply by one matrix, so it can't be edited; use the model in full "
                "precision."
            )
        return weight


def is_other_class(weight: Tensor) -> bool:
    """Whether a tensor's data aren't plain numbers in memory: its class is some package's own."""
    return not f"{type(weight).__module__}.".startswith("torch.")


def is_plain(weight: Tensor) -> bool:
    """Whether a tensor is dense: floating point of 16 bits at least, in memory as it is."""
    return weight.is_floating_point() and weight.element_size() >= 2 and not is_other_class(weight)


def opaque(module: nn.Module) -> bool:
    """Whether a module's own matrices are stored in a way that isn't dense."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return any(one is not None and one.ndim >= 2 and one.dtype != torch.bool and not is_plain(one) for one in own)
