"""A model that is sharded over two processes gives the numbers and texts of the same model in one process."""

from __future__ import annotations

from pathlib import Path

from support import ranks, sharded
from support.models import make_model, save_model

FAMILIES = ("llama_biased", "qwen3", "qwen3_moe")


def test_two_ranks_compute_what_one_process_computes(tmp_path: Path) -> None:
    for family in FAMILIES:
        save_model(make_model(family), tmp_path / family)
    ranks.finish(ranks.start(sharded.compare, [str(tmp_path), FAMILIES], tmp_path))
