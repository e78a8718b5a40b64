"""Edit methods: how a matrix is changed along a direction.

A new method is a file beside these and a line in `METHODS`, or a plugin's `edits`.
"""

from __future__ import annotations

import torch

from abliterate.directions.base import Blend
from abliterate.edits.base import EditMethod, Factors, Prepared, prepare
from abliterate.edits.full import NormPreserving
from abliterate.edits.none import PlainAblation
from abliterate.edits.pre import PreNormalized
from abliterate.edits.svd import SvdMemo, seed_of, svd_key, truncated_svd
from abliterate.plugins import Registry

METHODS: Registry[EditMethod] = Registry(
    "edits",
    "edit mode",
    {method.name: method for method in (NormPreserving(), PreNormalized(), PlainAblation())},
    named="name",
    needs=("name", "prepare", "factors", "dense", "along", "dense_rows"),
)


def edit_method(name: str) -> EditMethod:
    """The method of that name, or InputError with the names there are."""
    return METHODS.find(name)


def scales_rows(method: EditMethod) -> bool:
    """Whether the method's edits scale the rows of W, as only DoRA adapters can: tried on a small matrix."""
    weight, directions = torch.eye(3) + 1, torch.eye(3, dtype=torch.float64)[:1] * 0.6 + 0.2
    prepared = method.prepare(lambda: weight, directions / directions.norm())
    return method.factors(prepared, Blend((0,), (1.0,)), 0.5).row_scale is not None


def svd_factors(
    method: EditMethod, prepared: Prepared, blend: Blend, coeff: float, module: str, rank: int, memo: SvdMemo
) -> Factors:
    """Rank-`rank` factors of the method's ΔW, from the memo if these exact inputs were seen before.

    An edit that already has rank 1 is returned as it is: there is nothing to approximate.
    """
    if prepared.p.numel() == 0:
        return method.factors(prepared, blend, coeff)
    key = svd_key(module, method.name, blend.of(prepared.directions), coeff, rank)
    factors = memo.get(key)
    if factors is None:
        delta = method.factors(prepared, blend, coeff).delta(prepared.read_weight())
        factors = truncated_svd(delta, rank, seed_of(key))
        memo.put(key, factors)
    return factors


__all__ = ["METHODS", "EditMethod", "Factors", "Prepared", "SvdMemo", "edit_method", "prepare", "scales_rows", "svd_factors"]
