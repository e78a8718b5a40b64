"""The shapes of known models have as many parameters as their publishers say, and what fits is told right."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import memory_table as table

PUBLISHED = {  # billions
    "Llama-3.1-8B": 8.03,
    "Llama-3.3-70B": 70.55,
    "Qwen3-0.6B": 0.60,
    "Qwen3-4B": 4.02,
    "Qwen3-8B": 8.19,
    "Qwen3-14B": 14.77,
    "Qwen3-32B": 32.76,
    "Qwen3-30B-A3B": 30.53,
    "Gemma-3-12B": 11.77,
    "gpt-oss-20b": 20.91,
}


def test_every_shape_has_a_published_size() -> None:
    assert table.shapes().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-30B-A3B", "Gemma-3-12B", "gpt-oss-20b"])
def test_a_shape_is_its_models(name: str) -> None:
    record = table.record_of(table.shapes()[name])
    assert record["model"]["n_parameters"] / 1e9 == pytest.approx(PUBLISHED[name], abs=0.006)
    assert record["coverage"]["share"] == 1
    refinement = record["memory"]["refinement"]
    assert 0 < refinement["checkpointed"] < refinement["row"]


def record(weights: float, path: str = "mlp.down_proj") -> dict[str, Any]:
    memory = {
        "weights_bytes": weights,
        "kept_bytes": 1e9,
        "operations": {"decode": {"bytes_per_prompt": 100e6}},
        "refinement": {"row": 2e9, "checkpointed": 2e8},
    }
    return {"memory": memory, "coverage": {"groups": [{"path": path}]}, "whole_bytes": 0.1 * weights}


@pytest.mark.parametrize(
    ("weights", "path", "card", "expected"),
    [
        (10e9, "mlp.down_proj", 24, "100"),
        (19e9, "mlp.down_proj", 24, "16"),
        (20.45e9, "mlp.down_proj", 24, "1, not refined"),
        (39.9e9, "mlp.down_proj", 24, "73 in 4 bits"),
        (40e9, "mlp.experts", 24, "2 cards"),
        (140e9, "mlp.down_proj", 24, "7 cards"),
    ],
)
def test_what_fits_on_a_card(weights: float, path: str, card: int, expected: str) -> None:
    assert table.remedy(record(weights, path), card) == expected
