"""Quantized storages of weights, one file for each: which module holds W how.

A new one is a file and a line here. Modules are known by their class's name or their tensors' names: no package of a
quantization is imported for that. Knows nothing of edits, nor of how checkpoints are loaded.
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

# The first that holds a module has it: compressed-tensors before the tensors' own classes.
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
# What can be made dense from weight files alone, by the quantization's name in config.json.
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
    """How a module's W is quantized; None where it isn't, as far as we know."""
    return next((storage for storage in STORAGES.values() if storage.holds(module)), None)


def storage_remedy(module: nn.Module) -> str:
    """Why a module can't be edited as it is stored, and what to do; "" where its storage is no hindrance."""
    storage = storage_of(module)
    if storage is None and not opaque(module):
        return ""
    if storage is None:
        return (
            f"its weights are stored in a way that isn't known ({type(module).__name__}); load them dense with "
            "--set load.dequantize=true, or use the model in full precision"
        )
    if storage.editable:
        return ""
    return f"they are stored as {storage.name} ({type(module).__name__}); load them dense with --set load.dequantize=true"
