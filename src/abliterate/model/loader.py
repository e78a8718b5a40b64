"""Loads a model and its tokenizer from the Hub, a directory, or the package's demo.

It chooses the dtype, finds the modules to edit and takes the model's fingerprint; `checkpoint.py` loads the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from abliterate import ranks
from abliterate.errors import AbliterateError, InputError, first_line
from abliterate.files import expanded
from abliterate.model import architectures, model_files, quantized
from abliterate.model.architectures import Architecture, Target
from abliterate.model.checkpoint import check_not_empty, empty_model, load_weights, max_memory, random_model
from abliterate.model.generation import limited_config
from abliterate.model.hub import skip_retries_without_network
from abliterate.model.memory import clear_device_cache
from abliterate.model.model_config import d_model_of, read_config
from abliterate.model.model_files import CONFIG, reading
from abliterate.model.names import DEMO, check_model_name, demo_path
from abliterate.model.offload import home_of
from abliterate.model.structure import discover
from abliterate.model.tensor_parallel import check_targets
from abliterate.settings.schema import LoadSettings
from abliterate.types import ModelInfo

# Endings of the files that determine a local model's results; .py for code loaded with trust_remote_code.
_CONTENT_ENDINGS = (".safetensors", ".bin", ".pt", ".gguf", "config.json", ".index.json", ".py")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for work, in evaluation mode, with gradients off and the modules to edit found."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    architecture: Architecture
    targets: tuple[Target, ...]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return architectures.decoder_layers(self.model, self.architecture)

    @property
    def device(self) -> torch.device:
        """The device for inputs (with a device map, the embedding's device)."""
        embeddings: Any = self.model.get_input_embeddings()
        return home_of(embeddings, embeddings.weight)


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, as its config describes it. `info` has no fingerprint."""

    model: PreTrainedModel
    info: ModelInfo
    architecture: Architecture
    targets: tuple[Target, ...]


def resolve_source(model: str) -> str:
    """The argument of `from_pretrained` for MODEL: `demo`, a local directory, or a Hub id.

    Raises:
        InputError: no model is named, or the path doesn't exist or holds no model.
    """
    check_model_name(model)
    if model == DEMO:
        return str(demo_path() / "model")
    path = expanded(model)
    if not path.is_dir():
        return model
    model_files.check_folder(path, model)
    return str(path)


def load_model(
    name: str, load: LoadSettings, device: torch.device, probe_inputs: Callable[..., Any], warn: Callable[[str], None]
) -> LoadedModel:
    """Load the model, trying `load.dtypes` in turn until one generates a token with finite logits.

    `probe_inputs(tokenizer, device)` returns the inputs of that test generation.
    """
    source = resolve_source(name)
    config, tokenizer, model, dtype = open_model(source, load, device, probe_inputs, warn)
    architecture = architecture_of(model, load)
    info = ModelInfo(
        id=public_name(name),
        source=source,
        revision=_revision(source, config, load.revision),
        fingerprint=ranks.agree(lambda: fingerprint(source, config, load.revision)),
        family=architecture.family,
        n_layers=len(architectures.decoder_layers(model, architecture)),
        d_model=d_model_of(source, config),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        quantization=quantized.label(model, config, load),
    )
    targets = architectures.find_targets(model, architecture, info.d_model)
    check_targets(targets)
    return LoadedModel(model, tokenizer, info, architecture, targets)


def open_model(
    source: str, load: LoadSettings, device: torch.device, probe_inputs: Callable[..., Any], warn: Callable[[str], None]
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, PreTrainedModel, torch.dtype]:
    """Load any model that generates, as `load_model` does, but without modules to edit and without hashes of files."""
    config = load_config(source, load)
    if getattr(config, "_commit_hash", None):
        load = load.model_copy(update={"revision": config._commit_hash})
    tokenizer = load_tokenizer(source, load)
    model_files.check_vocabulary(source, tokenizer, config)
    model, dtype = _first_that_generates(source, load, config, device, probe_inputs(tokenizer, device), warn)
    return config, tokenizer, model, dtype


def skeleton(
    name: str, load: LoadSettings, device: torch.device, *, measure: bool = False, weights: bool = False
) -> Skeleton | None:
    """The model that a config describes, without reading weights; None for a family that isn't in the table.

    `measure`: for such a family, examine its layers with random weights, which shows the same structure, if memory suffices.
    `weights`: the weights will be loaded later, so it is an error if there are none, or none that can be loaded so.

    Raises:
        InputError: there is no such model, or it can't be edited. torch.OutOfMemoryError: memory is too small to measure.
    """
    source = resolve_source(name)
    config = load_config(source, load)
    if weights:
        model_files.check_weight_files(source, config)
        max_memory(load)
    model_type, d_model = config.get_text_config().model_type, d_model_of(source, config)
    model = empty_model(config, load)
    architecture = known_architecture(config, load)
    if architecture is None:
        _check_asked(model_type, "structure", load)  # what weights would show can't change it
        if not measure:
            return None
    architecture = architecture or discover(random_model(config, load), model_type)
    architecture = _as_asked(model, architecture, load)
    info = ModelInfo(
        id=public_name(name),
        source=source,
        revision=_revision(source, config, load.revision),
        fingerprint="",
        family=architecture.family,
        n_layers=len(architectures.decoder_layers(model, architecture)),
        d_model=d_model,
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(_dtype(load.dtypes[0], config, device)).removeprefix("torch."),
        device=str(device),
        quantization=quantized.expected_label(config, load, device),
    )
    return Skeleton(model, info, architecture, architectures.find_targets(model, architecture, info.d_model))


def _revision(source: str, config: PretrainedConfig, asked: str) -> str:
    """The commit of a Hub model, or the revision that was asked for; a local directory has neither."""
    return model_files.commit_of(source, config, asked) or ("" if Path(source).is_dir() else asked)


def architecture_of(model: PreTrainedModel, load: LoadSettings) -> Architecture:
    """The architecture by the settings, the table, or else the structure of the model's layers.

    Raises:
        InputError: the structure is unclear.
    """
    known = known_architecture(model.config, load)
    return _as_asked(model, known or discover(model, model.config.get_text_config().model_type), load)


def known_architecture(config: PretrainedConfig, load: LoadSettings) -> Architecture | None:
    """What the settings or the table say of a model; None if neither knows it.

    The table has the names of modules in the classes of `transformers`. A model that comes with code of its own may have others
    (a mixture of experts in `block_sparse_moe`, where the row has `mlp`), and those that aren't found would be left unedited.
    """
    found = architectures.known_architecture(config.get_text_config().model_type, load.decoder_layers, load.components)
    if found is None or found.found_by != "table" or not runs_own_code(config, load):
        return found
    asked = next((name for name in ("readers", "separate_kinds", "decoder_layers") if getattr(load, name)), "")
    if asked:
        raise InputError(
            f"The setting load.{asked} needs the module names of {found.family} in transformers, and this model's own code may "
            "have others; leave it out, or trust_remote_code, or name modules by load.components and load.decoder_layers."
        )
    return None


def runs_own_code(config: PretrainedConfig, load: LoadSettings) -> bool:
    """Whether the model's class is one of its own repository, which `load.trust_remote_code` lets run."""
    return load.trust_remote_code and any(name.startswith("AutoModel") for name in getattr(config, "auto_map", None) or {})


def _as_asked(model: PreTrainedModel, architecture: Architecture, load: LoadSettings) -> Architecture:
    """The architecture with the further components that the settings ask for. InputError: they aren't known of it."""
    _check_asked(model.config.get_text_config().model_type, architecture.found_by, load)
    if load.separate_kinds:
        architecture = architectures.separated(model, architecture)
    return architectures.with_readers(architecture) if load.readers else architecture


def _check_asked(model_type: str, found_by: str, load: LoadSettings) -> None:
    architectures.check_asked(model_type, found_by, separate_kinds=load.separate_kinds, readers=load.readers)


def _first_that_generates(
    source: str,
    load: LoadSettings,
    config: PretrainedConfig,
    device: torch.device,
    probe: Any,
    warn: Callable[[str], None],
) -> tuple[PreTrainedModel, torch.dtype]:
    reason = ""
    for dtype in dict.fromkeys(_dtype(label, config, device) for label in load.dtypes):
        model = None
        try:
            model = load_weights(source, load, config, dtype, device, warn)
            with reading(source, f"{CONFIG} or generation_config.json (at the first token)", but=(RuntimeError, ImportError)):
                reason = "" if _generates(model, probe) else "its logits are not finite"
        except ImportError as error:
            raise _without_kernels(config, error) from error
        except RuntimeError as error:  # also out of memory; an InputError, for wrong input, isn't caught
            if ranks.size() > 1:  # another dtype would be tried by this rank alone
                raise
            reason = first_line(error)
        if model is not None and not reason:
            check_not_empty(source, model)
            return model, dtype
        # Outside the `except` block: inside it, the traceback keeps the model alive.
        del model
        clear_device_cache(device)
        warn(f"The model doesn't work in {str(dtype).removeprefix('torch.')} ({reason}); the next dtype is tried.")
    raise AbliterateError(
        f"The model works in none of {', '.join(load.dtypes)} ({reason}); try --dtype float32, --device cpu, or "
        "--set load.quantization=bnb_4bit where memory is short, or check its weights and config."
    )


def _without_kernels(config: PretrainedConfig, error: ImportError) -> InputError:
    """The error for missing kernels of a quantization, which are imported in the first pass."""
    return InputError(
        f"The model loads but doesn't run ({quantized.method_of(config) or 'not quantized'}: {first_line(error)}); "
        "install the missing package (for FP8 pip install kernels), or load its weights dense with --set load.dequantize=true."
    )


def load_config(source: str, load: LoadSettings) -> PretrainedConfig:
    """The model's config; InputError if there is none, or a field of it is wrong."""
    if not Path(source).is_dir():
        skip_retries_without_network()
        model_files.check_hub_adapter(source, load.revision)
    config = read_config(source, load)
    if not Path(source).is_dir():  # kept, so that everything else comes from the same commit, whatever is pushed meanwhile
        config._commit_hash = model_files.commit_of(source, config, load.revision) or None
    for part in (config, config.get_text_config()):
        # Configs that were saved for tracing ask for outputs as tuples, which nothing here reads.
        part.return_dict, part.torchscript = True, False
    return config


def load_tokenizer(source: str, load: LoadSettings) -> PreTrainedTokenizerBase:
    """The tokenizer with left padding, a pad token, and the chat template of the settings if they name one."""
    if not Path(source).is_dir():
        skip_retries_without_network()
    with reading(source, "the tokenizer's files"):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=load.trust_remote_code, **({"revision": load.revision} if load.revision else {})
        )
    model_files.check_tokenizer(source, tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if load.chat_template:
        try:
            tokenizer.chat_template = expanded(load.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The chat template {load.chat_template} can't be read: {error}.") from error
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(source, load)
    return tokenizer


def _processor_template(source: str, load: LoadSettings) -> str | None:
    """The chat template of an older vision-language model, whose file only the processor reads."""
    try:
        path = cached_file(source, "chat_template.json", revision=load.revision or None)
        content = json.loads(Path(path or "").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    template = content.get("chat_template") if isinstance(content, dict) else None
    return template if isinstance(template, str) else None


def fingerprint(source: str, config: PretrainedConfig, revision: str = "") -> str:
    """The Hub commit, or for a local directory a hash of every weight, config and code file."""
    folder = Path(source)
    if not folder.is_dir():
        return f"hub:{source}@{model_files.commit_of(source, config, revision)}"
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(_CONTENT_ENDINGS) and path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def public_name(name: str) -> str:
    """The model's name for results: only the last part of a local path, so that no private path is published."""
    return expanded(name).resolve().name if name != DEMO and expanded(name).is_dir() else name


def _dtype(label: str, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if label != "auto":
        return getattr(torch, label)
    # On most CPUs half precision is slower than float32, and its results depend on the batch size.
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


@torch.no_grad()
def _generates(model: Any, probe: Any) -> bool:
    config = limited_config(model, 1)
    config.update(do_sample=False, output_logits=True, return_dict_in_generate=True)
    output = model.generate(**probe, generation_config=config)
    return bool(torch.isfinite(output.logits[0]).all())
