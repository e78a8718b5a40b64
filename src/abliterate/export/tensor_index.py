"""Find the bytes of every matrix to edit in the weight files: by the tensor's name, for fused experts by transformers' rules.

Most checkpoints hold the matrix of each expert as a tensor of its own. transformers stacks these tensors as it loads them, by
rules that it applies to names. This module applies the same rules, tensor by tensor; it follows renaming and stacking only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abliterate.export.safetensors_copy import NotStreamable, Stored, check_dtype, read_header
from abliterate.model.architectures import Target
from abliterate.model.experts import is_fused, is_transposed
from abliterate.model.weights import n_matrices, stored_weight


@dataclass(frozen=True)
class TensorLocation:
    """One matrix: its bytes in a file, and whether they are (d_in, d_out).

    `tensor` is the matrix itself, or with `in_stack` the stack of experts that holds it.
    """

    path: Path
    tensor: str
    stored: Stored
    transposed: bool
    in_stack: bool = False


def parameter_name(target: Target) -> str:
    """The model's name for the parameter of a target."""
    return f"{target.name}.{'down_proj' if is_fused(target.module) else 'weight'}"


def unloaded_tensors(tensors: Iterable[str], model: PreTrainedModel) -> list[str]:
    """The tensors that the model's class has no parameter or buffer for, such as those of layers that only predict further
    tokens; transformers drops them without a word. The order is that of the names."""
    rules = _Rules(model, ())
    return [tensor for tensor in rules.in_order(tensors) if rules.rename(tensor)[0] not in rules.parameters]


def find_places(
    files: list[Path], model: PreTrainedModel, targets: Iterable[Target], dtype: torch.dtype
) -> dict[str, tuple[TensorLocation, ...]]:
    """{target: its matrix, or the matrices of its experts in order}.

    Raises:
        NotStreamable: a matrix is missing in the files, isn't stored in `dtype`, or has another shape than in the model.
    """
    by_parameter = {parameter_name(target): target for target in targets}
    tensors = {tensor: (path, stored) for path in files for tensor, stored in read_header(path).items()}
    located: dict[str, list[TensorLocation]] = {target.name: [] for target in by_parameter.values()}
    for tensor, parameter, merged in _loaded_into(tensors, by_parameter, model):
        target, (path, stored) = by_parameter[parameter], tensors[tensor]
        located[target.name] += _places(target, path, tensor, stored, dtype, merged=merged)
    for name, target in by_parameter.items():
        count, expected = len(located[target.name]), n_matrices(target.module)
        if count != expected:
            held = f"{count} of the {expected} experts in" if is_fused(target.module) else "no"
            raise NotStreamable(f"the files hold {held} {target.name if is_fused(target.module) else name}")
    return {name: tuple(places) for name, places in located.items()}


def _loaded_into(
    tensors: Mapping[str, Any], by_parameter: Mapping[str, Target], model: PreTrainedModel
) -> Iterator[tuple[str, str, bool]]:
    """(tensor, the parameter of a target that it is loaded into, whether it is one matrix of the stack there).

    The order is that in which transformers stacks them, which is the order of their names. Its rules aren't needed if every
    parameter is a tensor of the same name.
    """
    if by_parameter.keys() <= tensors.keys() and not any(is_fused(target.module) for target in by_parameter.values()):
        yield from ((name, name, False) for name in by_parameter)
        return
    rules = _Rules(model, by_parameter)
    for tensor in rules.in_order(tensors):
        has_name = tensor in by_parameter and not is_fused(by_parameter[tensor].module)
        parameter, merged = (tensor, False) if has_name else rules.follow(tensor)
        if parameter in by_parameter:
            yield tensor, parameter, merged


def _places(
    target: Target, path: Path, tensor: str, stored: Stored, dtype: torch.dtype, *, merged: bool
) -> Iterator[TensorLocation]:
    """The matrices of a target that a tensor holds: one matrix, or all matrices of a stack."""
    weight = stored_weight(target.module)
    if not is_fused(target.module):
        check_dtype(tensor, stored, dtype, 2)
        _check_shape(tensor, stored, weight)
        yield TensorLocation(path, tensor, stored, isinstance(target.module, Conv1D))
        return
    check_dtype(tensor, stored, dtype)
    transposed = is_transposed(target.module)
    _check_shape(tensor, stored, weight[0] if merged else weight)
    if merged:
        yield TensorLocation(path, tensor, stored, transposed)
    else:
        yield from (TensorLocation(path, tensor, expert, transposed, in_stack=True) for expert in _slices(stored))


class _Rules:
    """transformers' own rules for the names in a checkpoint of a model."""

    def __init__(self, model: PreTrainedModel, parameters: Collection[str]) -> None:
        self._edited = parameters
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError as error:
            raise NotStreamable("this version of transformers has no list of its loading rules") from error
        self._loading, self._model = loading, model
        rules = get_model_conversion_mapping(model)
        self._converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        self._renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        self.parameters = model.state_dict()

    def in_order(self, tensors: Iterable[str]) -> list[str]:
        """The tensors in the order in which transformers loads them."""
        return sorted(tensors, key=self._loading.dot_natural_key)

    def rename(self, tensor: str) -> tuple[str, str | None]:
        """(the parameter that a tensor is loaded into, the pattern of the converter that it passes through, if any)."""
        prefix = self._model.base_model_prefix
        return self._loading.rename_source_key(tensor, self._renamings, self._converters, prefix, self.parameters)  # type: ignore[no-any-return]

    def follow(self, tensor: str) -> tuple[str, bool]:
        """(the parameter that a tensor is loaded into, whether it is one matrix of the stack there).

        Raises:
            NotStreamable: the parameter is computed from the tensor, and by its name it is one of those to edit.
        """
        renamed, pattern = self.rename(tensor)
        if pattern is None:
            return renamed, False
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        plain = len(rule.source_patterns) == len(rule.target_patterns) == len(rule.operations) == 1
        merges = plain and isinstance(rule.operations[0], self._loading.MergeModulelist) and rule.operations[0].dim == 0
        if not merges and (renamed in self._edited or renamed.endswith(".down_proj")):
            raise NotStreamable(f"transformers converts {tensor} as it loads it")
        return renamed, merges


def _slices(stored: Stored) -> list[Stored]:
    """The matrices of a stack, which lie one after the other."""
    count, *shape = stored.shape
    size = (stored.end - stored.start) // count
    return [
        replace(stored, shape=tuple(shape), start=stored.start + index * size, end=stored.start + (index + 1) * size)
        for index in range(count)
    ]


def _check_shape(tensor: str, stored: Stored, weight: torch.Tensor | nn.Parameter) -> None:
    if stored.shape != tuple(weight.shape):
        raise NotStreamable(f"{tensor} has the shape {stored.shape}, not {tuple(weight.shape)}")
