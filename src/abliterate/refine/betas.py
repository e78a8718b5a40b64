"""Which weight β of the KL the next descent has, and where it begins, to find the largest at which the model doesn't refuse.

The scale of β is the model's own, so it is found on validation prompts and not by a fixed list. Too large a weight leaves
refusals, so refusals decide; too small a weight only wastes KL. Descents go on from each other, because a weight at which the
model still refuses after few steps is often right after more of them. An edit that just suffices for prompts like those that
it was learned from doesn't suffice for others, so the course begins at a small weight, and its last descent looks for the
largest one that keeps a margin: at which a weaker edit suffices, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The first weight, as a share of the teacher's gain per nat of KL: at 1 the teacher's own edit would just pay, and refined
# edits reach the same answers at a fraction of its KL. The first trial is to have a wide margin.
FIRST = 0.1
# The KL that a teacher is taken to have at least: one that needs hardly any, by luck or by its kind of edit, would have the
# course begin at a weight that leaves no margin.
LEAST_KL = 0.02
# The factors by which the weight grows until refusals come back, and from then on.
FAR, NEAR = 3.0, 1.4
# How the weight falls with the share of refused prompts: it is divided by one plus so many times the share.
FALL = 3.0
# The last descent's weight is smaller than all before it by this factor, if none of them has kept a margin.
LAST = 2.0
# The share of prompts beyond which a descent led back to the unedited model, and none goes on from it.
ALL = 0.9


@dataclass(frozen=True, slots=True)
class Tried:
    """A weight, and the shares of validation prompts that its edit leaves refused, and the edit made weaker."""

    beta: float
    refused: float
    weaker: float


@dataclass(frozen=True, slots=True)
class Next:
    """The weight of a descent, and the place of the descent from whose end it goes on; None is the beginning."""

    beta: float
    after: int | None


def first_beta(gain: float, kl: float) -> float:
    """The first weight for a teacher that lowers the targets' loss by `gain` nats a token at a KL of `kl` nats.

    The KL is that of the first token and along the answers together, as in the loss.
    """
    return FIRST * max(gain, 1e-3) / max(kl, LEAST_KL)


def next_descent(tried: Sequence[Tried], first: float, limit: float, *, is_last: bool = False) -> Next:
    """The descent after those `tried`, where at most `limit` of the prompts may be refused.

    Weights grow while that is so, and fall while it isn't, the more the more is refused. The last descent lies halfway (of
    logarithms) between the largest weight that kept a margin and the next one tried; if none kept one, it starts from the
    beginning at a smaller weight.
    """
    if not tried:
        return Next(first, None)
    last, enough = tried[-1], [place for place, one in enumerate(tried) if one.refused <= limit]
    after = len(tried) - 1 if last.refused <= ALL else enough[-1] if enough else None
    growth = NEAR if len(enough) < len(tried) else FAR
    beta = last.beta * growth if last.refused <= limit else last.beta / (1 + FALL * last.refused)
    if not is_last:
        return Next(beta, after)
    with_margin = [place for place, one in enumerate(tried) if max(one.refused, one.weaker) <= limit]
    if not with_margin:
        return Next(min(beta, min(one.beta for one in tried) / LAST), None)
    widest = max(with_margin, key=lambda place: tried[place].beta)
    beyond = [one.beta for one in tried if one.beta > tried[widest].beta]
    if not beyond:
        return Next(beta, after)
    # It goes on from the wide point: a few steps don't widen an edit again that larger weights have made narrow.
    return Next(math.sqrt(tried[widest].beta * min(beyond)), widest)
