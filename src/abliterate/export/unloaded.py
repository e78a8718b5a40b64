"""Carry over what a model's class doesn't load, so that an export that loads the model as a whole loses nothing.

Such tensors are those of layers that predict further tokens, for which transformers has no modules. They are copied from the
base's files in their stored dtype, or made dense as the rest of a quantized checkpoint is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from abliterate.export.base_weights import stored_dtype, tensor_digest
from abliterate.export.safetensors_copy import INDEX, read_header, shard_files
from abliterate.export.tensor_index import unloaded_tensors
from abliterate.model.checkpoint import empty_model
from abliterate.model.formats import FILES
from abliterate.model.quantized import dense_state, method_of, weight_files
from abliterate.settings.schema import LoadSettings

# The bytes of carried tensors that are in memory, and in one file.
FILE_BYTES = 4 << 30
# Tensors of these dtypes keep them when a quantized checkpoint is made dense.
_PLAIN = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Unloaded:
    """{name: reads the tensor} of what the class doesn't load; `missing` names what can't be carried over, either.

    Tensors of a quantized format whose files only its own package reads can't be made dense without their layers.
    """

    tensors: Mapping[str, Callable[[], Tensor]]
    missing: tuple[str, ...] = ()


def find_unloaded(source: str, load: LoadSettings, config: PretrainedConfig) -> Unloaded:
    """The tensors in the files of `source` that its class doesn't load."""
    model, method = empty_model(config, load), method_of(config)
    headers = {Path(path): read_header(Path(path)) for path in weight_files(source, load)}
    file_of = {name: path for path, header in headers.items() for name in header}
    if not method:
        return Unloaded({name: partial(_read, file_of[name], name) for name in unloaded_tensors(file_of, model)})
    if method not in FILES:
        return Unloaded({}, tuple(_without_leftovers(unloaded_tensors(file_of, model), model)))
    state, dtype = dense_state(source, config, load), stored_dtype(config)
    plain = {name for header in headers.values() for name, stored in header.items() if stored.dtype in _PLAIN}

    def dense(name: str) -> Tensor:
        tensor = state[name][...]
        return tensor.to(dtype) if tensor.is_floating_point() and name not in plain else tensor

    return Unloaded({name: partial(dense, name) for name in _without_leftovers(unloaded_tensors(state, model), model)})


def carry_over(folder: Path, unloaded: Unloaded, *, size: int = FILE_BYTES) -> None:
    """Add the tensors to the weight files of an export, in files of their own of about `size` bytes."""
    old = shard_files(folder)
    written = {name for path in old for name in read_header(path)}
    absent = [name for name in unloaded.tensors if name not in written]
    if not absent:
        return
    new = [_save(folder / f"carried-{number}.safetensors", part) for number, part in enumerate(_parts(absent, unloaded, size))]
    (folder / INDEX).unlink(missing_ok=True)
    files = [*old, *new]
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(files, start=1):
        path = path.rename(folder / f"model-{number:05d}-of-{len(files):05d}.safetensors")
        header = read_header(path)
        weight_map |= dict.fromkeys(header, path.name)
        total += sum(stored.end - stored.start for stored in header.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def lost(folder: Path, unloaded: Unloaded) -> list[str]:
    """The tensors that an export lacks, or has with another shape, dtype or content."""
    file_of = {name: path for path in shard_files(folder) for name in read_header(path)}
    wrong = [
        name
        for name, read in unloaded.tensors.items()
        if name not in file_of or tensor_digest(_read(file_of[name], name)) != tensor_digest(read())
    ]
    return [*unloaded.missing, *wrong]


def dense_config(config: bytes) -> bytes:
    """The content of a config.json without its quantization; otherwise it stays as it is, whatever version wrote it."""
    record = json.loads(config)
    plain = _without_quantization(record)
    return config if plain == record else (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def _without_quantization(record: dict[str, Any]) -> dict[str, Any]:
    """The config and those of its parts, such as `text_config`."""
    return {
        name: _without_quantization(value) if isinstance(value, dict) and name.endswith("config") else value
        for name, value in record.items()
        if name not in ("quantization_config", "compression_config")
    }


def _without_leftovers(names: Iterable[str], model: nn.Module) -> list[str]:
    """The tensors of modules that the model doesn't have; scales and the like of its own modules end with the quantization."""
    modules = dict(model.named_modules())
    return [name for name in names if not _has_parameters(_nearest(name, modules))]


def _nearest(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module of the longest name that begins the tensor's."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return modules[name]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _parts(names: Iterable[str], unloaded: Unloaded, size: int) -> Iterator[dict[str, Tensor]]:
    """The tensors, as many at a time as fill a file."""
    part: dict[str, Tensor] = {}
    for name in names:
        part[name] = unloaded.tensors[name]().contiguous()
        if sum(tensor.nbytes for tensor in part.values()) >= size:
            yield part
            part = {}
    if part:
        yield part


def _save(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]
