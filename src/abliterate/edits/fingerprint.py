"""An edit's fingerprint: three numbers, computed without weights, that rounding moves a little and another edit moves a lot.

They are the Frobenius norm of BA and two bilinear forms with fixed signs, which depend on its directions. They are the same
however BA is factored. The row or column scale follows from the same coeff and direction, so it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from abliterate.edits.base import Factors

Sketch = tuple[float, float, float]
# Knuth's multiplier and one of xxHash's: they give the same signs in every version of torch.
_MULTIPLIERS = (2654435761, 2246822519)


def sketch(factors: Factors) -> Sketch:
    """(‖BA‖, r₁ᵀBA r₂, r₂ᵀBA r₁) of one module's edit; for fused experts, summed over all matrices."""
    square, forms = 0.0, [0.0, 0.0]
    for factor in factors.parts():
        a, b = factor.a.double().cpu(), factor.b.double().cpu()  # (r, d_in), (d_out, r)
        square += max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
        rows, columns = ([_signs(n, multiplier) for multiplier in _MULTIPLIERS] for n in (len(b), a.shape[1]))
        forms[0] += float((rows[0] @ b) @ (a @ columns[1]))
        forms[1] += float((rows[1] @ b) @ (a @ columns[0]))
    return math.sqrt(square), forms[0], forms[1]


def largest_difference(first: Mapping[str, Sketch], second: Mapping[str, Sketch]) -> tuple[float, str]:
    """The largest difference between two models' edits, as a share of that module's edit, and the module's name.

    It is infinite where only one of them edits a module.
    """
    if first.keys() != second.keys():
        return math.inf, min(first.keys() ^ second.keys())
    worst = (0.0, "")
    for name, expected in first.items():
        size = max(expected[0], second[name][0], math.ulp(0.0))
        difference = max(abs(x - y) / max(size, abs(x), abs(y)) for x, y in zip(expected, second[name], strict=True))
        worst = max(worst, (difference, name))
    return worst


def _signs(n: int, multiplier: int) -> Tensor:
    """Fixed signs ±1 (n) in float64."""
    bits = ((torch.arange(1, n + 1, dtype=torch.int64) * multiplier) >> 15) & 1
    return 1.0 - 2.0 * bits.double()
