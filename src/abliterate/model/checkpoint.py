"""Loads a model's weights, completely and in the requested dtype, quantized or made dense on request.

No other module loads weights; the error sentences for weights that can't be loaded are here.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from abliterate.errors import InputError
from abliterate.model import offload, quantized
from abliterate.model.formats import FILES
from abliterate.model.generation import reduce_generation_config, stored_generation_config
from abliterate.model.memory import free_memory
from abliterate.settings.schema import LoadSettings

# The share of free main memory that weights may take.
_WEIGHTS_SHARE = 0.9


def load_weights(
    source: str, load: LoadSettings, config: PretrainedConfig, dtype: torch.dtype, device: torch.device | None
) -> PreTrainedModel:
    """The model with the weights of `source` in `dtype`, and a reduced generation config. `device` None: as stored, on the CPU.

    Raises:
        InputError: the weights don't exist or are incomplete, or a quantization's package or GPU is missing.
            torch.OutOfMemoryError: they don't fit, as far as that is known beforehand.
    """
    quiet_bitsandbytes()
    quantized.check(config, load, device)
    dense = quantized.is_made_dense(config, load, device)
    if (
        load.quantization == "none"
        and (dense or not quantized.method_of(config))
        and not load.device_map
        and (device is None or device.type == "cpu")
    ):
        _check_memory(config, load, dtype)
    auto = auto_class(config, load)
    kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": load.trust_remote_code}
    if load.revision:
        kwargs["revision"] = load.revision
    if load.attn_implementation:
        kwargs["attn_implementation"] = load.attn_implementation
    if device is not None:
        kwargs["device_map"] = load.device_map or {"": str(device)}
        if load.device_map:
            # Used only for weights that the files store in another layout than the model, above all fused experts.
            kwargs["offload_folder"] = load.offload_folder or offload.temporary_folder()
        if load.max_memory:
            kwargs["max_memory"] = {int(k) if k.isdigit() else k: v for k, v in load.max_memory.items()}
        kwargs |= _quantization(load, dtype)
    elif dense:  # otherwise some packages would choose an accelerator
        kwargs["device_map"] = {"": "cpu"}
    # Mismatched sizes are not ignored: they are reported as missing tensors are, in a sentence instead of a table on stderr.
    kwargs |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    kwargs["generation_config"] = stored_generation_config(source, load.revision)
    try:
        if dense and quantized.method_of(config) in FILES:
            model, loading = _from_files(source, load, config, kwargs)
        else:
            model, loading = auto.from_pretrained(source, **kwargs)
    except (OSError, ValueError, ImportError, KeyError, SyntaxError, SafetensorError) as error:
        raise load_error(source, error) from error
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):  # out of memory and the like
            raise
        raise InputError(
            f"The model in {source} is incomplete: tensors that the loader joins, such as experts, don't fit together; "
            "download it again, or check that weights and config belong together."
        ) from error
    _check_complete(source, loading, quantized.method_of(config))
    if dense and model.is_quantized:
        quantized.make_layers_dense(model, dtype)
    reduce_generation_config(model)
    return model.eval().requires_grad_(False)


def empty_model(config: PretrainedConfig, load: LoadSettings) -> PreTrainedModel:
    """The model without weights (on the meta device), for its modules and their names."""
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config, load).from_config(config, trust_remote_code=load.trust_remote_code)
    return model


def random_model(config: PretrainedConfig, load: LoadSettings) -> PreTrainedModel:
    """The model with random weights in float32, on the CPU. torch.OutOfMemoryError if main memory is too small."""
    _check_memory(config, load, torch.float32)
    model: PreTrainedModel = auto_class(config, load).from_config(config, trust_remote_code=load.trust_remote_code)
    model = model.float().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # scales begin at 1: a channel-wise scaled output would look like a copy
            parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def auto_class(config: PretrainedConfig, load: LoadSettings) -> Any:
    """The auto class that loads the whole model, including a vision part, which an export would lose otherwise."""
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


def load_error(source: str, error: Exception) -> InputError:
    """The error when `source` can't be loaded."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if Path(source).is_dir():
        return InputError(f"The model in {source} can't be loaded: {first}.")
    return InputError(
        f"The model {source} can't be fetched from the Hub: {first}; check the id and the network, or download it "
        "elsewhere and give its local directory."
    )


def _check_complete(source: str, loading: dict[str, Any], method: str) -> None:
    """InputError if tensors are missing: transformers fills them with random numbers and at most warns."""
    wrong = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if wrong:
        named = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise InputError(
            f"The model in {source} is incomplete: its weight files lack {named}, or store them in another shape than "
            "config.json says; download it again, or check that weights and config belong together"
            + (f" (it is quantized as {method}; --set load.dequantize=true reads it without its kernels)." if method else ".")
        )


def _quantization(load: LoadSettings, dtype: torch.dtype) -> dict[str, Any]:
    if load.quantization == "none":
        return {}
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise InputError("Quantized loading needs bitsandbytes; install it with pip install 'abliterate[bnb]'.") from error
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
