"""The engine and the hooks on a model that lies on two devices: every operation's tensors are on one of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from abliterate.edits import Factors
from abliterate.engine.decode import Decoder, Decoding, join
from abliterate.engine.forward import Passes
from abliterate.engine.kv_cache import sharing_of
from abliterate.engine.prefill import Prefill, RowGroup
from abliterate.engine.reference import greedy_config
from abliterate.engine.static_cache import StaticCache
from abliterate.evaluation.teacher_forced import TeacherForced, answer_logits
from abliterate.model.edit_hooks import EditHooks
from abliterate.model.loader import LoadedModel
from support.devices import fake_devices, place
from support.models import make_loaded, make_model

FIRST, SECOND = torch.device("cpu", 1), torch.device("cpu", 2)
PREFIX = [5, 6, 7, 8]
ROWS = [[*PREFIX, 9], [*PREFIX, 10, 11, 12], [*PREFIX, 13, 14], [*PREFIX, 15]]
PLACES = {
    **dict.fromkeys(("", "model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu:1"),
    **dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "cpu:2"),
}


@pytest.fixture
def loaded() -> Iterator[LoadedModel]:
    """A model whose last two layers are on the second of two devices."""
    loaded = make_loaded(make_model("llama_biased"))
    with fake_devices():
        place(loaded.model, PLACES)
        yield loaded


def edited(loaded: LoadedModel, first: int) -> EditHooks:
    """An edit with row scales and biases of all modules from layer `first` on, whose factors come from the first device."""
    hooks = EditHooks(loaded.targets)
    wanted = {}
    for target in loaded.targets:
        if target.layer >= first:
            d_out, d_in = target.module.weight.shape
            scale, a, b = (torch.empty(shape, device=FIRST) for shape in ((d_out,), (1, d_in), (d_out, 1)))
            factors = Factors(scale, a, b)
            wanted[target.name] = (target.name, lambda factors=factors: factors)
    hooks.apply(wanted)
    return hooks


def started(prefill: Prefill, group: RowGroup, rows: list[int]) -> Decoding:
    """Rows after their prefill, as the engine begins them."""
    indices = torch.tensor(rows, device=FIRST)
    logits, cache = prefill(group, indices, keep_cache=True)
    assert cache is not None
    cached = [group.layout.lengths[row] for row in rows]
    mask, whole = group.layout.mask[indices], group.layout.whole[indices]
    return Decoding(rows, [[] for _ in rows], logits, cache, mask, whole, cached, set())


@torch.no_grad()
def prefilled(loaded: LoadedModel) -> tuple[Passes, list[Decoding]]:
    """Two chunks of rows prefilled from the kept states of layer 2, with the prefix shared."""
    passes = Passes(loaded.model, loaded.layers)
    ids = torch.tensor([ROWS[0]], device=FIRST)
    with passes.observing():
        _, cache = passes(ids, torch.ones_like(ids), None)
    assert cache is not None
    assert [layer.keys.device for layer in cache.layers] == [FIRST, SECOND, SECOND]  # type: ignore[union-attr]
    hooks = EditHooks(loaded.targets)
    prefill = Prefill(passes, hooks, sharing_of(cache, loaded.model.config))
    group = prefill.group(range(len(ROWS)), ROWS, PREFIX, FIRST)
    prefill.keep(group, [1, 2], 3, with_cache=True)
    assert {hidden.device for hidden in group.kept.hidden.values()} == {FIRST, SECOND}
    prefill = Prefill(passes, edited(loaded, 2), prefill.sharing)
    assert prefill._start(group) == 2
    chunks = [started(prefill, group, [0, 1]), started(prefill, group, [2, 3])]
    for chunk in chunks:
        assert chunk.logits.device == FIRST
        assert_over_both(chunk)
    return passes, chunks


def assert_over_both(rows: Decoding) -> None:
    """Each layer's states are on its own device."""
    assert [layer.keys.device for layer in rows.cache.layers] == [FIRST, SECOND, SECOND]  # type: ignore[union-attr]


@torch.no_grad()
def test_decoding_on_two_devices(loaded: LoadedModel) -> None:
    """What a trial does, with given tokens in place of those it reads."""
    passes, chunks = prefilled(loaded)
    in_static_buffers(passes, chunks[0])
    decoder = Decoder(loaded.model, passes, greedy_config(loaded.model, 9))
    for index, chunk in enumerate(chunks):
        decoder._hold(chunk, decoder._feed_blocks(chunk, [[5, 6, 7][: 2 + index], [5]]), [2, 1])
    rows = join(chunks)
    assert rows.cached == [9, 10, 8, 6]
    rows.finished = {1}
    rows.close(leaving=True)
    decoder._hold(rows, decoder._feed_blocks(rows, [[5], [6], [7]]), [1, 1, 1])
    rows.finished = {0}
    rows.leave()
    logits = decoder._feed(rows, torch.tensor([[5], [6]], device=FIRST), torch.ones(2, 1, dtype=torch.long, device=FIRST))
    assert logits.device == rows.mask.device == FIRST
    assert_over_both(rows)


def in_static_buffers(passes: Passes, rows: Decoding) -> None:
    """Two passes in static buffers, between which the rows change places."""
    width = rows.mask.shape[1]
    static = StaticCache(passes)
    static.take(rows.cache, rows.mask, 5)
    assert {keys.device for keys, _ in static._states} == set(static._columns) == {FIRST, SECOND}
    assert static.feed(torch.tensor([[5], [6]], device=FIRST)).shape[0] == 2
    static.keep(torch.tensor([1, 0], device=FIRST))
    assert static.feed(torch.tensor([[6], [7]], device=FIRST)).device == FIRST
    rows.mask = static.give_back(rows.cache)
    assert rows.mask.shape == (2, width + 2)
    rows.cached = [count + 2 for count in rows.cached]
    assert_over_both(rows)


def test_logits_of_answers_on_two_devices(loaded: LoadedModel) -> None:
    edited(loaded, 0)
    rows = [TeacherForced(ROWS[0], [5, 6]), TeacherForced(ROWS[0], [7]), TeacherForced(ROWS[1], [7, 8, 9])]
    logits = answer_logits(loaded.model, rows, FIRST, share=True)
    assert {one.device for one in logits} == {FIRST}
    assert [len(one) for one in logits] == [2, 1, 3]


def test_logits_that_stay_on_the_last_device(loaded: LoadedModel) -> None:
    """Without accelerate's hook around the whole model nothing brings them back."""
    loaded.model._hf_hook.io_same_device = False  # type: ignore[union-attr]
    ids = torch.tensor([ROWS[0]], device=FIRST)
    logits, _ = Passes(loaded.model, loaded.layers)(ids, torch.ones_like(ids), None)
    assert logits.device == FIRST
