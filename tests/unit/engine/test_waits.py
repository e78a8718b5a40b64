"""How often the engine waits for the device: every value that is read back stalls a GPU."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from abliterate.engine import decode
from abliterate.engine.trial_engine import Pacing
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


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])  # pads anywhere, at the left only, and nothing shared
def test_the_columns_of_a_row_are_known_without_waiting(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of unequal lengths pause, are joined, leave and close holes; rows have drafts that are partly wrong."""
    checked = 0

    def checking(name: str) -> None:
        real = getattr(decode.Decoder if name.startswith("_") else decode.Decoding, name)

        def call(self: object, *args: object, **kwargs: object) -> object:
            nonlocal checked
            found = real(self, *args, **kwargs)
            rows = args[0] if name.startswith("_") else self
            assert isinstance(rows, decode.Decoding)
            assert rows.cached == rows.mask.sum(dim=1).tolist()
            checked += 1
            return found

        monkeypatch.setattr(decode.Decoder if name.startswith("_") else decode.Decoding, name, call)

    for name in ("_hold", "_draft", "_leaves", "leave", "close"):
        checking(name)
    draw = random.Random(0)
    monkeypatch.setattr(
        decode.Drafts, "propose", lambda self, row, so_far, length: [draw.randrange(5, 300) for _ in range(length)]
    )
    monkeypatch.setattr(decode.Drafts, "width", lambda self, proposed: 1 + max(map(len, proposed), default=0))
    lab = make_lab(family, batch_size=4, tokens=24, pacing=Pacing(pause=4, holes=0.1))
    engine = lab.engine(Refusals(["no such text"]))
    for params in trials(lab, 2):
        lab.editor.apply(params)
        for limit in (2, None):
            engine.respond(HARMFUL, limit=limit)
    assert checked > 20


def test_reads_are_counted_where_they_happen() -> None:
    values = torch.ones(3)
    with Waits() as waits:
        values.tolist()
        bool(values.all())
        values[values > 0].to("cpu")
        values.to(torch.float64).sum()
    assert sum(waits.places.values()) == 4


@pytest.mark.parametrize(
    ("family", "drafts", "static"),
    [("llama", True, False), ("llama", False, False), ("llama", False, True), ("gemma3", False, False)],
)
def test_a_pass_waits_at_most_once(family: str, drafts: bool, static: bool, called: Called) -> None:
    """Without drafts, only a look at several passes waits; no prefill, hook or scorer ever does."""
    lab = make_lab(family, batch_size=4, tokens=24)
    engine = lab.engine(Refusals(["no such text"]), use_drafts=drafts, use_static_cache=static)
    assert (engine.drafting, engine.static) == (drafts, static)
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
