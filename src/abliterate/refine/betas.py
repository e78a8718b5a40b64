"""Which weight β of the KL the next descent has, and where it begins: the largest weights at which the model doesn't refuse.

The scale of β is the model's own, so it is found on validation prompts and not by a fixed list. Too large a weight leaves
refusals, so refusals decide; too small a weight only wastes KL. Descents go on from each other, because a weight at which the
model still refuses after few steps is often right after more of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The first weight, as a share of the teacher's gain per nat of KL: at 1 the teacher's own edit would just pay, and refined
# edits reach the same answers at a fraction of its KL.
FIRST = 0.6
# The factor between weights until one removes refusals and another doesn't, and the factor from then on.
FAR, NEAR = 4.0, 1.5
# The share of prompts beyond which a weight was far too large: its descent led back to the unedited model, and none goes on.
MANY = 0.25


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight and the share of validation prompts that the model still refuses after the descent at it."""

    beta: float
    refused: float


@dataclass(frozen=True, slots=True)
class Next:
    """The weight of a descent, and the place of the descent from whose end it goes on; None is the beginning."""

    beta: float
    after: int | None


def first_beta(gain: float, kl: float) -> float:
    """The first weight for a teacher that lowers the targets' loss by `gain` nats a token at a KL of `kl` nats."""
    return FIRST * max(gain, 1e-3) / max(kl, 1e-6)


def next_descent(tried: Sequence[Tried], first: float, limit: float) -> Next:
    """The descent after those `tried`, where at most `limit` of the prompts may be refused.

    Weights grow while that is so, and fall while it isn't.
    """
    if not tried:
        return Next(first, None)
    enough = [place for place, one in enumerate(tried) if one.refused <= limit]
    last = tried[-1]
    if last.refused <= limit:
        return Next(last.beta * (NEAR if len(enough) < len(tried) else FAR), len(tried) - 1)
    if last.refused <= MANY:
        return Next(last.beta / NEAR, len(tried) - 1)
    if not enough:
        return Next(last.beta / FAR, None)
    good = tried[enough[-1]].beta
    return Next(math.sqrt(good * last.beta) if good < last.beta else last.beta / NEAR, enough[-1])
