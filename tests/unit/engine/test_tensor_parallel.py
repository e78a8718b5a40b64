"""A model that is sharded over two processes gives the numbers and texts of the same model in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import ranks, sharded
from support.models import make_model, save_model


@pytest.mark.parametrize(
    ("families", "mode"),
    [
        (("llama_biased", "qwen3_moe"), "full"),
        pytest.param(("qwen3",), "full", marks=pytest.mark.slow),
        pytest.param(("llama_biased", "qwen3_moe"), "columns", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_compute_what_one_process_computes(families: tuple[str, ...], mode: str, tmp_path: Path) -> None:
    for family in families:
        save_model(make_model(family), tmp_path / family)
    ranks.finish(ranks.start(sharded.compare, [str(tmp_path), families, mode], tmp_path))
