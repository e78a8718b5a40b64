"""Checkpoints that are quantized themselves: what they are called, what loading them needs, and their weights made dense.

Dense weights come from the files by our own arithmetic where the format is one of `formats.FILES`: neither kernels nor the
format's package are needed. Others are loaded as they are, and their layers replaced. Knows nothing of edits.
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
# What transformers needs for a quantization: the packages by the names they are imported under, and whether a GPU.
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
# These need kernels for a GPU; elsewhere transformers makes them dense by itself, and so do we.
_DENSE_WITHOUT_GPU = ("fp8", "mxfp8", "mxfp4")
# Storages in safetensors that hold no plain numbers.
_OPAQUE = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32")


def method_of(config: PretrainedConfig) -> str:
    """How a checkpoint is quantized, as transformers calls it (fp8, gptq, bitsandbytes_4bit …), or ""."""
    entry = config_entry(config)
    method = str(getattr(entry.get("quant_method"), "value", entry.get("quant_method") or ""))
    if method == "bitsandbytes" or entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes_4bit" if entry.get("load_in_4bit") else "bitsandbytes_8bit"
    return method


def config_entry(config: PretrainedConfig) -> dict[str, Any]:
    """What config.json says of the quantization; empty where it says nothing."""
    found = getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None) or {}
    return dict(found) if isinstance(found, dict) else dict(found.to_dict())


def is_made_dense(config: PretrainedConfig, load: LoadSettings, device: torch.device | None) -> bool:
    """Whether a quantized checkpoint is loaded with dense weights: wanted, or the only way on this device."""
    method = method_of(config)
    on_gpu = device is not None and device.type in ("cuda", "xpu")
    return bool(method) and (load.dequantize or (method in _DENSE_WITHOUT_GPU and not on_gpu))


def check(config: PretrainedConfig, load: LoadSettings, device: torch.device | None) -> None:
    """InputError where a quantized checkpoint can't be loaded here: said in one sentence, before transformers says more."""
    method = method_of(config)
    if not method:
        return
    if load.quantization != "none":
        raise InputError(
            f"The model is quantized already ({method}), so it can't be loaded with load.quantization={load.quantization}; "
            "leave that out, or name the model that it was made from."
        )
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(
            f"The model is quantized as {method!r}, which transformers doesn't know; use the one that it was made from."
        )
    if is_made_dense(config, load, device) and method in FILES:
        return
    packages, needs_gpu = _NEEDS.get(method, ((), False))
    missing = [name for name in packages if not _is_there(name)]
    instead = ", or load its weights dense with --set load.dequantize=true" if method in FILES else ""
    if missing:
        names = " ".join(_PIP.get(name, name.replace("_", "-")) for name in missing)
        raise InputError(f"The model is quantized ({method}), which needs more packages here; pip install {names}{instead}.")
    if needs_gpu and (device is None or device.type == "cpu"):
        raise InputError(f"The model is quantized ({method}), which needs a GPU; run it on one{instead}.")


def label(model: PreTrainedModel, config: PretrainedConfig, load: LoadSettings) -> str:
    """`ModelInfo.quantization`: how the weights in memory are quantized, or were in the checkpoint."""
    method = method_of(config)
    if not method:
        return load.quantization
    return method if getattr(model, "is_quantized", False) else method + DEQUANTIZED


def expected_label(config: PretrainedConfig, load: LoadSettings, device: torch.device) -> str:
    """`label` of a model that isn't loaded yet, as far as is known."""
    method = method_of(config)
    return method + DEQUANTIZED * is_made_dense(config, load, device) if method else load.quantization


def checkpoint_quantization(label: str) -> str:
    """The quantization of a checkpoint from `ModelInfo.quantization`; "" where the checkpoint wasn't quantized."""
    method = label.removesuffix(DEQUANTIZED)
    return "" if method in ("none", "bnb_4bit", "bnb_8bit") else method


