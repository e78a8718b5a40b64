"""The weight files of a model on this disk, fetched from the Hub where they aren't, and its matrices one at a time.

Knows no edits and no trials.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from abliterate.export.safetensors_copy import INDEX, SINGLE, NotStreamable, read_header, read_matrix, shard_files, shards_of
from abliterate.export.tensor_index import TensorLocation, find_places, parameter_name
from abliterate.model.architectures import Architecture, Target, find_targets
from abliterate.model.checkpoint import dense_load, empty_model, load_error, load_weights
from abliterate.model.experts import fused_weight, is_fused
from abliterate.model.hub import skip_retries_without_network
from abliterate.model.loader import load_config
from abliterate.model.quantized import method_of
from abliterate.model.weights import dense_weight, in_features, n_matrices, out_features
from abliterate.settings.schema import LoadSettings


class Matrices:
    """W (d_out, d_in) of each target of `source`, in its stored dtype: never quantized, and read anew each time.

    Fused experts have several, whichever way the files hold them. Of a checkpoint that is itself quantized (`dequantized`
    says how), W is what that is made dense, in the dtype that its config says.

    They are read from the weight files, so that one is in memory at a time; where `reason` says that the files can't be
    read so, the model is loaded as a whole on the CPU and stays while this object does.

    Raises:
        InputError: there is no such model, or it can't be loaded.
    """

    def __init__(self, source: str, load: LoadSettings, architecture: Architecture) -> None:
        self.load = load = dense_load(load)
        self.architecture = architecture
        self.config = load_config(source, load)
        self.dequantized = method_of(self.config)
        self.dtype = stored_dtype(self.config)
        self.whole: PreTrainedModel | None = None
        self.reason = ""
        self._kept: dict[str, Tensor] = {}
        self.digests: dict[str, str] = {}
        model = empty_model(self.config, load)
        self.targets = targets_by_name(model, architecture)
        self.places: Mapping[str, tuple[TensorLocation, ...]] = {}
        try:
            if self.dequantized:
                raise NotStreamable(f"its weights are quantized ({self.dequantized})")
            self.files = shard_files(checkpoint_folder(source, load))
            self.places = find_places(self.files, model, self.targets.values(), self.dtype)
        except NotStreamable as reason:
            self.files, self.reason = [], str(reason)
            self.whole = load_weights(source, load, self.config, self.dtype, None)
            self.targets = targets_by_name(self.whole, architecture)

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of a target's matrices."""
        module = self.targets[name].module
        return out_features(module) or 0, in_features(module)

    def of(self, target: Target) -> Tensor:
        """W of one target, on the CPU; of fused experts all of them, (E, d_out, d_in)."""
        if target.name in self._kept:
            return self._kept[target.name]
        if self.whole is not None:
            return dense_weight(self.targets[target.name].module)
        if not is_fused(target.module):
            return self.matrix(target, 0)
        stack = torch.empty(fused_weight(target.module).shape, dtype=self.dtype)
        for index, one in enumerate(stack):
            one.copy_(self.matrix(target, index))
        return stack

    def count(self, target: Target) -> int:
        """How many matrices a target has."""
        return n_matrices(self.targets[target.name].module)

    def matrix(self, target: Target, index: int) -> Tensor:
        """One matrix (d_out, d_in) of a target."""
        if not self.places:
            weight = self.of(target)
            return weight[index] if weight.ndim == 3 else weight
        place = self.places[target.name][index]
        stored = read_matrix(place.path, place.stored)
        return stored.T if place.transposed else stored

    def tensors(self, names: Iterable[str]) -> set[str]:
        """What the files call these targets' tensors, or the model where it is loaded as a whole."""
        if self.whole is not None:
            return {parameter_name(self.targets[name]) for name in names}
        return {place.tensor for name in names for place in self.places[name]}

    def let_go(self) -> None:
        """Of a model that was loaded as a whole keep only its matrices, and `digests` of all tensors: another one may come."""
        assert self.whole is not None
        self.digests = digests(self.whole)
        self._kept = {name: dense_weight(target.module).clone() for name, target in self.targets.items()}
        self.whole = None
        self.targets = targets_by_name(empty_model(self.config, self.load), self.architecture)
        gc.collect()

    def release(self) -> None:
        """Give back what is in memory; nothing can be read after that."""
        self.whole, self.targets, self.places = None, {}, {}
        gc.collect()


def whole_because(source: str, load: LoadSettings, architecture: Architecture) -> str | None:
    """Why an export would load the model as a whole; "" where it can be streamed, None where the files aren't on this disk."""
    if not source or not Path(source).is_dir() or not any(Path(source).glob("*.safetensors")):
        return None
    config = load_config(source, load)
    model = empty_model(config, load)
    try:
        find_places(shard_files(Path(source)), model, targets_by_name(model, architecture).values(), stored_dtype(config))
    except NotStreamable as reason:
        return str(reason)
    return ""


def stored_dtype(config: object) -> torch.dtype:
    """The dtype the checkpoint was saved in, as its config says; float32 where it doesn't."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)  # type: ignore[attr-defined]
    return stored if isinstance(stored, torch.dtype) else torch.float32


def digests(model: PreTrainedModel) -> dict[str, str]:
    """{tensor: a hash of its shape, dtype and bytes}."""
    found = {}
    for name, tensor in model.state_dict().items():
        total = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        found[name] = total.hexdigest()
    return found


def targets_by_name(model: PreTrainedModel, architecture: Architecture) -> dict[str, Target]:
    """Every module to edit, by name."""
    d_model = model.config.get_text_config().hidden_size
    return {target.name: target for target in find_targets(model, architecture, d_model)}


def damage_of(source: str) -> str:
    """What is wrong with the weight files of a directory, as far as their headers tell; empty where nothing is."""
    folder = Path(source)
    if not folder.is_dir() or not any(folder.glob("*.safetensors*")):
        return ""
    try:
        for path in shard_files(folder):
            read_header(path)
    except (NotStreamable, OSError) as reason:
        return str(reason)
    return ""


def checkpoint_folder(source: str, load: LoadSettings) -> Path:
    """The directory with the model's files: given, or the Hub's snapshot, with whatever of it wasn't on this disk yet.

    Raises:
        Unfit: no safetensors weights. InputError: a file can't be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    skip_retries_without_network()
    config = fetched(source, load, "config.json")
    assert config is not None
    if fetched(source, load, SINGLE, optional=True) is None:
        index = fetched(source, load, INDEX, optional=True)
        if index is None:
            raise NotStreamable(f"there is neither {SINGLE} nor {INDEX}")
        for name in shards_of(index):
            fetched(source, load, name)
    return config.parent


def fetched(source: str, load: LoadSettings, name: str, *, optional: bool = False) -> Path | None:
    """A file of a Hub model on this disk, fetched if it wasn't there; None where an optional one can't be had."""
    options = {"revision": load.revision} if load.revision else {}
    # Optional ones neither when they don't exist nor when only the network could say so.
    absent = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), not optional)
    try:
        found = cached_file(source, name, **options, **absent)
    except OSError as error:
        raise load_error(source, error) from error
    return Path(found) if found is not None else None
