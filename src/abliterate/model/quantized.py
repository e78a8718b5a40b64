"""Loads quantized checkpoints: names their format, checks that its package and GPU are there, and makes their weights dense.

For the formats in `formats.FILES`, our own arithmetic computes dense weights from the files, without kernels or the format's
package. Other checkpoints are loaded as they are, and their layers are then replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from abliterate.errors import InputError
from abliterate.model.formats import FILES, InFiles, is_plain, storage_of
from abliterate.settings.schema import LoadSettings

DEQUANTIZED = " (dequantized)"
# The requirements of transformers for a quantization: packages, by their import names, and whether it needs a GPU.
_NEEDS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    "gptq": (("optimum", "gptqmodel"), False),
    "awq": (("gptqmodel",), False),
    "auto-round": (("auto_round",), False),
    "compressed-tensors": (("compressed_tensors",), False),
    "torchao": (("torchao",), False),
    "fbgemm_fp8": (("fbgemm_gpu",), True),
    "hqq": (("hqq",), True),
    "quanto": (("optimum", "optimum.quanto"), False),
    "eetq": (("kernels",), True),
    "aqlm": (("aqlm",), False),
    "vptq": (("vptq",), True),
    "spqr": (("spqr_quant",), True),
    "quark": (("quark",), False),
    "bitsandbytes_4bit": (("bitsandbytes",), False),
    "bitsandbytes_8bit": (("bitsandbytes",), False),
}
_PIP = {
    "optimum.quanto": "optimum-quanto",
    "fbgemm_gpu": "fbgemm-gpu-genai",
    "quark": "amd-quark",
    "spqr_quant": "spqr-quant[gpu]",
}
# These need GPU kernels; on other devices transformers makes them dense itself, and so do we.
_DENSE_WITHOUT_GPU = ("fp8", "mxfp8", "mxfp4")
# Dtypes in safetensors that don't store plain numbers.
_OPAQUE = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32")


def method_of(config: PretrainedConfig) -> str:
    """The quantization of a checkpoint in transformers' terms (fp8, gptq, bitsandbytes_4bit …); "" if it isn't quantized."""
    entry = config_entry(config)
    method = str(getattr(entry.get("quant_method"), "value", entry.get("quant_method") or ""))
    if method == "bitsandbytes" or entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes_4bit" if entry.get("load_in_4bit") else "bitsandbytes_8bit"
    return method


def config_entry(config: PretrainedConfig) -> dict[str, Any]:
    """The quantization entry of config.json; empty if there is none."""
    entry = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None) or {}
    return dict(entry) if isinstance(entry, dict) else dict(entry.to_dict())


def is_made_dense(config: PretrainedConfig, load: LoadSettings, device: torch.device | None) -> bool:
    """Whether a quantized checkpoint is loaded with dense weights, by request or as the only way on this device."""
    method = method_of(config)
    on_gpu = device is not None and device.type in ("cuda", "xpu")
    return bool(method) and (load.dequantize or (method in _DENSE_WITHOUT_GPU and not on_gpu))


def check(config: PretrainedConfig, load: LoadSettings, device: torch.device | None) -> None:
    """InputError if a quantized checkpoint can't be loaded here: one sentence, before transformers' longer message."""
    method = method_of(config)
    if not method:
        return
    if load.quantization != "none":
        raise InputError(
            f"The model is quantized already ({method}), so it can't be loaded with load.quantization={load.quantization}; "
            "drop that setting, or name the model that it was made from."
        )
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(
            f"The model is quantized as {method!r}, which transformers doesn't know; use the model that it was made from."
        )
    if is_made_dense(config, load, device) and method in FILES:
        return
    packages, needs_gpu = _NEEDS.get(method, ((), False))
    missing = [name for name in packages if not _is_there(name)]
    instead = ", or load its weights dense with --set load.dequantize=true" if method in FILES else ""
    if missing:
        names = " ".join(_PIP.get(name, name.replace("_", "-")) for name in missing)
        raise InputError(
            f"The model is quantized ({method}), which needs more packages here; run pip install {names}{instead}."
        )
    if needs_gpu and (device is None or device.type == "cpu"):
        raise InputError(f"The model is quantized ({method}), which needs a GPU; run it on one{instead}.")


def label(model: PreTrainedModel, config: PretrainedConfig, load: LoadSettings) -> str:
    """`ModelInfo.quantization`: the quantization of the weights in memory, or their former one in the checkpoint."""
    method = method_of(config)
    if not method:
        return load.quantization
    return method if getattr(model, "is_quantized", False) else method + DEQUANTIZED


def expected_label(config: PretrainedConfig, load: LoadSettings, device: torch.device) -> str:
    """`label` of a model that isn't loaded yet, as far as its config shows."""
    method = method_of(config)
    return method + DEQUANTIZED * is_made_dense(config, load, device) if method else load.quantization


def checkpoint_quantization(label: str) -> str:
    """The checkpoint's quantization from `ModelInfo.quantization`; "" if the checkpoint wasn't quantized."""
    method = label.removesuffix(DEQUANTIZED)
    return "" if method in ("none", "bnb_4bit", "bnb_8bit") else method


