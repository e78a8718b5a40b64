"""Edit methods: how a matrix is changed along a direction. A new method is a file here and a line in `METHODS`."""

from __future__ import annotations

from abliterate.directions.base import Blend
from abliterate.edits.base import EditMethod, Factors, Prepared, prepare
from abliterate.edits.full import NormPreserving
from abliterate.edits.none import PlainAblation
from abliterate.edits.pre import PreNormalized
from abliterate.edits.svd import SvdMemo, seed_of, svd_key, truncated_svd
from abliterate.errors import InputError

METHODS: dict[str, EditMethod] = {method.name: method for method in (NormPreserving(), PreNormalized(), PlainAblation())}


def edit_method(name: str) -> EditMethod:
    """The method of that name. InputError, which lists the known methods, if there is none."""
    if name not in METHODS:
        raise InputError(f"There is no edit mode {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


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


__all__ = ["METHODS", "EditMethod", "Factors", "Prepared", "SvdMemo", "edit_method", "prepare", "svd_factors"]
