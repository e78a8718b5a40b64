"""Loads a model's weights, completely and in the requested dtype, quantized or made dense on request.

No other module loads weights; the error sentences for weights that can't be loaded are here.
"""

from __future__ import annotations

import copy
import logging
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from abliterate import ranks
from abliterate.errors import InputError, install_extra
from abliterate.model import offload, quantized, tensor_parallel
from abliterate.model.formats import FILES
from abliterate.model.generation import reduce_generation_config, stored_generation_config
from abliterate.model.memory import free_memory, is_out_of_memory
from abliterate.model.model_config import blame_fields, check_parameters
from abliterate.model.model_files import CONFIG, check_weight_files, named, reading
from abliterate.settings.schema import LoadSettings

# The share of free main memory that weights may take.
_WEIGHTS_SHARE = 0.9


def load_weights(
    source: str,
    load: LoadSettings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device | None,
    warn: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """The model with the weights of `source` in `dtype`, and a reduced generation config. `device` None: as stored, on the CPU.

    Raises:
        InputError: the weights don't exist or are incomplete, or a quantization's package or GPU is missing.
            torch.OutOfMemoryError: they don't fit, as far as that is known beforehand.
    """
    quiet_bitsandbytes()
    check_weight_files(source, config)
    quantized.check(config, load, device)
    dense = quantized.is_made_dense(config, load, device)
    if ranks.size() > 1:
        is_quantized = load.quantization != "none" or bool(quantized.method_of(config))
        tensor_parallel.check(config, load, empty_model(config, load), quantized=is_quantized)
    if (
        load.quantization == "none"
        and (dense or not quantized.method_of(config))
        and not load.device_map
        and (device is None or device.type == "cpu")
    ):
        ranks.agree(lambda: _check_memory(config, load, dtype))
    auto, kwargs = auto_class(config, load), _options(source, load, dtype, device, dense=dense)
    part = "its weights" if getattr(config, "quantization_config", None) is None else "its weights or its quantization_config"
    try:
        with reading(source, part, but=(RuntimeError,), suspects=lambda: _check_parts(source, load, config)):
            if dense and quantized.method_of(config) in FILES:
                model, loading = _from_files(source, load, config, kwargs)
            else:
                model, loading = auto.from_pretrained(source, **kwargs)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):  # out of memory and the like
            if not is_out_of_memory(error):
                empty_model(config, load)  # if the config is at fault, this says so
            raise
        raise InputError(
            f"The model in {source} is incomplete: tensors that the loader joins, such as experts, don't fit together; "
            "download it again, or check that weights and config belong together."
        ) from error
    _check_complete(source, loading, model, quantized.method_of(config), warn)
    if dense and model.is_quantized:
        quantized.make_layers_dense(model, dtype)
    reduce_generation_config(model)
    return model.eval().requires_grad_(False)


def _options(
    source: str, load: LoadSettings, dtype: torch.dtype, device: torch.device | None, *, dense: bool
) -> dict[str, Any]:
    """The arguments of `from_pretrained`."""
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": load.trust_remote_code}
    if load.revision:
        kwargs["revision"] = load.revision
    if load.attn_implementation:
        kwargs["attn_implementation"] = load.attn_implementation
    if ranks.size() > 1:
        kwargs["distributed_config"] = tensor_parallel.distributed_config()
    elif device is not None:
        kwargs["device_map"] = load.device_map or {"": str(device)}
        if load.device_map:
            # Used only for weights that the files store in another layout than the model, above all fused experts.
            kwargs["offload_folder"] = load.offload_folder or offload.temporary_folder()
        if load.max_memory:
            kwargs["max_memory"] = max_memory(load)
        kwargs |= _quantization(load, dtype)
    elif dense:  # otherwise some packages would choose an accelerator
        kwargs["device_map"] = {"": "cpu"}
    # Mismatched sizes are not ignored: they are reported as missing tensors are, in a sentence instead of a table on stderr.
    kwargs["generation_config"] = stored_generation_config(source, load.revision)
    return kwargs | {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def empty_model(config: PretrainedConfig, load: LoadSettings) -> PreTrainedModel:
    """The model without weights (on the meta device), for its modules and their names.

    Raises:
        InputError: the config describes no model; the sentence names the wrong field if it can be found.
    """
    source = config.name_or_path
    if not source:  # a config that is made in memory has no file to blame
        return _on_meta(config, load)
    with reading(source, CONFIG, suspects=lambda: blame_fields(source, load, lambda changed: _on_meta(changed, load))):
        model = _on_meta(config, load)
    check_parameters(source, sum(parameter.numel() for parameter in model.parameters()))
    return model


def _on_meta(config: PretrainedConfig, load: LoadSettings) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config, load).from_config(config, trust_remote_code=load.trust_remote_code)
    return model


