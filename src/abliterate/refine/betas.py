"""Which weight β of the KL the next descent has, and where it begins, to find the largest at which the model doesn't refuse.

The scale of β is the model's own, so it is found on validation prompts and not by a fixed list. Too large a weight leaves
refusals, so refusals decide; too small a weight only wastes KL. They are counted under a slightly weaker edit
(`refine.margin`), because an edit that just suffices for prompts like those that it was learned from doesn't suffice for
others. Descents go on from each other, because a weight at which the model still refuses after few steps is often right after
more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The first weight, as a share of the teacher's gain per nat of KL: at 1 the teacher's own edit would just pay, and refined
# edits reach the same answers at a fraction of its KL. The first trial is to have a wide margin.
FIRST = 0.15
# The factors by which the weight grows: usually, and where one of the last two descents left refusals.
FAR, NEAR = 2.5, 1.4
# How the weight falls with the share of refused prompts: it is divided by one plus so many times the share.
FALL = 3.0
# The last descent's weight is larger by this factor, so that the front ends with the least KL, where no margin is left.
LAST = 2.0
# The share of prompts beyond which a descent led back to the unedited model, and none goes on from it.
ALL = 0.9


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight, and the share of validation prompts that are still refused under the edit of its descent, made weaker."""

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


def next_descent(tried: Sequence[Tried], first: float, limit: float, *, is_last: bool = False) -> Next:
    """The descent after those `tried`, where at most `limit` of the prompts may be refused.

    Weights grow while that is so, and fall while it isn't, the more the more is refused; that of the last descent is larger.
    """
    if not tried:
        return Next(first, None)
    last, rise = tried[-1], LAST if is_last else 1.0
    enough = [place for place, one in enumerate(tried) if one.refused <= limit]
    if last.refused <= limit:
        growth = NEAR if any(one.refused > limit for one in tried[-2:]) else FAR
        return Next(last.beta * max(growth, rise), len(tried) - 1)
    after = len(tried) - 1 if last.refused <= ALL else enough[-1] if enough else None
    return Next(last.beta / (1 + FALL * last.refused) * rise, after)
