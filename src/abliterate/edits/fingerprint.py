"""Three numbers that tell one edit from another without a weight: rounding moves them a little, another edit a lot.

Pure tensor math; knows no files. Of BA: its Frobenius norm and two bilinear forms with fixed signs, which see its directions.
They are the same however BA is factored. The row scale follows from the same coeff and direction, so it isn't looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from abliterate.edits.base import Factors

Sketch = tuple[float, float, float]
# Knuth's multiplier and one of xxHash: signs that are the same in every version of torch.
_MULTIPLIERS = (2654435761, 2246822519)


def sketch(factors: Factors) -> Sketch:
    """(‖BA‖, r₁ᵀBA r₂, r₂ᵀBA r₁) of one module's edit; of a stack, over all its matrices."""
    square, forms = 0.0, [0.0, 0.0]
    for part in factors.parts():
        a, b = part.a.double().cpu(), part.b.double().cpu()  # (r, d_in), (d_out, r)
        square += max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
        rows, columns = ([_signs(n, multiplier) for multiplier in _MULTIPLIERS] for n in (len(b), a.shape[1]))
        forms[0] += float((rows[0] @ b) @ (a @ columns[1]))
        forms[1] += float((rows[1] @ b) @ (a @ columns[0]))
    return math.sqrt(square), forms[0], forms[1]


def largest_difference(one: Mapping[str, Sketch], other: Mapping[str, Sketch]) -> tuple[float, str]:
    """How far the edits of two models are apart in the worst module, as a share of that edit, and its name.

    Infinite where only one of them edits a module.
    """
    if one.keys() != other.keys():
        return math.inf, min(one.keys() ^ other.keys())
    worst = (0.0, "")
    for name, expected in one.items():
        size = max(expected[0], other[name][0], math.ulp(0.0))
        apart = max(abs(x - y) / max(size, abs(x), abs(y)) for x, y in zip(expected, other[name], strict=True))
        worst = max(worst, (apart, name))
    return worst


def _signs(n: int, multiplier: int) -> Tensor:
    """(n) of ±1 in float64."""
    bits = ((torch.arange(1, n + 1, dtype=torch.int64) * multiplier) >> 15) & 1
    return 1.0 - 2.0 * bits.double()