def random_model(config: PretrainedConfig, load: LoadSettings) -> PreTrainedModel:
    """The model with random weights in float32, on the CPU. torch.OutOfMemoryError if main memory is too small."""
    _check_memory(config, load, torch.float32)
    with reading(config.name_or_path or "", CONFIG):
        model: PreTrainedModel = auto_class(config, load).from_config(config, trust_remote_code=load.trust_remote_code)
    model = model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # scales begin at 1: a channel-wise scaled output would look like a copy
            parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def auto_class(config: PretrainedConfig, load: LoadSettings) -> Any:
    """The auto class that loads the whole model, including a vision part, which an export would lose otherwise."""
    _check_kernels(config, load)
    if load.trust_remote_code:
        return transformers.AutoModelForCausalLM
    composite = config.get_text_config() is not config
    if getattr(config, "is_encoder_decoder", False):
        raise _no_decoder(config)
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and (composite or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return transformers.AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    # Models with an audio part. Models that speak have no forward pass of the whole model.
    if type(config) in getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING", ()) and not hasattr(config, "talker_config"):
        return transformers.AutoModelForMultimodalLM
    raise _no_decoder(config)


def _check_kernels(config: PretrainedConfig, load: LoadSettings) -> None:
    """Replace attention kernels from the Hub, which are code, in a config by what the settings name; InputError if nothing."""
    for part in (config, config.get_text_config()):
        kernel = str(getattr(part, "_attn_implementation", None) or "")
        if "/" in kernel and load.attn_implementation:
            part._attn_implementation = load.attn_implementation
        elif "/" in kernel:
            allow = shlex.join(["--set", f"load.attn_implementation={kernel}"])
            raise InputError(
                f"The model's config.json asks for the attention kernels {kernel}, which are code from the Hub; allow them "
                f"with {allow}, or choose --set load.attn_implementation=sdpa."
            )


def _no_decoder(config: PretrainedConfig) -> InputError:
    return InputError(
        f"transformers has no class for {config.model_type!r} that continues a prompt; encoders and encoder-decoders can't be "
        "edited, and of models that speak (Qwen-Omni) only the thinker can be, saved as a model of its own."
    )


def dense_load(load: LoadSettings) -> LoadSettings:
    """These settings, but with dense weights, whatever the checkpoint stores and the settings request."""
    return load.model_copy(update={"quantization": "none", "dequantize": True})


def _from_files(
    source: str, load: LoadSettings, config: PretrainedConfig, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A quantized checkpoint with dense weights: `from_pretrained` of its class is given tensors instead of files."""
    state = quantized.dense_state(source, config, load)
    plain = copy.deepcopy(config)
    for holder in (plain, plain.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    options = {
        name: value for name, value in kwargs.items() if name not in ("revision", "use_safetensors", "trust_remote_code")
    }
    cls: Any = type(empty_model(plain, load))
    model, loading = cls.from_pretrained(None, config=plain, state_dict=state, **options)
    model.name_or_path = plain.name_or_path = source
    quantized.forget(model)
    return model, loading


def _check_memory(config: PretrainedConfig, load: LoadSettings, dtype: torch.dtype) -> None:
    """torch.OutOfMemoryError if main memory can't hold the weights; without it, the system would kill the process silently."""
    needed = dtype.itemsize * sum(parameter.numel() for parameter in empty_model(config, load).parameters())
    free = free_memory(torch.device("cpu"))
    if needed > _WEIGHTS_SHARE * free:
        raise torch.OutOfMemoryError(
            f"its weights take {needed / 2**30:.1f} GiB of main memory and {free / 2**30:.1f} GiB are free"
        )


def max_memory(load: LoadSettings) -> dict[int | str, str]:
    """`load.max_memory` as accelerate reads it; InputError for a device that isn't there."""
    limits: dict[int | str, str] = {int(name) if name.isdecimal() else name: size for name, size in load.max_memory.items()}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    mps = accelerator is not None and accelerator.type == "mps"
    there = ["mps"] if mps else [*range(torch.accelerator.device_count() if accelerator is not None else 0)]
    for name, size in limits.items():
        if name not in (*there, "cpu", "disk"):
            raise InputError(
                f"The setting load.max_memory names the device {name}, which isn't there; the devices here are "
                f"{', '.join(map(str, (*there, 'cpu')))}: correct the setting."
            )
        if not re.fullmatch(r"\d+(\.\d+)? ?[KMG]i?B", size, re.IGNORECASE):
            raise InputError(f"The setting load.max_memory has {size!r} for {name}; write sizes as 20GiB or 900MB.")
    return limits


def _check_parts(source: str, load: LoadSettings, config: PretrainedConfig) -> None:
    """InputError that names the file, if reading one of the files that the weights are loaded with fails by itself."""
    empty_model(config, load)
    stored_generation_config(source, load.revision)
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        with reading(source, path.name), safe_open(path, "pt"):
            pass


def _check_complete(
    source: str, loading: dict[str, Any], model: PreTrainedModel, method: str, warn: Callable[[str], None]
) -> None:
    """InputError if tensors are missing, which transformers would fill with random numbers, or whole layers are left out."""
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    unexpected = sorted(loading["unexpected_keys"])
    if wrong:
        raise InputError(
            f"The model in {source} is incomplete: its weight files lack {named(wrong)}, or store them in another shape than "
            + f"config.json says{f', and hold {named(unexpected)}, which it has no place for' if unexpected else ''}; "
            + "download it again, or check that weights and config belong together"
            + (f" (it is quantized as {method}; --set load.dequantize=true reads it without its kernels)." if method else ".")
        )
    layers = _left_out(unexpected, [name for name, _ in model.named_parameters()])
    if layers:
        raise InputError(
            f"The weights of the model in {source} are of a model with more layers than its config.json describes, because it "
            f"has no place for {named(layers)}; correct the number of layers, or download config.json again."
        )
    odd = [] if method else _without_further_layers(unexpected, model)  # the files of quantized checkpoints hold scales, too
    if odd:
        warn(
            f"The model has no place for {len(odd)} tensors of its weight files ({named(odd)}), which are left "
            "out; check that weights and config belong together."
        )


def _without_further_layers(unexpected: Collection[str], model: PreTrainedModel) -> list[str]:
    """The names outside layers that follow the model's own; these predict further tokens, and exports keep them."""
    own = {_layer_and_rest(name)[0] for name, _ in model.named_parameters()}
    stacks = {_unnumbered(layer) for layer in own if layer}
    layers = ((name, _layer_and_rest(name)[0]) for name in unexpected)
    return [name for name, layer in layers if layer in own or _unnumbered(layer) not in stacks]


def _left_out(unexpected: Collection[str], parameters: Collection[str]) -> list[str]:
    """The tensors of layers that the model doesn't have, but that are like its own.

    A layer that predicts further tokens isn't: it has tensors beside those of a usual layer, and transformers leaves it out.
    """
    own = {_layer_and_rest(name) for name in parameters}
    numbers, rests = {layer for layer, _ in own}, {(_unnumbered(layer), rest) for layer, rest in own}
    alike: dict[str, bool] = {}
    for layer, rest in map(_layer_and_rest, unexpected):
        if layer not in numbers:
            alike[layer] = alike.get(layer, True) and (_unnumbered(layer), rest) in rests
    return [name for name in unexpected if alike.get(_layer_and_rest(name)[0])]


def _layer_and_rest(name: str) -> tuple[str, str]:
    """A tensor's name up to its first number, and from there on with # for numbers; ("", name) if it has no number."""
    found = re.match(r"(.*?\.\d+\.)(.*)", name)
    return (found[1], re.sub(r"\b\d+\b", "#", found[2])) if found else ("", name)


def _unnumbered(layer: str) -> str:
    return layer.rstrip(".0123456789")


def check_not_empty(source: str, model: PreTrainedModel) -> None:
    """InputError if the embedding, or most matrices, hold only zeros, as files do that were never filled."""
    matrices = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.is_floating_point() and not parameter.is_meta
    }
    # Most matrices have something else than zeros in their first row, so that the others needn't be read.
    empty = [name for name, matrix in matrices.items() if not matrix[:1].any() and not matrix.any()]
    embedding = model.get_input_embeddings().weight
    if 2 * len(empty) > len(matrices) or any(matrices[name] is embedding for name in empty):
        raise InputError(
            f"The weights of the model in {source} are empty: {len(empty)} of its {len(matrices)} matrices hold only zeros "
            f"({named(empty)}); download them again."
        )


def _quantization(load: LoadSettings, dtype: torch.dtype) -> dict[str, Any]:
    if load.quantization == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError(f"Quantized loading needs bitsandbytes; run {install_extra('bnb')}.") from error
    if load.quantization == "bnb_8bit":
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": four_bit}


def quiet_bitsandbytes() -> None:
    """Hide its advice on an optional kernel (at import) and on input dtypes (a line per module); its errors still show."""
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
