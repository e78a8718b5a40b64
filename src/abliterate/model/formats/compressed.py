"""compressed-tensors stores packed integers, int8, FP8 or FP4 with scales, as vLLM's tools write them.

Its modules remain `nn.Linear`; their first pass makes them dense again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from abliterate.errors import InputError
from abliterate.model.formats.base import InFiles, Tensors, fp4_values, powers_of_two, scaled, unpacked

_PARTS = (".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_global_scale", ".weight_g_idx")


class CompressedTensors:
    """A linear layer with a `quantization_scheme` for its weights."""

    name = "compressed-tensors"
    editable = True

    def holds(self, module: nn.Module) -> bool:
        """A linear layer with a scheme; a decompressed layer is a plain one."""
        scheme, status = getattr(module, "quantization_scheme", None), _status(module)
        return getattr(scheme, "weights", None) is not None and status != "decompressed" and isinstance(module, nn.Linear)

    def shape(self, module: Any) -> tuple[int, ...]:
        return module.out_features, module.in_features

    def dense(self, module: Any) -> Tensor:
        if _status(module) != "compressed":  # its weights are rounded in each pass, and its inputs, which W must not depend on
            from compressed_tensors.quantization.lifecycle.forward import forward_quantize

            rounded: Tensor = forward_quantize(module, module.weight.detach(), "weight", module.quantization_scheme.weights)
            return rounded
        tensors = {f".{name}": tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
        tensors |= {f".{name}": tensor for name, tensor in module._buffers.items() if tensor is not None}
        block = getattr(module.quantization_scheme.weights, "block_structure", None)
        return compressed(tensors, None if block is None else (int(block[0]), int(block[1])))


def compressed(tensors: Tensors, block: tuple[int, int] | None = None) -> Tensor:
    """W (d_out, d_in) float32 from the tensors of one layer, by their names.

    Raises:
        InputError: the format is none of those that the message names.
    """
    scale, zero = tensors[".weight_scale"], tensors.get(".weight_zero_point")
    packed = tensors.get(".weight_packed")
    if packed is None:
        weight = tensors[".weight"]
        if zero is not None and weight.dtype == torch.int8:
            # Zero points are laid out as the scales are.
            return scaled(weight, scale, block) - scaled(torch.ones_like(weight), scale * zero.to(scale.dtype), block)
        return scaled(weight, scale, block)
    if packed.dtype == torch.uint8:
        overall = tensors.get(".weight_global_scale")
        scale = powers_of_two(scale) / (1 if overall is None else overall.float())
        return scaled(fp4_values(packed), scale)
    if packed.dtype != torch.int32 or ".weight_shape" not in tensors:
        raise InputError(
            f"A compressed-tensors matrix packed as {packed.dtype} can't be read; use a checkpoint in one of the formats "
            "pack-quantized, int-quantized, float-quantized, nvfp4-pack-quantized or mxfp4-pack-quantized."
        )
    d_out, d_in = (int(size) for size in tensors[".weight_shape"])
    bits = packed.shape[1] * 32 // d_in
    if bits not in (2, 4, 8):  # version 0.14 and earlier packed other widths in another way
        raise InputError(f"A compressed-tensors matrix of {bits} bits can't be read; use a checkpoint of 4 or 8 bits.")
    codes = unpacked(packed, bits, d_in)
    scale = scale.float().reshape(-1, scale.shape[-1]).expand(d_out, -1)
    # Signed codes are stored with an offset of 2^(bits−1), which cancels if there are zero points: they have it too.
    zeros = torch.tensor(1 << (bits - 1)) if zero is None else unpacked(zero.T.contiguous(), bits, d_out).T
    index = _groups(tensors.get(".weight_g_idx"), d_in, scale.shape[1])
    return scale[:, index] * (codes - (zeros if zeros.ndim == 0 else zeros[:, index]))


def _groups(index: Tensor | None, d_in: int, groups: int) -> Tensor:
    """The number of the group that each input (d_in) belongs to."""
    if index is not None and index.numel() == d_in and bool((index >= 0).all()):
        return index.long()
    return torch.arange(d_in) // -(-d_in // groups)


def _status(module: nn.Module) -> str:
    status = getattr(module, "quantization_status", "")
    return str(getattr(status, "value", status))


def _from_files(tensors: Tensors, config: Mapping[str, Any]) -> Tensor:
    if config.get("transform_config") or (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise InputError(
            "Weights of compressed-tensors with transforms or sparsity can't be read from files; use another checkpoint."
        )
    groups = [group.get("weights") or {} for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    block = next((group["block_structure"] for group in groups if group.get("block_structure")), None)
    return compressed(tensors, None if block is None else (int(block[0]), int(block[1])))


COMPRESSED_FILES = (
    InFiles(".weight_packed", ".weight", (".weight_scale",), _from_files, optional=_PARTS[1:]),
    InFiles(".weight", ".weight", (".weight_scale",), _from_files, optional=_PARTS[2:]),
)