class Made:
    """A dense tensor that is computed when it is read; the loader treats it like a tensor in a file."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> Tensor:
        return self._make()[index]


def dense_state(source: str, config: PretrainedConfig, load: LoadSettings) -> dict[str, Made]:
    """{name in a model without quantization: its tensor, read on demand}, from all weight files.

    Raises:
        InputError: there are no safetensors, or a tensor isn't dense and we don't know its scales or format.
    """
    method, entry = method_of(config), config_entry(config)
    file_of: dict[str, str] = {}
    stored_dtype: dict[str, str] = {}
    for path in weight_files(source, load):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 # not a mapping
                file_of[name], stored_dtype[name] = path, file.get_slice(name).get_dtype()

    def read(name: str) -> Tensor:
        with safe_open(file_of[name], "pt") as file:
            return file.get_tensor(name)

    state: dict[str, Made] = {}
    used: set[str] = set()
    for rule in FILES[method]:
        for name in file_of:
            parts = (
                parts_of(rule, name, file_of)
                if name not in used and (rule.ending != ".weight" or stored_dtype[name] in _OPAQUE)
                else None
            )
            if parts is not None:
                state[name.removesuffix(rule.ending) + rule.dense] = Made(lambda r=rule, p=parts: _make(r, p, read, entry))  # type: ignore[misc]
                used |= set(parts.values())
    for name in file_of:
        if name in used:
            continue
        if stored_dtype[name] in _OPAQUE and name.endswith(("weight", "proj", "_packed", "_blocks", "qweight")):
            raise InputError(
                f"The tensor {name} is stored as {stored_dtype[name]} without scales that are known for {method}, so it can't "
                "be made dense; load the model without load.dequantize, on a GPU, or use the model that it was made from."
            )
        state[name] = Made(lambda n=name: read(n))  # type: ignore[misc]
    return state


def parts_of(rule: InFiles, name: str, names: Mapping[str, Any]) -> dict[str, str] | None:
    """{ending: name of the tensor} if by this rule `name` and its parts store a matrix, else None."""
    if not name.endswith(rule.ending):
        return None
    stem = name.removesuffix(rule.ending)
    if any(stem + ending not in names for ending in rule.parts):
        return None
    optional = tuple(ending for ending in rule.optional if stem + ending in names)
    return {ending: stem + ending for ending in (rule.ending, *rule.parts, *optional)}


def _make(rule: InFiles, parts: Mapping[str, str], read: Callable[[str], Tensor], entry: Mapping[str, Any]) -> Tensor:
    return rule.make({ending: read(name) for ending, name in parts.items()}, entry).contiguous()


def weight_files(source: str, load: LoadSettings) -> list[str]:
    """The safetensors files of a directory or a Hub model, downloaded if they aren't on this disk."""
    options: dict[str, Any] = {"revision": load.revision} if load.revision else {}
    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(source, "model.safetensors.index.json", **options, **lenient)
    if index is not None:
        if Path(source).is_dir():
            names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
            return [str(Path(source) / name) for name in names]
        return list(get_checkpoint_shard_files(source, index, **options)[0])
    single = cached_file(source, "model.safetensors", **options, **lenient)
    if single is None:
        raise InputError(
            f"The model in {source} has no safetensors weights, so they can't be made dense; use a model that has them."
        )
    return [single]


@torch.no_grad()
def make_layers_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every quantized layer by a plain linear layer of `dtype`, and remove the quantization from the model.

    Raises:
        InputError: a layer's format can't be made dense.
    """
    for name, module in list(model.named_modules()):
        storage = storage_of(module)
        if storage is None:
            continue
        if not storage.editable:
            raise InputError(
                f"The weights in {name} are stored as {storage.name}, which can't be made dense; use the model in full "
                "precision."
            )
        weight, bias = storage.dense(module), getattr(module, "bias", None)
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        plain.weight = nn.Parameter(weight.to(dtype).contiguous(), requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain.eval())
    left = next((name for name, parameter in model.named_parameters() if not is_plain(parameter)), "")
    if left:
        raise InputError(
            f"The weights in {left} are quantized in a way that can't be made dense; use the model in full precision."
        )
    for parameter in model.parameters():  # transformers leaves some parameters of quantized checkpoints in their stored dtype
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)
    forget(model)


def forget(model: Any) -> None:
    """Remove every trace of a quantization from a model whose weights are dense."""
    for holder in (model.config, model.config.get_text_config()):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
        vars(holder).pop("_is_quantized", None)
    # Saving reverts the loader's conversions of names and tensors; those made for the quantization mustn't be reverted.
    conversions = getattr(model, "_weight_conversions", None) or []
    kept = [conversion for conversion in conversions if not _is_of_quantizer(conversion)]
    if conversions:
        model._weight_conversions = kept
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _is_of_quantizer(conversion: Any) -> bool:
    return any(hasattr(step, "hf_quantizer") for step in getattr(conversion, "operations", ()))


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of a submodule is missing
        return False
