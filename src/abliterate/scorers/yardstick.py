"""Tell real answers from broken and off-topic ones by the unedited model's log-probabilities, calibrated on its own answers.

The model is its own yardstick: it answers harmless prompts, sampled at temperature 1, so that the answers are as varied as its
own language is, and each measure's bound is a quantile of that measure on these answers. No number is tuned by hand to a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from abliterate.types import count, number

Kind = Literal["refused", "broken", "off_topic", "answered"]
KINDS: tuple[Kind, ...] = ("refused", "broken", "off_topic", "answered")

# The tokens of an opening. The base finds every opening but a refusal unlikely after a prompt that it refuses, so openings are
# left out of the other measures.
OPENING = 6
QUANTILES = (0.01, 0.02, 0.05, 0.25, 0.5, 0.75, 0.95, 0.98, 0.99)


@dataclass(frozen=True, slots=True)
class Measures:
    """The measures of one response r after its prompt x; ℓ is the base's log-probability in nats.

    `surprise`: mean −ℓ(r|x) of the tokens after the opening. `topic`: how much likelier x makes a token than other prompts of
    the same set do, as the mean of ℓ(r|x) − ℓ(r|x̄). `distinct`: the share of distinct pairs among all pairs of neighbouring
    tokens. `end`: −ℓ of the end token, 0 for a response that was cut at the length limit.
    """

    surprise: float
    topic: float
    distinct: float
    end: float


# {measure: whether a real answer has at most the bound, else at least}
AT_MOST = {"surprise": True, "topic": False, "distinct": False, "end": True}


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The bound of each measure, and its distribution on the base's own `answers`, as {measure: {quantile: value}}."""

    bounds: Mapping[str, float]
    answers: int
    quantiles: Mapping[str, Mapping[str, float]]

    def kind(self, measures: Measures) -> Kind:
        """Whether a response that is no refusal is broken, off-topic, or a real answer."""
        kept = {name: self._keeps(name, getattr(measures, name)) for name in AT_MOST}
        on_topic = kept.pop("topic")
        return "broken" if not all(kept.values()) else "answered" if on_topic else "off_topic"

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


def measure(own: Tensor, others: Tensor, ids: Sequence[int], *, ended: bool) -> Measures:
    """The measures of a response of the tokens `ids` (T ≥ 1).

    `own` (T) and `others` (k, T) are the log-probabilities of its tokens after its own prompt and after k other prompts of the
    same set. A response that is all opening is judged as a whole. Without other prompts the topic can't be judged, and is 0.
    """
    start = OPENING if len(ids) > OPENING else 0
    difference = (own - others)[:, start:] if len(others) else own.new_zeros(1, 1)
    return Measures(
        surprise=float(-own[start:].mean()),
        topic=float(difference.mean()),
        distinct=distinct_pairs(ids),
        end=float(-own[-1]) if ended else 0.0,
    )


def distinct_pairs(ids: Sequence[int]) -> float:
    """The share of distinct pairs among all pairs of neighbouring tokens; 1 if there are none."""
    pairs = list(itertools.pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def calibrate(own: Sequence[Measures], exchanged: Sequence[Measures]) -> Yardstick:
    """The yardstick of the base's own answers to harmless prompts, and of the same answers beside exchanged prompts."""
    values = {name: torch.tensor([getattr(one, name) for one in own], dtype=torch.float64) for name in AT_MOST}
    shares = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {
        name: dict(zip(map(str, QUANTILES), column.quantile(shares).tolist(), strict=True)) for name, column in values.items()
    }
    bounds = {
        "surprise": quantiles["surprise"]["0.98"],
        "topic": quantiles["topic"]["0.05"],
        "distinct": quantiles["distinct"]["0.02"],
        "end": quantiles["end"]["0.98"],
    }
    return Yardstick(bounds, len(own), quantiles)
