"""How many operations a pass hands to the device beyond the model's own: on a GPU each costs a launch."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from abliterate.engine import decode
from abliterate.engine.trial_engine import Pacing
from abliterate.scorers.refusals import Refusals
from support.engine import HARMFUL, make_lab, trials
from support.launches import Launches


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of decoding passes, in order."""
    seen: list[int] = []
    feed: Callable[..., object] = decode.Decoder._feed

    def noting(self: object, rows: object, ids: object, fed: object) -> object:
        seen.append(ids.shape[1])  # type: ignore[attr-defined]
        return feed(self, rows, ids, fed)

    monkeypatch.setattr(decode.Decoder, "_feed", noting)
    return seen


@pytest.mark.parametrize(("family", "of_an_edit"), [("llama", 3), ("gemma3", 3), ("gpt2", 4)])  # GPT-2 has biases
def test_an_edit_adds_three_operations_to_a_module_and_the_engine_a_few(
    family: str, of_an_edit: int, passes: list[int]
) -> None:
    lab = make_lab(family, batch_size=4, tokens=24)
    engine = lab.engine(Refusals(["no such text"]), use_drafts=False)
    params = trials(lab, 1)[0]
    lab.editor.apply(params)
    modules = len(lab.editor.hooks.active)
    assert modules > 1
    calls = 0

    def count(*args: object) -> None:
        nonlocal calls
        calls += 1

    handle = lab.loaded.model.register_forward_hook(count)
    with Launches() as launches:
        engine.respond(HARMFUL)
    handle.remove()
    edits = sum(count for place, count in launches.own.items() if place.startswith("edit_hooks.py"))
    # A prefill that begins at a higher layer passes the modules below it over.
    assert of_an_edit * modules * len(passes) <= edits <= of_an_edit * modules * calls
    assert 0 < launches.own.total() - edits <= 15 * calls
    assert launches.places["model"] > 50 * calls


def test_passes_with_drafts_add_few_operations_whatever_the_number_of_layers(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected drafts leave holes, and closing them takes two operations a layer, now and then."""
    monkeypatch.setattr(decode.Drafts, "propose", lambda self, row, so_far, length: [5] * length)
    monkeypatch.setattr(decode.Drafts, "width", lambda self, proposed: 1 + max(map(len, proposed), default=0))
    lab = make_lab("llama", batch_size=4, tokens=24, pacing=Pacing(pause=24, holes=0.5))
    engine = lab.engine(Refusals(["no such text"]))
    lab.editor.apply(trials(lab, 1)[0])
    with Launches() as launches:
        engine.respond(HARMFUL)
    closings = launches.own["kv_cache.py: take_columns"]
    layers = len(lab.loaded.layers)
    assert closings > 0
    assert closings <= (2 * layers + 8) * launches.own["decode.py: _select"] / 5
    edits = sum(count for place, count in launches.own.items() if place.startswith("edit_hooks.py"))
    assert max(passes) > 1
    assert launches.own.total() - edits - closings <= 40 * len(passes)
