"""Counts how many of the parameters that write to the residual stream are edited, and which are left out and why.

The modules that write are those in the family's row of the table, or those that the structure of the layers proves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from abliterate.errors import InputError
from abliterate.model.architectures import Architecture, Target, known_architecture, members, obstacle
from abliterate.model.structure import discover
from abliterate.model.weights import in_features, n_matrices, out_features

# Below this share a run needs --allow-partial: the modules that are left out would decide its result.
ENOUGH = 0.5


@dataclass(frozen=True)
class ComponentGroup:
    """Modules of one path and shape: `matrices` (d_out, d_in) in `layers` layers. `left_out`: why they aren't edited, or ""."""

    component: str
    path: str
    layers: int
    matrices: int
    shape: tuple[int, int] | None
    parameters: int
    left_out: str

    def to_record(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "component": self.component,
            "path": self.path,
            "layers": self.layers,
            "matrices": self.matrices,
            "shape": None if self.shape is None else list(self.shape),
            "parameters": self.parameters,
            "edited": not self.left_out,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Coverage:
    """The modules that are edited or left out. `untold`: why other modules that write can't be counted, or ""."""

    groups: tuple[ComponentGroup, ...]
    untold: str = ""

    @property
    def share(self) -> float:
        """Edited parameters as a share of all parameters that are known to write to the residual stream."""
        return self.edited_parameters / max(1, sum(group.parameters for group in self.groups))

    @property
    def edited_parameters(self) -> int:
        """Number of entries of all edited matrices."""
        return sum(group.parameters for group in self.groups if not group.left_out)

    @property
    def left_out(self) -> tuple[ComponentGroup, ...]:
        """The groups that aren't edited."""
        return tuple(group for group in self.groups if group.left_out)

    def by_component(self) -> dict[str, dict[str, Any]]:
        """{component: edited matrices, edited parameters, and their share of the parameters that write}."""
        components: dict[str, dict[str, Any]] = {}
        for component in dict.fromkeys(group.component for group in self.groups):
            groups = [group for group in self.groups if group.component == component]
            edited = [group for group in groups if not group.left_out]
            parameters = sum(group.parameters for group in edited)
            share = parameters / max(1, sum(group.parameters for group in groups))
            components[component] = {
                "matrices": sum(group.matrices for group in edited),
                "parameters": parameters,
                "share": share,
            }
        return components

    def to_record(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "share": self.share,
            "edited_parameters": self.edited_parameters,
            "components": self.by_component(),
            "groups": [group.to_record() for group in self.groups],
            "untold": self.untold,
        }


def coverage_of(model: Any, architecture: Architecture, targets: Iterable[Target]) -> Coverage:
    """The coverage of `model` by `targets`. For families in the table, a model without weights (meta device) suffices."""
    d_model = model.config.get_text_config().hidden_size
    edited = {target.name for target in targets}
    writers = dict(_named(model, architecture))
    untold = ""
    if architecture.found_by == "settings":
        whole, untold = _whole(model)
        if whole is not None:
            writers |= {name: member for name, member in _named(model, whole).items() if name not in writers}
    tallies: dict[tuple[Any, ...], list[tuple[int, int, int]]] = {}
    for name, (target, path) in writers.items():
        shape, matrices, parameters = _size(target.module, d_model)
        reason = "" if name in edited else obstacle(target.module) or "not named in load.components"
        tallies.setdefault((target.component, path, shape, reason), []).append((target.layer, matrices, parameters))
    groups = []
    for (component, path, shape, reason), modules in tallies.items():
        layers, counts, sizes = zip(*modules, strict=True)
        groups.append(ComponentGroup(component, path, len(set(layers)), sum(counts), shape, sum(sizes), reason))
    return Coverage(tuple(groups), untold)


def check_coverage(coverage: Coverage, *, allow_partial: bool, warn: Callable[[str], None] | None = None) -> None:
    """Warn of modules that are left out; InputError if they are more than half of the parameters, unless `allow_partial`."""
    left_out = "; ".join(f"{group.path} in {group.layers} layers ({group.left_out})" for group in coverage.left_out)
    unsized = [group.path for group in coverage.left_out if not group.parameters]
    if unsized and not allow_partial:
        raise InputError(f"Modules of unknown size are left out: {left_out}; run all the same with --allow-partial.")
    if coverage.share < ENOUGH and not allow_partial:
        raise InputError(
            f"Only {coverage.share:.0%} of the parameters that write to the residual stream would be edited, without "
            f"{left_out}; run all the same with --allow-partial, or name more modules with --set load.components."
        )
    if warn is None:
        return
    if coverage.untold:
        warn(f"Only the modules that the settings name are edited; the size of the rest is unknown: {coverage.untold}.")
    elif left_out:
        warn(f"{coverage.share:.1%} of the parameters that write to the residual stream are edited, without {left_out}.")


def _named(model: nn.Module, architecture: Architecture) -> Mapping[str, tuple[Target, str]]:
    return {target.name: (target, path) for target, path in members(model, architecture) if not target.reads}


def _whole(model: Any) -> tuple[Architecture | None, str]:
    """The architecture to compare settings with, the family's row or else its structure; or why there is neither."""
    model_type = model.config.get_text_config().model_type
    row = known_architecture(model_type)
    if row is not None:
        return row, ""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None, f"the family {model_type} isn't in the table, and its structure can't be measured without weights"
    try:
        return discover(model, model_type), ""
    except InputError:
        return None, f"the family {model_type} isn't in the table, and its structure is unclear"


def _size(module: nn.Module, d_model: int) -> tuple[tuple[int, int] | None, int, int]:
    """((d_out, d_in), matrices, parameters); if the module can't be edited, counts of parameters that write by their names."""
    out = out_features(module)
    if out is not None:
        count = n_matrices(module)
        return (out, in_features(module)), count, count * out * in_features(module)
    wide = {name: weight for name, weight in module.named_parameters() if weight.dim() > 1 and d_model in weight.shape[-2:]}
    down = {name: weight for name, weight in wide.items() if any(word in name for word in ("down", "w2", "out", "c_proj"))}
    writing = (down or wide).values()
    matrices = sum(len(weight) if weight.dim() == 3 else 1 for weight in writing)
    return None, matrices, sum(weight.numel() for weight in writing)
