"""Tell real answers from broken and off-topic ones by the unedited model's log-probabilities, calibrated on its own answers.

The model is its own yardstick. It answers harmless prompts, sampled at temperature 1, so that the answers are as varied as its
own language, and each measure's bound comes from that measure on these answers: no number is tuned by hand to a model.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from abliterate.types import LARGEST, count, number

Kind = Literal["refused", "broken", "off_topic", "answered"]
KINDS: tuple[Kind, ...] = ("refused", "broken", "off_topic", "answered")

# The definition's version: yardsticks in the cache that another version made are no use.
VERSION = 11
# The tokens of an opening. After a prompt that it refuses, the base finds every opening but a refusal unlikely, so the opening
# doesn't count. (Looking at it after harmless prompts instead found a few broken openings more on the demo, and lost as many
# good answers; it cost half as many tokens again.)
OPENING = 6
# The tokens that tell a response's topic. What it says first is what it is about; later words follow from earlier ones.
TELLING = 32
# A loop that is no answer repeats about a sentence.
LOOP = 12
QUANTILES = (0.01, 0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 0.98, 0.99)
# {measure: whether a real answer has at most the bound, else at least}
AT_MOST = {"surprise": True, "distinct": False, "end": True, "topic": False}
_FLUENT = ("surprise", "distinct", "end")


@dataclass(frozen=True, slots=True)
class Measures:
    """The measures of one response; ℓ is the base's log-probability of a token in nats.

    `surprise`: mean −ℓ of its tokens after the opening. `distinct`: the share of distinct pairs among all pairs of neighbouring
    tokens. `end`: −ℓ of the end token; 0 for a response that was cut at the length limit. `topic`: how much likelier its own
    prompt makes its first `TELLING` tokens than some other prompts of the same set do: the share of their mean surprise that
    its own prompt takes away. It is a share because prompts of one set may differ in many words or in few, and of the mean
    because one of the others may ask nearly the same.
    """

    surprise: float
    distinct: float
    end: float
    topic: float = 0.0


def fluency(own: Tensor, ids: Sequence[int], *, ended: bool) -> Measures:
    """The measures of a response but for its topic, from ℓ (T) of its tokens `ids`, the last of which is its end if it `ended`.

    Nothing is surprising in a response that is all opening.
    """
    surprise = float(-own[OPENING:].mean()) if len(ids) > OPENING else 0.0
    return Measures(surprise, distinct_pairs(ids), float(-own[-1]) if ended else 0.0)


def topic(own: Tensor, alike: Tensor) -> float:
    """`Measures.topic` from ℓ (T) after the response's prompt, and ℓ (k, t) of its first tokens after k other prompts.

    It lies between −1 and 1; without other prompts it is 1.
    """
    if not len(alike):
        return 1.0
    width = min(TELLING, alike.shape[1])
    mine, theirs = -own[:width].sum(), -alike[:, :width].sum(dim=1).mean()
    return float((theirs - mine) / torch.maximum(theirs, mine).clamp_min(1e-6))


def distinct_pairs(ids: Sequence[int]) -> float:
    """The share of distinct pairs among all pairs of neighbouring tokens; 1 if there are none."""
    pairs = list(itertools.pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The bound of each measure, and its distribution on the base's own `answers`, as {measure: {quantile: value}}."""

    bounds: Mapping[str, float]
    answers: int
    quantiles: Mapping[str, Mapping[str, float]]

    def is_fluent(self, measures: Measures) -> bool:
        """Whether a response keeps every bound but that of its topic."""
        return all(self._keeps(name, getattr(measures, name)) for name in _FLUENT)

    def is_on_topic(self, value: float) -> bool:
        """Whether a topic of `value` keeps its bound."""
        return self._keeps("topic", value)

    def _keeps(self, name: str, value: float) -> bool:
        return value <= self.bounds[name] if AT_MOST[name] else value >= self.bounds[name]

    def to_record(self) -> dict[str, Any]:
        """The JSON form; the inverse of `from_record`."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Yardstick:
        """The inverse of `to_record`; AttributeError, KeyError, TypeError or ValueError if it isn't what `to_record` gives."""
        bounds = {name: float(number(record["bounds"][name])) for name in AT_MOST}
        quantiles = {
            name: {share: float(number(value)) for share, value in record["quantiles"][name].items()} for name in AT_MOST
        }
        return Yardstick(bounds, count(record["answers"]), quantiles)


