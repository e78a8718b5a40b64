"""Find the weight files of a model, fetching missing ones from the Hub, and read its matrices one at a time."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from abliterate.export.safetensors_copy import INDEX, SINGLE, NotStreamable, read_header, read_matrix, shard_files, shards_of
from abliterate.export.tensor_index import TensorLocation, find_places, parameter_name
from abliterate.model.architectures import Architecture, Target, find_targets
from abliterate.model.checkpoint import dense_load, empty_model, load_weights
from abliterate.model.experts import fused_weight, is_fused
from abliterate.model.hub import skip_retries_without_network
from abliterate.model.loader import load_config
from abliterate.model.model_files import load_error
from abliterate.model.quantized import method_of
from abliterate.model.weights import dense_weight, in_features, n_matrices, out_features
from abliterate.settings.schema import LoadSettings


class Matrices:
    """W (d_out, d_in) of each target of `source`, in its stored dtype: never quantized, and read anew each time.

    Fused experts have several matrices, however the files hold them. If the checkpoint itself is quantized (by the method
    `dequantized`), W is the dequantized weight in the dtype that the config names.

    Matrices are read from the weight files, so that one is in memory at a time. If the files can't be read so, for the reason
    in `reason`, the model is loaded as a whole on the CPU and stays as long as this object.

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
        """W of one target, on the CPU; for fused experts all matrices, (E, d_out, d_in)."""
        if target.name in self._kept:
            return self._kept[target.name]
        if self.whole is not None:
            return dense_weight(self.targets[target.name].module)
        if not is_fused(target.module):
            return self.matrix(target, 0)
        experts = torch.empty(fused_weight(target.module).shape, dtype=self.dtype)
        for index, expert in enumerate(experts):
            expert.copy_(self.matrix(target, index))
        return experts

    def count(self, target: Target) -> int:
        """The number of matrices of a target."""
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
        """The names of these targets' tensors in the files, or in the model if it is loaded as a whole."""
        if self.whole is not None:
            return {parameter_name(self.targets[name]) for name in names}
        return {place.tensor for name in names for place in self.places[name]}

    def let_go(self) -> None:
        """Free a model that was loaded as a whole, so that another can be loaded; its matrices and `digests` are kept."""
        assert self.whole is not None
        self.digests = digests(self.whole)
        self._kept = {name: dense_weight(target.module).clone() for name, target in self.targets.items()}
        self.whole = None
        self.targets = targets_by_name(empty_model(self.config, self.load), self.architecture)
        gc.collect()

    def release(self) -> None:
        """Free the memory; nothing can be read after that."""
        self.whole, self.targets, self.places = None, {}, {}
        gc.collect()


def whole_because(source: str, load: LoadSettings, architecture: Architecture) -> str | None:
    """Why an export would load the model as a whole; "" if it can be streamed, None if the files aren't on this disk."""
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
    """The dtype that the checkpoint was saved in, from its config; float32 if the config has none."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)  # type: ignore[attr-defined]
    return stored if isinstance(stored, torch.dtype) else torch.float32


def digests(model: PreTrainedModel) -> dict[str, str]:
    """{tensor: its `tensor_digest`}."""
    return {name: tensor_digest(tensor) for name, tensor in model.state_dict().items()}


def tensor_digest(tensor: Tensor) -> str:
    """A hash of a tensor's shape, dtype and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def targets_by_name(model: PreTrainedModel, architecture: Architecture) -> dict[str, Target]:
    """Every module to edit, by name."""
    d_model = model.config.get_text_config().hidden_size
    return {target.name: target for target in find_targets(model, architecture, d_model)}


def damage_of(source: str) -> str:
    """The damage that the headers of a directory's weight files show; "" if there is none."""
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
    """The directory with the model's files: `source` itself, or the Hub's snapshot, whose missing files are fetched.

    Raises:
        NotStreamable: there are no safetensors weights. InputError: a file can't be fetched.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    skip_retries_without_network()
    config = config_file(source, load)
    if fetched(source, load, SINGLE, optional=True) is None:
        index = fetched(source, load, INDEX, optional=True)
        if index is None:
            raise NotStreamable(f"there is neither {SINGLE} nor {INDEX}")
        for name in shards_of(index):
            fetched(source, load, name)
    return config.parent


def config_file(source: str, load: LoadSettings) -> Path:
    """The path of a model's config.json, which is fetched if it is missing."""
    path = Path(source) / "config.json" if Path(source).is_dir() else fetched(source, load, "config.json")
    assert path is not None, "fetching a file that isn't optional raises"
    return path


def fetched(source: str, load: LoadSettings, name: str, *, optional: bool = False) -> Path | None:
    """The path of a file of a Hub model, which is fetched if it is missing; None if an optional file can't be fetched."""
    options = {"revision": load.revision} if load.revision else {}
    # An optional file raises neither if it doesn't exist nor if only the network could tell.
    strict = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), not optional)
    try:
        path = cached_file(source, name, **options, **strict)
    except OSError as error:
        raise load_error(source, error) from error
    return Path(path) if path is not None else None


def listed_files(source: str, load: LoadSettings) -> list[str] | None:
    """The names of all files of a Hub model at the revision of the settings; None if the Hub can't tell now."""
    skip_retries_without_network()
    try:
        return list(HfApi().list_repo_files(source, revision=load.revision or None))
    # The Hub's library raises its own errors and those of its HTTP library; all mean that there is no answer.
    except Exception:
        return None
