"""Quantized formats, one file for each: how a quantized module stores W, and how to read it as a dense matrix.

A new format is a file and a line here. Modules are recognized by the name of their class or of their tensors, so no
quantization package is imported for that.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from abliterate.model.formats.awq import AWQ_FILES, Awq
from abliterate.model.formats.base import InFiles, Storage, device_of
from abliterate.model.formats.bnb import BitsAndBytes
from abliterate.model.formats.compressed import COMPRESSED_FILES, CompressedTensors
from abliterate.model.formats.fp8 import FBGEMM_FILES, FP8_FILES, FineGrainedFP8, FP8Experts
from abliterate.model.formats.gptq import GPTQ_FILES, Gptq
from abliterate.model.formats.mxfp4 import MXFP4_FILES, Mxfp4Experts
from abliterate.model.formats.others import ByProduct, Hqq, TensorClass, is_plain, opaque

__all__ = ["FILES", "STORAGES", "InFiles", "Storage", "device_of", "is_plain", "storage_of", "storage_remedy"]

# The first format that claims a module is used, so compressed-tensors stands before the tensor classes.
_ALL: tuple[Storage, ...] = (
    BitsAndBytes(),
    FineGrainedFP8(),
    FP8Experts(),
    Mxfp4Experts(),
    Gptq(),
    Awq(),
    CompressedTensors(),
    Hqq(),
    TensorClass(),
    ByProduct(),
)
STORAGES: Mapping[str, Storage] = {storage.name: storage for storage in _ALL}
# Formats that can be made dense from weight files alone, by the quantization's name in config.json.
FILES: Mapping[str, tuple[InFiles, ...]] = {
    "fp8": FP8_FILES,
    "mxfp8": FP8_FILES,
    "fbgemm_fp8": FBGEMM_FILES,
    "mxfp4": MXFP4_FILES,
    "gptq": GPTQ_FILES,
    "auto-round": GPTQ_FILES,
    "awq": AWQ_FILES,
    "compressed-tensors": COMPRESSED_FILES,
}


def storage_of(module: nn.Module) -> Storage | None:
    """The quantized format of a module's W; None if it isn't quantized in a known way."""
    return next((storage for storage in STORAGES.values() if storage.holds(module)), None)


def storage_remedy(module: nn.Module) -> str:
    """Why a module can't be edited as it is stored, and the remedy; "" if its format is no obstacle."""
    storage = storage_of(module)
    if storage is None and not opaque(module):
        return ""
    if storage is None:
        return (
            f"its weights are stored in an unknown format ({type(module).__name__}); load them dense with "
            "--set load.dequantize=true, or use the model in full precision"
        )
    if storage.editable:
        return ""
    return f"they are stored as {storage.name} ({type(module).__name__}); load them dense with --set load.dequantize=true"
