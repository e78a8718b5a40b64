"""Which weight β of the KL refinement tries next: the largest at which the model no longer refuses.

The scale of β is the model's own, so it is found on validation prompts and not by a fixed list. Too large a weight leaves
refusals, so refusals decide; too small a weight only wastes KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The first weight, as a share of the teacher's gain per nat of KL: at 1 the teacher's own edit would just pay, and refined
# edits reach the same answers at a fraction of its KL.
FIRST = 0.3
# The factor between weights until one removes refusals and another doesn't, and the ratio at which two weights are near enough.
FACTOR, NEAR = 4.0, 1.6


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight and the share of validation prompts that the model still refuses after refinement with it."""

    beta: float
    refused: float


def first_beta(gain: float, kl: float) -> float:
    """The first weight for a teacher that lowers the targets' loss by `gain` nats a token at a KL of `kl` nats."""
    return FIRST * max(gain, 1e-3) / max(kl, 1e-6)


def next_beta(tried: Sequence[Tried], first: float, limit: float, most: int) -> float | None:
    """The weight to try after `tried`, of at most `most`; None if there is none.

    Weights grow until more than `limit` of the prompts are refused, and fall if that is so with the first one; between the
    largest that removes refusals and the smallest that doesn't, the geometric mean is tried.
    """
    if len(tried) >= most:
        return None
    enough = [one.beta for one in tried if one.refused <= limit]
    too_large = [one.beta for one in tried if one.refused > limit]
    if not tried:
        return first
    if not too_large:
        return max(enough) * FACTOR
    if not enough:
        return min(too_large) / FACTOR
    low, high = max(enough), min((beta for beta in too_large if beta > max(enough)), default=math.inf)
    if high == math.inf or high / low < NEAR:
        return None
    return math.sqrt(low * high)
