"""One forward pass: under whichever name the installed transformers takes the cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from abliterate.engine.forward import accepted, feed


class Renamed:
    def forward(self, input_ids: Tensor, attention_mask: Tensor, cache: Any = None, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3), cache=cache or "new")

    __call__ = forward


class Older:
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, use_cache: bool = True
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 3), past_key_values=past_key_values or "new")

    __call__ = forward


@pytest.mark.parametrize("model", [Renamed(), Older()])
def test_the_cache_goes_by_the_name_that_the_model_takes(model: Any) -> None:
    ids, given = torch.zeros(1, 2, dtype=torch.long), SimpleNamespace()
    assert feed(model, accepted(model), ids, torch.ones_like(ids), None)[1] == "new"
    assert feed(model, accepted(model), ids, torch.ones_like(ids), given)[1] is given  # type: ignore[arg-type]
