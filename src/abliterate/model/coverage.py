"""How much of what writes to the residual stream is edited, and what is left out and why: counted, never assumed.

All that writes is what the table's row of the family names, or what the layers' structure proves. Knows no quantities of a
run.
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

# Below this share a run stops unless told otherwise: what is left out would decide its result.
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
        """JSON form."""
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
    """What is edited and what isn't. `untold`: why it can't be told what else writes to the stream, or ""."""

    groups: tuple[ComponentGroup, ...]
    untold: str = ""

    @property
    def share(self) -> float:
        """Edited parameters as a share of all that are known to write to the residual stream."""
        return self.edited_parameters / max(1, sum(group.parameters for group in self.groups))

    @property
    def edited_parameters(self) -> int:
        """Entries of all matrices that are edited."""
        return sum(group.parameters for group in self.groups if not group.left_out)

    @property
    def left_out(self) -> tuple[ComponentGroup, ...]:
        """What isn't edited."""
        return tuple(group for group in self.groups if group.left_out)

    def by_component(self) -> dict[str, dict[str, Any]]:
        """{component: matrices and parameters that are edited, and their share of those that write}."""
        found: dict[str, dict[str, Any]] = {}
        for component in dict.fromkeys(group.component for group in self.groups):
            groups = [group for group in self.groups if group.component == component]
            edited = [group for group in groups if not group.left_out]
            parameters = sum(group.parameters for group in edited)
            share = parameters / max(1, sum(group.parameters for group in groups))
            found[component] = {
                "matrices": sum(group.matrices for group in edited),
                "parameters": parameters,
                "share": share,
            }
        return found

    def to_record(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "share": self.share,
            "edited_parameters": self.edited_parameters,
            "components": self.by_component(),
            "groups": [group.to_record() for group in self.groups],
            "untold": self.untold,
        }


def coverage_of(model: Any, architecture: Architecture, targets: Iterable[Target]) -> Coverage:
    """What of `model` the `targets` found with `architecture` are. A model without weights (meta device) will do for rows."""
    d_model = model.config.get_text_config().hidden_size
    edited = {target.name for target in targets}
    writers = dict(_named(model, architecture))
    untold = ""
    if architecture.found_by == "settings":
        whole, untold = _whole(model)
        if whole is not None:
            writers |= {name: found for name, found in _named(model, whole).items() if name not in writers}
    tallies: dict[tuple[Any, ...], list[tuple[int, int, int]]] = {}
    for name, (target, path) in writers.items():
        shape, matrices, parameters = _size(target.module, d_model)
        why = "" if name in edited else obstacle(target.module) or "not named in load.components"
        tallies.setdefault((target.component, path, shape, why), []).append((target.layer, matrices, parameters))
    groups = []
    for (component, path, shape, why), parts in tallies.items():
        layers, counts, sizes = zip(*parts, strict=True)
        groups.append(ComponentGroup(component, path, len(set(layers)), sum(counts), shape, sum(sizes), why))
    return Coverage(tuple(groups), untold)


def check_coverage(coverage: Coverage, *, allow_partial: bool, warn: Callable[[str], None] | None = None) -> None:
    """Say what is left out; InputError where that is more than half, unless it is allowed."""
    what = "; ".join(f"{group.path} in {group.layers} layers ({group.left_out})" for group in coverage.left_out)
    unsized = [group.path for group in coverage.left_out if not group.parameters]
    if unsized and not allow_partial:
        raise InputError(f"What is left out is of unknown size: {what}; go on all the same with --allow-partial.")
    if coverage.share < ENOUGH and not allow_partial:
        raise InputError(
            f"Only {coverage.share:.0%} of the parameters that write to the residual stream would be edited, without {what}; "
            "go on all the same with --allow-partial, or name more modules with --set load.components."
        )
    if warn is None:
        return
    if coverage.untold:
        warn(f"What the settings don't name is left as it is, and how much that is can't be told: {coverage.untold}.")
    elif what:
        warn(f"{coverage.share:.1%} of the parameters that write to the residual stream are edited, without {what}.")


def _named(model: nn.Module, architecture: Architecture) -> Mapping[str, tuple[Target, str]]:
    return {target.name: (target, path) for target, path in members(model, architecture)}


def _whole(model: Any) -> tuple[Architecture | None, str]:
    """What settings are measured against: the family's row, else its structure; or why there is neither."""
    model_type = model.config.get_text_config().model_type
    row = known_architecture(model_type)
    if row is not None:
        return row, ""
    if any(parameter.is_meta for parameter in model.parameters()):
        return None, f"the family {model_type} isn't in the table, and without weights its structure isn't measured"
    try:
        return discover(model, model_type), ""
    except InputError:
        return None, f"the family {model_type} isn't in the table, and its structure is unclear"


def _size(module: nn.Module, d_model: int) -> tuple[tuple[int, int] | None, int, int]:
    """((d_out, d_in) of a matrix, matrices, parameters); of what can't be edited, what may write by its name."""
    out = out_features(module)
    if out is not None:
        count = n_matrices(module)
        return (out, in_features(module)), count, count * out * in_features(module)
    wide = {name: one for name, one in module.named_parameters() if one.dim() > 1 and d_model in one.shape[-2:]}
    down = {name: one for name, one in wide.items() if any(part in name for part in ("down", "w2", "out", "c_proj"))}
    some = (down or wide).values()
    return None, sum(len(one) if one.dim() == 3 else 1 for one in some), sum(one.numel() for one in some)
