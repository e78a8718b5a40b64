"""Which bytes of which files are the matrices to edit: by their own names, and those of fused experts by transformers' names.

Most checkpoints hold an expert's matrix as a tensor of its own, which transformers stacks as it loads them, by rules that it
applies to names. They are asked here, tensor by tensor; whatever they do beside renaming and stacking isn't followed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abliterate.export.shards import Stored, Unfit, check_dtype, check_editable, read_header
from abliterate.model.architectures import Target
from abliterate.model.experts import is_stack, is_transposed
from abliterate.model.weights import stored_weight


@dataclass(frozen=True)
class Place:
    """One matrix: its bytes in a file, and whether it is (d_in, d_out) there; the tensor that it is, or is `in_stack`."""

    path: Path
    tensor: str
    stored: Stored
    transposed: bool
    in_stack: bool = False


def parameter_name(target: Target) -> str:
    """What the model calls the parameter of a target."""
    return f"{target.name}.{'down_proj' if is_stack(target.module) else 'weight'}"


def find_places(
    files: list[Path], model: PreTrainedModel, targets: Iterable[Target], dtype: torch.dtype
) -> dict[str, tuple[Place, ...]]:
    """{target: its matrix, or its experts' in their order}.

    Raises:
        Unfit: some are not in the files, not stored in `dtype`, or not what the model says.
    """
    stacks = [target for target in targets if is_stack(target.module)]
    plain = {parameter_name(target): target for target in targets if not is_stack(target.module)}
    check_editable(files, plain, dtype)
    found: dict[str, tuple[Place, ...]] = {}
    for path in files:
        for tensor, stored in read_header(path).items():
            if tensor in plain:
                module = plain[tensor].module
                _check_shape(tensor, stored, stored_weight(module))
                found[plain[tensor].name] = (Place(path, tensor, stored, isinstance(module, Conv1D)),)
    return found | (_stacked(files, model, stacks, dtype) if stacks else {})


def _stacked(
    files: list[Path], model: PreTrainedModel, targets: Sequence[Target], dtype: torch.dtype
) -> dict[str, tuple[Place, ...]]:
    """{target: its experts}; in the order in which transformers stacks them, which is that of their names."""
    rules, by_parameter = _Rules(model), {parameter_name(target): target for target in targets}
    found: dict[str, list[Place]] = {target.name: [] for target in targets}
    tensors = {tensor: (path, stored) for path in files for tensor, stored in read_header(path).items()}
    for tensor in rules.in_order(tensors):
        parameter, merged = rules.follow(tensor)
        if parameter not in by_parameter:
            continue
        target, (path, stored) = by_parameter[parameter], tensors[tensor]
        check_dtype(tensor, stored, dtype)
        weight, transposed = stored_weight(target.module), is_transposed(target.module)
        if merged:
            _check_shape(tensor, stored, weight[0])
            found[target.name].append(Place(path, tensor, stored, transposed))
        else:
            _check_shape(tensor, stored, weight)
            found[target.name] += [Place(path, tensor, one, transposed, in_stack=True) for one in _slices(stored)]
    for target in targets:
        if len(found[target.name]) != len(stored_weight(target.module)):
            raise Unfit(
                f"the files hold {len(found[target.name])} of the {len(stored_weight(target.module))} experts in {target.name}"
            )
    return {name: tuple(places) for name, places in found.items()}


class _Rules:
    """transformers' own rules for names in a checkpoint of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        try:
            from transformers import core_model_loading as loading
            from transformers.conversion_mapping import get_model_conversion_mapping
        except ImportError as error:
            raise Unfit("this version of transformers doesn't tell how it loads experts") from error
        self._loading, self._model = loading, model
        rules = get_model_conversion_mapping(model)
        self._converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        self._renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        self._parameters = model.state_dict()

    def in_order(self, tensors: Mapping[str, Any]) -> list[str]:
        """As transformers goes through them."""
        return sorted(tensors, key=self._loading.dot_natural_key)

    def follow(self, tensor: str) -> tuple[str, bool]:
        """(the parameter that a tensor is loaded into, whether it is one matrix of the stack there).

        Raises:
            Unfit: it is computed from the tensor, for one of our parameters as far as its name tells.
        """
        prefix = self._model.base_model_prefix
        renamed, pattern = self._loading.rename_source_key(tensor, self._renamings, self._converters, prefix, self._parameters)
        if pattern is None:
            return renamed, False
        rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
        plain = len(rule.source_patterns) == len(rule.target_patterns) == len(rule.operations) == 1
        merges = plain and isinstance(rule.operations[0], self._loading.MergeModulelist) and rule.operations[0].dim == 0
        if not merges and renamed.endswith(".down_proj"):
            raise Unfit(f"transformers converts {tensor} as it loads it")
        return renamed, merges


def _slices(stored: Stored) -> list[Stored]:
    """The matrices of a stack: they lie one after the other."""
    count, *shape = stored.shape
    size = (stored.end - stored.start) // count
    return [
        replace(stored, shape=tuple(shape), start=stored.start + index * size, end=stored.start + (index + 1) * size)
        for index in range(count)
    ]


def _check_shape(tensor: str, stored: Stored, weight: torch.Tensor | nn.Parameter) -> None:
    if stored.shape != tuple(weight.shape):
        raise Unfit(f"{tensor} has the shape {stored.shape}, not {tuple(weight.shape)}")
