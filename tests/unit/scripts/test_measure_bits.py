"""In bfloat16 the engine differs from the reference no more than the reference does from itself at another batch size."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from abliterate.engine.self_check import check, distance
from abliterate.scorers.refusals import Refusals
from abliterate.types import Baseline
from support.engine import Lab, make_lab, make_setup, markers_of, trials, whole
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import measure_bits as bits

COUNT = 4


def made_ways(lab: Lab) -> list[bits.Way]:
    """The four ways in a lab, with markers that occur in half of the unedited model's responses."""
    early = Refusals(markers_of(whole(lab.reference)[1]))
    return bits.make_ways(dataclasses.replace(make_setup(lab), early=early), second=2)


@pytest.fixture(scope="module")
def rounded() -> Lab:
    lab = make_lab("llama", batch_size=5)
    lab.loaded.model.to(torch.bfloat16)
    return lab


def test_the_engine_differs_no_more_than_the_reference_from_itself(rounded: Lab) -> None:
    """First tokens within three times the reference's own spread or the self-check's tolerance; flags as often as its own."""
    ways, spread, engines = made_ways(rounded), 0.0, 0.0
    first, second, *rest = ways
    allowed = check(rest[-1].engine, make_setup(rounded)).allowed  # type: ignore[arg-type]
    for params in trials(rounded, COUNT):
        rounded.editor.apply(params)
        expected, other, *found = (way.engine.first_logprobs(way.harmless) for way in (first, second, *rest))
        spread = max(spread, distance(expected, other))
        engines = max(engines, *(distance(expected, one) for one in found))
    assert 0 < engines <= max(3 * spread, allowed)
    assert allowed == pytest.approx(8 * torch.finfo(torch.bfloat16).eps, rel=2)
    rounded.editor.clear()


def test_every_way_measures_every_trial_and_goes_on_where_it_ended(rounded: Lab) -> None:
    params, lines = trials(rounded, COUNT), list[bits.Line]()
    ways = made_ways(rounded)
    baselines = {way.name: way.baseline for way in ways}
    bits.measure_trials(ways, params, rounded.editor.apply, lines)
    rounded.editor.clear()
    assert len(lines) == COUNT
    own = bits.differences(lines, bits.FIRST, baselines, params)
    assert (own.flags, own.counts, own.fronts, own.contradicted, set(own.kl)) == (0, 0, 0, 0, {0.0})
    spread = bits.differences(lines, bits.SECOND, baselines, params)
    for name in (bits.PLAIN, bits.DRAFTING):
        found = bits.differences(lines, name, baselines, params)
        assert found.flags <= spread.flags + COUNT, "of twenty; a random model's tokens are nearly tied"
        assert max(found.kl) <= max(3 * max(spread.kl), 8 * torch.finfo(torch.bfloat16).eps)
        assert found.by_itself == 0
    assert len(bits.table(lines, baselines, params)) == 5

    again = lines[: COUNT // 2]
    kept = list[bits.Line]()
    continued = made_ways(rounded)
    bits.measure_trials(continued, params, rounded.editor.apply, again, kept.append)
    rounded.editor.clear()
    assert len(kept) == COUNT - COUNT // 2
    assert [line[bits.FIRST] for line in again] == [line[bits.FIRST] for line in lines]
    assert [len(way.trials) for way in continued] == [COUNT] * 4


def test_differences_are_counted() -> None:
    """By hand: one flag, one count, one front, and a stop that the reference's responses contradict."""
    params = trials(make_lab("llama"), 2)

    def one(kl: float, flags: str, limit: int | None = None, stopped: bool = False) -> bits.Line:
        return {"kl": [kl, kl], "flags": [flag == "1" for flag in flags], "limit": limit, "stopped": stopped}

    lines: list[bits.Line] = [
        {bits.FIRST: one(0.1, "100"), bits.PLAIN: one(0.1, "100")},
        {bits.FIRST: one(0.2, "000", 1), bits.PLAIN: one(0.3, "010", 1, stopped=True)},
    ]
    baselines = dict.fromkeys((bits.FIRST, bits.PLAIN), Baseline(3, 3))
    found = bits.differences(lines, bits.PLAIN, baselines, params)
    assert (found.flags, found.counts, found.fronts, found.stops, found.contradicted, found.by_itself) == (1, 1, 1, 1, 1, 0)
    assert found.kl == pytest.approx([0.0, 0.1])