def looped(ids: Sequence[int]) -> list[int]:
    """The first `LOOP` tokens of an answer over and over, to its length."""
    return list(itertools.islice(itertools.cycle(ids[:LOOP]), len(ids)))


@dataclass(frozen=True)
class Spoiled:
    """What the base's answers are told from.

    `greedy` and `looped` are the shares of distinct pairs of its greedy answers and of these as loops, `exchanged` the topics
    of answers to other prompts, `ends` −ℓ of the ends of answers, and `cut` −ℓ of an end in the middle of each.
    """

    greedy: Sequence[float] = ()
    looped: Sequence[float] = ()
    exchanged: Sequence[float] = ()
    ends: Sequence[float] = ()
    cut: Sequence[float] = ()


def calibrate(own: Sequence[Measures], spoiled: Spoiled) -> Yardstick:
    """The yardstick of the base's `own` sampled answers to harmless prompts.

    The surprise may be that of 95 % of them. The other bounds are where good and spoiled answers separate best; that of the
    topic is at most the middle between the medians of own and exchanged pairs. Repetitions are those of greedy answers, as
    responses are greedy, and small models repeat themselves more in these.
    """
    values = {name: torch.tensor([getattr(one, name) for one in own], dtype=torch.float64) for name in AT_MOST}
    values["topic"] = values["topic"][~values["topic"].isnan()]  # only some answers are looked at for their topic
    # Answers that are all opening say nothing of how surprising others are; if no other is there, nothing is too surprising.
    values["surprise"] = values["surprise"][values["surprise"] != 0]
    if not len(values["surprise"]):
        values["surprise"] = torch.tensor([LARGEST], dtype=torch.float64)
    if spoiled.greedy:
        values["distinct"] = torch.tensor(list(spoiled.greedy), dtype=torch.float64)
    shares = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {
        name: dict(zip(map(str, QUANTILES), column.quantile(shares).tolist(), strict=True)) for name, column in values.items()
    }
    bounds = {
        "surprise": quantiles["surprise"]["0.95"],
        "distinct": separation(values["distinct"].tolist(), spoiled.looped),
        "end": -separation([-value for value in spoiled.ends], [-value for value in spoiled.cut]),
        "topic": _topic_bound(values["topic"].tolist(), spoiled.exchanged),
    }
    return Yardstick(bounds, len(own), quantiles)


def _topic_bound(own: Sequence[float], exchanged: Sequence[float]) -> float:
    """Where own and exchanged pairs separate best, but at most the middle between their medians.

    A few prompts that are alike can move the best separation far up, and answers that begin against the base's will lie lower
    than its own answers do.
    """
    if not exchanged:  # of one or two prompts, an answer can't be compared with that to another one
        return -1.0
    return min(separation(own, exchanged), (statistics.median(own) + statistics.median(exchanged)) / 2)


def separation(above: Sequence[float], below: Sequence[float]) -> float:
    """The threshold t at which the share of `above` with value ≥ t exceeds that of `below` most; in the middle of its interval.

    Without `below` it is the least value of `above`; without `above` the largest of `below`, and without both −1e9.
    """
    if not above or not below:
        return min(above, default=max(below, default=-1e9))
    points = sorted({*above, *below})
    cuts = [points[0], *((low + high) / 2 for low, high in itertools.pairwise(points))]

    def gain(cut: float) -> float:
        return sum(value >= cut for value in above) / len(above) - sum(value >= cut for value in below) / len(below)

    return max(cuts, key=gain)
