"""A model that is sharded over two processes gives the numbers and texts of the same model in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import ranks, sharded
from support.models import make_model, save_model


@pytest.mark.parametrize("families", [("llama_biased", "qwen3_moe"), pytest.param(("qwen3",), marks=pytest.mark.slow)])
def test_two_ranks_compute_what_one_process_computes(families: tuple[str, ...], tmp_path: Path) -> None:
    for family in families:
        save_model(make_model(family), tmp_path / family)
    ranks.finish(ranks.start(sharded.compare, [str(tmp_path), families], tmp_path))