class Made:
    """A dense tensor that is made when it is read: what the loader takes for a tensor of a file."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    def __getitem__(self, index: Any) -> Tensor:
        return self._make()[index]


def dense_state(source: str, config: PretrainedConfig, load: LoadSettings) -> dict[str, Made]:
    """{name in a model without quantization: its tensor, read when it is wanted} of all weight files.

    Raises:
        InputError: no safetensors, or a tensor that isn't dense and whose scales or format we don't know.
    """
    method, entry = method_of(config), config_entry(config)
    place: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for path in weight_files(source, load):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 # not a mapping
                place[name], kinds[name] = path, file.get_slice(name).get_dtype()

    def read(name: str) -> Tensor:
        with safe_open(place[name], "pt") as file:
            return file.get_tensor(name)

    state: dict[str, Made] = {}
    used: set[str] = set()
    for rule in FILES[method]:
        for name in place:
            parts = (
                parts_of(rule, name, place)
                if name not in used and (rule.ending != ".weight" or kinds[name] in _OPAQUE)
                else None
            )
            if parts is not None:
                state[name.removesuffix(rule.ending) + rule.dense] = Made(lambda r=rule, p=parts: _make(r, p, read, entry))  # type: ignore[misc]
                used |= set(parts.values())
    for name in place:
        if name in used:
            continue
        if kinds[name] in _OPAQUE and name.endswith(("weight", "proj", "_packed", "_blocks", "qweight")):
            raise InputError(
                f"The tensor {name} is stored as {kinds[name]} without scales that are known for {method}, so it can't be made "
                "dense; load the model without load.dequantize, on a GPU, or use the one that it was made from."
            )
        state[name] = Made(lambda n=name: read(n))  # type: ignore[misc]
    return state


def parts_of(rule: InFiles, name: str, names: Mapping[str, Any]) -> dict[str, str] | None:
    """{ending: the tensor of that name} where `name` stands for a matrix by this rule, else None."""
    if not name.endswith(rule.ending):
        return None
    stem = name.removesuffix(rule.ending)
    if any(stem + ending not in names for ending in rule.parts):
        return None
    more = tuple(ending for ending in rule.optional if stem + ending in names)
    return {ending: stem + ending for ending in (rule.ending, *rule.parts, *more)}


def _make(rule: InFiles, parts: Mapping[str, str], read: Callable[[str], Tensor], entry: Mapping[str, Any]) -> Tensor:
    return rule.make({ending: read(name) for ending, name in parts.items()}, entry).contiguous()


def weight_files(source: str, load: LoadSettings) -> list[str]:
    """The safetensors files of a directory or a Hub model, fetched where they weren't on this disk."""
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
        raise InputError(f"The model in {source} has no safetensors weights, so they can't be made dense; use one that has.")
    return [single]


@torch.no_grad()
def make_layers_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put a plain linear layer of `dtype` in the place of every quantized one, and forget the quantization.

    Raises:
        InputError: a layer's storage can't be replaced.
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
    left = next((name for name, one in model.named_parameters() if not is_plain(one)), "")
    if left:
        raise InputError(
            f"The weights in {left} are quantized in a way that can't be made dense; use the model in full precision."
        )
    for one in model.parameters():  # of quantized checkpoints transformers leaves some as they are stored
        if one.dtype in (torch.float16, torch.bfloat16):
            one.data = one.data.to(dtype)
    forget(model)


def forget(model: Any) -> None:
    """Take every trace of a quantization off a model whose weights are dense."""
    for holder in (model.config, model.config.get_text_config()):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
        vars(holder).pop("_is_quantized", None)
    # Saving would undo what loading did to names and tensors; what was done for the quantization isn't undone.
    done = getattr(model, "_weight_conversions", None) or []
    kept = [one for one in done if not any(hasattr(step, "hf_quantizer") for step in getattr(one, "operations", ()))]
    if done:
        model._weight_conversions = kept
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that a submodule is in
        return False
