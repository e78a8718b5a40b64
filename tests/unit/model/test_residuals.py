"""Residuals against `output_hidden_states`, and everything that must not change them."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from abliterate.directions import ResidualMeans, winsorize
from abliterate.errors import AbliterateError
from abliterate.model.loader import LoadedModel
from abliterate.model.residuals import capture_last, capture_residuals, stream_residuals
from support.models import FAMILIES, PROMPTS, make_chat, make_loaded, make_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def capture(loaded: LoadedModel, batch_size: int = 1, **options: object) -> Tensor:
    """Residuals of the three prompts."""
    return capture_residuals(loaded.model, loaded.layers, make_chat(), PROMPTS, batch_size=batch_size, **options)  # type: ignore[arg-type]


@torch.no_grad()
def hidden_states(loaded: LoadedModel) -> Tensor:
    """The model's own hidden states at the last position, each prompt alone: (n_prompts, n_layers+1, d_model)."""
    rows = []
    for prompt in PROMPTS:
        states = loaded.model(**make_chat().encode([prompt]), output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_hidden_states(family: str) -> None:
    loaded = make_loaded(make_model(family))
    found, expected = capture(loaded), hidden_states(loaded)
    assert found.shape == expected.shape == (3, 4, 32)
    torch.testing.assert_close(found[:, :-1], expected[:, :-1], **CLOSE)
    # transformers gives the last one after the final norm
    norm = loaded.model.get_submodule(FAMILIES[family][2])
    torch.testing.assert_close(norm(found[:, -1]), expected[:, -1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_do_not_depend_on_batch_or_padding(family: str) -> None:
    loaded = make_loaded(make_model(family))
    alone = capture(loaded, batch_size=1)
    torch.testing.assert_close(capture(loaded, batch_size=3), alone, **CLOSE)
    torch.testing.assert_close(capture(loaded, batch_size=2), alone, **CLOSE)


def test_amp_within_tolerance() -> None:
    loaded = make_loaded(make_model("llama"))
    exact, rough = capture(loaded), capture(loaded, amp=True)
    assert rough.dtype == torch.float32
    error = (rough - exact).norm(dim=-1) / exact.norm(dim=-1)
    # bfloat16 has 8 bits; three layers of rounding stay below 3 %
    assert 0 < float(error.max()) < 0.03


@pytest.mark.parametrize("options", [{"clear_every": 1}, {"clear_every": 2}, {"offload": False}, {"offload": True}])
def test_memory_options_give_equal_values(options: dict[str, object]) -> None:
    loaded = make_loaded(make_model("llama"))
    assert torch.equal(capture(loaded, **options), capture(loaded))


def test_clear_every_clears(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("abliterate.model.residuals.clear_device_cache", lambda device: calls.append(1))
    capture(make_loaded(make_model("llama")), clear_every=2)
    assert len(calls) == 1  # three batches, after the second


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_raises(value: float) -> None:
    loaded = make_loaded(make_model("llama"))
    with torch.no_grad():
        loaded.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(AbliterateError, match="overflow"):
        capture(loaded)
    means = ResidualMeans()
    with pytest.raises(AbliterateError, match="overflow"):
        stream(loaded, means.add)
    assert means.count == 0


def stream(loaded: LoadedModel, take: Any, batch_size: int = 1, **options: object) -> None:
    """The three prompts' residuals, batch by batch."""
    stream_residuals(loaded.model, loaded.layers, make_chat(), PROMPTS, take, batch_size=batch_size, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantile", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_streamed_means_are_those_of_all_residuals(family: str, batch_size: int, quantile: float) -> None:
    loaded = make_loaded(make_model(family))
    streamed, together = ResidualMeans(quantile), ResidualMeans(quantile)
    stream(loaded, streamed.add, batch_size)
    full = capture(loaded, batch_size)
    together.add(full)
    assert streamed.count == together.count == len(PROMPTS)
    assert torch.equal(streamed.mean(), together.mean()), "however they are cut, prompts are added one after the other"
    assert streamed.mean().dtype == torch.float64
    alone = winsorize(capture(loaded, batch_size=1), quantile).double().mean(dim=0)
    torch.testing.assert_close(streamed.mean(), alone, rtol=0, atol=1e-6)


def test_streamed_residuals_are_not_kept() -> None:
    loaded = make_loaded(make_model("llama"))
    means = ResidualMeans()
    seen: list[weakref.ref[Tensor]] = []

    def take(batch: Tensor) -> None:
        assert batch.shape == (1, 4, 32)
        assert not any(ref() is not None for ref in seen[:-1]), "an earlier batch is still there"
        seen.append(weakref.ref(batch))
        means.add(batch)

    stream(loaded, take)
    assert len(seen) == 3
    assert not any(ref() is not None for ref in seen)


def test_streaming_survives_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded(make_model("llama"))
    expected, found = ResidualMeans(), ResidualMeans()
    stream(loaded, expected.add)
    limit_memory(loaded, monkeypatch, 1)
    stream(loaded, found.add, batch_size=3)
    assert found.count == 3, "no prompt twice"
    assert torch.equal(found.mean(), expected.mean())


def test_there_is_no_mean_of_nothing() -> None:
    with pytest.raises(ValueError, match="no residuals"):
        ResidualMeans().mean()


def test_hooks_are_gone_afterwards() -> None:
    loaded = make_loaded(make_model("llama"))
    capture(loaded)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in loaded.layers)


def test_progress_counts_prompts() -> None:
    seen: list[tuple[int, int]] = []
    capture(make_loaded(make_model("llama")), batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def limit_memory(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make passes of more than `most` prompts run out of memory; returns the batch sizes tried."""
    sizes: list[int] = []
    real = type(loaded.model).forward

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(type(loaded.model), "forward", forward)
    return sizes


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded(make_model("llama"))
    expected = capture(loaded, batch_size=1)
    sizes = limit_memory(loaded, monkeypatch, 1)
    inside: list[bool] = []
    monkeypatch.setattr(
        "abliterate.model.memory.clear_device_cache", lambda device: inside.append(sys.exc_info()[0] is not None)
    )
    seen: list[int] = []
    found = capture(loaded, batch_size=3, progress=lambda done, total: seen.append(done))
    assert torch.equal(found, expected)
    assert sizes == [3, 1, 1, 1]
    assert seen == [1, 2, 3]
    assert inside == [False]  # within the `except` block the traceback keeps the batch's tensors alive
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in loaded.layers)


def test_out_of_memory_for_one_prompt_ends_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = make_loaded(make_model("llama"))
    limit_memory(loaded, monkeypatch, 0)
    with pytest.raises(AbliterateError, match="single prompt; try"):
        capture(loaded, batch_size=3)


def test_captured_states_are_copies() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    layers = nn.ModuleList([InPlace(), InPlace()])
    out: list[Tensor | None] = [None] * 3
    x = torch.zeros(2, 5, 4)
    with capture_last(layers, out):
        layers[1](layers[0](x))
    for index, state in enumerate(out):
        assert state is not None
        assert torch.equal(state, torch.full((2, 4), float(index)))
        assert state.untyped_storage().nbytes() == 2 * 4 * 4
