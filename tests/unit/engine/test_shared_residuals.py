"""Residuals of prompts whose common beginning is fed once are those of plain passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from abliterate.engine.shared_residuals import difference, shared_feed
from abliterate.model.loader import LoadedModel
from abliterate.model.residuals import Feed, capture_residuals
from abliterate.types import Prompt
from support.models import make_chat, make_loaded, make_model

WORDS = ("cats", "dogs", "birds", "fish", "trees", "rocks", "rain", "snow", "cars", "boats", "trains", "planes")
PROMPTS = tuple(Prompt(f"Tell me about {'the ' * count}{word}", "Answer well.") for word in WORDS for count in range(3))


def feed_of(loaded: LoadedModel, prompts: tuple[Prompt, ...] = PROMPTS) -> Feed | None:
    """The shared way to feed these prompts, if there is one."""
    return shared_feed(loaded.model, loaded.layers, make_chat(), prompts)


def residuals(loaded: LoadedModel, feed: Feed | None, batch_size: int) -> torch.Tensor:
    """The residuals of all prompts."""
    return capture_residuals(loaded.model, loaded.layers, make_chat(), PROMPTS, batch_size=batch_size, feed=feed)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_are_those_of_plain_passes(family: str) -> None:
    loaded = make_loaded(make_model(family).double())
    feed = feed_of(loaded)
    assert feed is not None
    plain = residuals(loaded, None, 36)
    for batch_size in (1, 7, 36):
        torch.testing.assert_close(residuals(loaded, feed, batch_size), plain, rtol=1e-6, atol=1e-6)  # float32 is kept


def test_the_beginning_is_fed_once() -> None:
    loaded, chat = make_loaded(make_model("llama")), make_chat()
    feed = feed_of(loaded)
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    loaded.model.register_forward_pre_hook(note, with_kwargs=True)
    residuals(loaded, feed, 18)
    rows = [chat.token_ids(prompt) for prompt in PROMPTS]
    shared = next(index for index, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
    longest = max(map(len, rows)) - shared
    assert shapes == [(18, longest), (18, longest)] or shapes == [(1, shared), (18, longest), (18, longest)]


def test_few_prompts_are_fed_plainly() -> None:
    assert feed_of(make_loaded(make_model("llama")), PROMPTS[:3]) is None


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_caches_that_pads_would_change_are_left_alone(family: str) -> None:
    assert feed_of(make_loaded(make_model(family))) is None


def test_rounding_in_bfloat16_is_no_mistake() -> None:
    loaded = make_loaded(make_model("llama").bfloat16())
    feed = feed_of(loaded)
    assert feed is not None
    assert 0 < difference(residuals(loaded, None, 36), residuals(loaded, feed, 36)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_answers_otherwise_after_a_cache_is_fed_plainly(dtype: torch.dtype) -> None:
    loaded = make_loaded(make_model("llama").to(dtype))

    def shift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cached = (cache := kwargs.get("past_key_values")) is not None and cache.get_seq_length() > 0
        return args, kwargs | {"position_ids": kwargs["position_ids"] + 7 * cached}

    loaded.model.register_forward_pre_hook(shift, with_kwargs=True)
    assert feed_of(loaded) is None


def test_a_model_that_fails_with_a_cache_is_fed_plainly() -> None:
    loaded = make_loaded(make_model("llama"))

    def fail(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("use_cache"):
            raise AttributeError("no cache here")

    loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert feed_of(loaded) is None
    assert residuals(loaded, None, 36).isfinite().all()


def test_difference_is_relative_and_of_the_worst_layer() -> None:
    expected = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
    assert difference(expected, expected + torch.tensor([[[0.0, 0.5], [0.0, 0.5]]])) == pytest.approx(0.1)
    assert difference(expected, expected * torch.nan) == float("inf")
