"""Exact confidence intervals of shares (Clopper and Pearson 1934)."""

from __future__ import annotations

import math
from collections.abc import Callable

LEVEL = 0.95
_STEPS = 60  # halvings of [0, 1]; the remaining width is far below a float's precision


def clopper_pearson(count: int, total: int, level: float = LEVEL) -> tuple[float, float]:
    """The exact interval of a probability after `count` successes in `total` trials; (0, 1) without trials.

    The lower bound is the p at which `count` or more successes have the probability (1 − level)/2, the upper bound the p at
    which `count` or fewer have it; any p beyond a bound makes the data less likely than that.
    """
    assert 0 <= count <= total
    if total == 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else _root(lambda p: 1 - _at_most(count - 1, total, p) - tail)
    high = 1.0 if count == total else _root(lambda p: tail - _at_most(count, total, p))
    return low, high


def _at_most(count: int, total: int, p: float) -> float:
    """P(X ≤ count) for a binomial X, summed from exact terms."""
    if p in (0.0, 1.0):
        return float(p == 0.0 or count >= total)
    return min(1.0, math.fsum(math.exp(_log_term(i, total, p)) for i in range(count + 1)))


def _log_term(i: int, total: int, p: float) -> float:
    choose = math.lgamma(total + 1) - math.lgamma(i + 1) - math.lgamma(total - i + 1)
    return choose + i * math.log(p) + (total - i) * math.log1p(-p)


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2
