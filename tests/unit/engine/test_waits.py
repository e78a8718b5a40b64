"""How often the engine waits for the device: every value that is read back stalls a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from abliterate.engine import decode
from abliterate.scorers.refusals import Refusals
from support.engine import HARMFUL, HARMLESS, make_lab, trials
from support.waits import Waits

Called = list[str]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """The names of the decoder's calls and passes, in order."""
    seen: Called = []

    def noting(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            seen.append(name)
            return real(*args, **kwargs)

        return call

    for name in ("__call__", "_feed"):
        monkeypatch.setattr(decode.Decoder, name, noting(name, getattr(decode.Decoder, name)))
    return seen


def test_reads_are_counted_where_they_happen() -> None:
    values = torch.ones(3)
    with Waits() as waits:
        values.tolist()
        bool(values.all())
        values[values > 0].to("cpu")
        values.to(torch.float64).sum()
    assert sum(waits.places.values()) == 4


@pytest.mark.parametrize(("family", "drafts"), [("llama", True), ("llama", False), ("gemma3", False)])
def test_a_pass_waits_at_most_once(family: str, drafts: bool, called: Called) -> None:
    """Without drafts, only a look at several passes waits; no prefill, hook or scorer ever does."""
    lab = make_lab(family, batch_size=4, tokens=24)
    engine = lab.engine(Refusals(["no such text"]), use_drafts=drafts)
    assert engine.drafting == drafts
    for params in trials(lab, 3):
        lab.editor.apply(params)
        called.clear()
        with Waits() as waits:
            engine.respond(HARMFUL, limit=3)
        own = {place: count for place, count in waits.places.items() if place != "model"}
        calls, passes = called.count("__call__"), called.count("_feed")
        assert passes > calls
        looks = passes if drafts else math.ceil(passes / decode.LOOK_EVERY) + calls
        assert 0 < sum(own.values()) <= looks + calls
        assert {place.split(":")[0] for place in own} == {"decode.py"}
        with Waits() as waits:
            engine.first_logprobs(HARMLESS)
        assert set(waits.places) <= {"model"}
