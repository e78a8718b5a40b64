"""Which weight β of the KL refinement tries next: the largest at which the model still answers traces the end of the front.

The scale of β is the model's own, so it is found on validation prompts and not by a fixed list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The first weight, as a share of the teacher's gain per nat of KL: at 1 the teacher's own edit would just pay, and refined
# edits reach the same answers at a fraction of its KL.
FIRST = 0.3
# The factor between weights until one answers and another doesn't, and the ratio at which two weights are near enough.
FACTOR, NEAR = 4.0, 1.6


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight and the share of validation prompts without a real answer that refinement with it reached."""

    beta: float
    unanswered: float


def first_beta(gain: float, kl: float) -> float:
    """The first weight for a teacher that lowers the targets' loss by `gain` nats a token at a KL of `kl` nats."""
    return FIRST * max(gain, 1e-3) / max(kl, 1e-6)


def next_beta(tried: Sequence[Tried], first: float, limit: float, most: int) -> float | None:
    """The weight to try after `tried`, of at most `most`; None if there is none.

    Weights grow until more than `limit` of the prompts are left unanswered, and fall if the first one already does that;
    between the largest that answers and the smallest that doesn't, the geometric mean is tried.
    """
    if len(tried) >= most:
        return None
    answering = [one.beta for one in tried if one.unanswered <= limit]
    failing = [one.beta for one in tried if one.unanswered > limit]
    if not tried:
        return first
    if not failing:
        return max(answering) * FACTOR
    if not answering:
        return min(failing) / FACTOR
    low, high = max(answering), min((beta for beta in failing if beta > max(answering)), default=math.inf)
    if high == math.inf or high / low < NEAR:
        return None
    return math.sqrt(low * high)
