"""Edit methods and their representations. A new method is a file beside these and a line in `METHODS`."""

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
    """The method of that name, or InputError with those there are."""
    if name not in METHODS:
        raise InputError(f"There is no edit mode {name!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[name]


def svd_factors(
    method: EditMethod, prepared: Prepared, blend: Blend, coeff: float, module: str, rank: int, memo: SvdMemo
) -> Factors:
    """Rank-`rank` factors of the method's ΔW, from the memo where these exact inputs were seen before.

    An edit that is rank 1 already is returned as it is: there is nothing to approximate.
    """
    if prepared.p.numel() == 0:
        return method.factors(prepared, blend, coeff)
    key = svd_key(module, method.name, blend.of(prepared.directions), coeff, rank)
    found = memo.get(key)
    if found is None:
        delta = method.factors(prepared, blend, coeff).delta(prepared.read_weight())
        found = truncated_svd(delta, rank, seed_of(key))
        memo.put(key, found)
    return found


__all__ = ["METHODS", "EditMethod", "Factors", "Prepared", "SvdMemo", "edit_method", "prepare", "svd_factors"]
