"""Edit methods: how a matrix is changed along a direction.

A new method is a file beside these and a line in `METHODS`, or a plugin's `edits`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from abliterate.directions.base import Blend
from abliterate.edits.arbitrary_rank import ArbitraryRank, problem_bytes
from abliterate.edits.base import (
    EditMethod,
    Factors,
    Prepared,
    blended,
    is_learned,
    needs_answers,
    needs_inputs,
    one_direction_only,
    prepare,
)
from abliterate.edits.columns import ColumnPreserving
from abliterate.edits.full import NormPreserving
from abliterate.edits.key_conditional import KeyConditional
from abliterate.edits.least_squares import LeastSquares
from abliterate.edits.none import PlainAblation
from abliterate.edits.pre import PreNormalized
from abliterate.edits.svd import SvdMemo, seed_of, svd_key, truncated_svd
from abliterate.errors import InputError
from abliterate.plugins import Registry
from abliterate.types import Range

AUTO = "auto"  # no method: a run's choice by the model (pipeline/preflight.py)
_BUILT_IN = (
    *(NormPreserving(), PreNormalized(), PlainAblation(), ColumnPreserving()),
    *(KeyConditional(), LeastSquares(), ArbitraryRank()),
)
METHODS: Registry[EditMethod] = Registry(
    "edits",
    "edit mode",
    {method.name: method for method in _BUILT_IN},
    named="name",
    needs=("name", "prepare", "factors", "dense", "along", "dense_rows"),
    reserved=(AUTO,),
)


def edit_method(name: str) -> EditMethod:
    """The method of that name, or InputError with the names there are."""
    return METHODS.find(name)


def reading_method(method: EditMethod) -> EditMethod:
    """The method that edits Wᵀ in this mode where W reads the residual stream.

    `full` and `columns` keep the norms of W's rows: w'_i = n_i (ŵ_i − λ (ŵ_i·v) v)/‖…‖. Without norms, ΔW = −λ (Wv) vᵀ.

    Raises:
        InputError: the method edits no module that reads.
    """
    name = vars(type(method)).get("reads_as", "")
    if not name:
        raise InputError(
            f"The edit mode {method.name!r} edits no modules that read the residual stream; leave load.readers out, or choose "
            "another --set edit.mode."
        )
    return METHODS.find(name)


def scales_rows(method: EditMethod) -> bool:
    """Whether the method's edits scale the rows of W, as only DoRA adapters can: tried on a small matrix."""
    return not needs_inputs(method) and _tried(method).row_scale is not None


def scales_columns(method: EditMethod) -> bool:
    """Whether the method's edits scale the columns of W, as no adapter can: tried on a small matrix."""
    return not needs_inputs(method) and _tried(method).column_scale is not None


def is_low_rank(method: EditMethod) -> bool:
    """Whether the method's edits scale nothing: as exact factors, their rank is the number of directions."""
    return not (scales_rows(method) or scales_columns(method))


def parameters_of(method: EditMethod) -> Mapping[str, Range]:
    """The ranges of the numbers that the method asks the search for, by name."""
    return getattr(method, "parameters", {})


def is_refinable(method: EditMethod) -> bool:
    """Whether an edit is strengths and directions alone, which a gradient refines, and no numbers that the search finds."""
    return not is_learned(method) and not parameters_of(method)


def _at_middle(method: EditMethod) -> EditMethod:
    numbers = {name: wanted.middle for name, wanted in parameters_of(method).items()}
    return method.at(numbers) if numbers else method


def _tried(method: EditMethod) -> Factors:
    weight, directions = torch.eye(3) + 1, torch.eye(3, dtype=torch.float64)[:1] * 0.6 + 0.2
    method = _at_middle(method)
    prepared = method.prepare(lambda: weight, directions / directions.norm())
    return method.factors(prepared, Blend((0,), (1.0,)), 0.5)


def prepared_bytes(method: EditMethod, n_directions: int, d_out: int, d_in: int, prompts: int = 0) -> int:
    """Bytes of the prepared edits of a matrix (d_out, d_in) with the directions of all layers: tried on a small matrix.

    `prompts`: of how many the inputs of modules are captured. For methods that are learned from them, this is an upper bound.
    """
    if is_learned(method):
        return problem_bytes(prompts, d_out, d_in)
    plain = METHODS["none"] if needs_inputs(method) else method
    tried = plain.prepare(lambda: torch.ones(2, 3), torch.ones(1, 2, dtype=torch.float64))
    norms = {2: d_out, 3: d_in}.get(tried.norms.numel(), 0)
    keys = torch.float32.itemsize * prompts * d_in if needs_answers(method) else 0  # K and C
    rows = tried.a.element_size() * d_in + (tried.p.element_size() * d_out if tried.p.numel() else 0)
    return n_directions * rows + tried.norms.element_size() * norms + keys


def check_several(method: EditMethod, count: int) -> None:
    """InputError if the method can't remove so many directions of a layer: before a run, so tried on a small matrix.

    Of a method that needs inputs, which there are none of yet, only whether it has a `product` is known.
    """
    if count < 2:
        return
    if is_learned(method):
        raise InputError(
            f"The edit mode {method.name!r} uses no directions, so it can't use several of a layer; choose a "
            "--set directions.method that finds one."
        )
    if getattr(type(method), "product", EditMethod.product) is EditMethod.product:
        raise one_direction_only(method, count)
    if not needs_inputs(method):
        method = _at_middle(method)
        prepared = method.prepare(lambda: torch.eye(3) + 1, torch.full((1, 3), 3**-0.5, dtype=torch.float64))
        method.product(prepared, [Blend((0,), (1.0,))] * count, torch.full((count,), 0.1, dtype=torch.float64))


def exact_factors(method: EditMethod, prepared: Prepared, blends: Sequence[Blend], coeffs: Sequence[float]) -> Factors:
    """The method's factors for one direction or several, none of them zero, each with its coeff."""
    if len(blends) == 1:
        return method.factors(prepared, blends[0], coeffs[0])
    return method.product(prepared, blends, torch.tensor(coeffs, dtype=torch.float64, device=prepared.directions.device))


def svd_factors(
    method: EditMethod,
    prepared: Prepared,
    blends: Sequence[Blend],
    coeffs: Sequence[float],
    module: str,
    rank: int,
    memo: SvdMemo,
    numbers: Sequence[tuple[str, float]] = (),
) -> Factors:
    """Rank-`rank` factors of the method's ΔW, from the memo if these exact inputs were seen before.

    `numbers` are those of the trial that the method has been given by `at`.
    An edit that scales nothing is returned as it is: its rank is the number of directions, and there is nothing to approximate.
    """
    exact = exact_factors(method, prepared, blends, coeffs)
    if exact.row_scale is None and exact.column_scale is None:
        return exact
    key = svd_key(module, method.name, blended(blends, prepared.directions), coeffs, rank, numbers)
    factors = memo.get(key)
    if factors is None:
        factors = truncated_svd(exact.delta(prepared.read_weight()), rank, seed_of(key))
        memo.put(key, factors)
    return factors


__all__ = [
    "METHODS",
    "EditMethod",
    "Factors",
    "Prepared",
    "SvdMemo",
    "check_several",
    "edit_method",
    "exact_factors",
    "is_learned",
    "is_low_rank",
    "is_refinable",
    "needs_answers",
    "needs_inputs",
    "parameters_of",
    "prepare",
    "prepared_bytes",
    "reading_method",
    "scales_columns",
    "scales_rows",
    "svd_factors",
]
