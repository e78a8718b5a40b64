"""scripts/methods_page.py: medians and worst seeds by method, and lines that later ones join."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import methods_page


def line(seed: int, kl: float | None, *assigned: str) -> dict[str, Any]:
    heldout = {
        "unchanged": {"share": 0.5 + seed / 10},
        "kl": {"mean": 0.02},
        "kl_answers": {"mean": 0.003},
        "unanswered": {"candidate": {"count": {"share": 0.05}}},
    }
    best = None if kl is None else {"kl": kl}
    return {
        "model": "toy",
        "seed": seed,
        "set": list(assigned),
        "trials": 60,
        "refined": False,
        "best": {"0.03": best},
        "heldout": heldout if best else None,
        "selected": {"kl": 0.2, "heldout": heldout} if best and not assigned else None,
        "ready": {"tokens": 1_000_000},
        "tokens": 3_000_000,
        "points": [1, 2, 3],
    }


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The edit mode full comes first; a seed without such a trial is the worst, without a figure; new lines join old ones."""
    out = tmp_path / "methods.md"
    spoiled = line(3, 0.001) | {"spoil": 0.1}  # by bad targets; it is left out
    batches = [[line(seed, kl) for seed, kl in enumerate((0.01, 0.02, 0.04))], [line(0, 0.5, "a.b=c"), line(1, None, "a.b=c")]]
    batches[1].append(spoiled)
    for index, lines in enumerate(batches):
        given = tmp_path / f"{index}.jsonl"
        given.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["methods_page.py", str(given), "--out", str(out)])
        methods_page.main()
    rows = [row for row in out.read_text(encoding="utf-8").splitlines() if row.startswith("| ")][1:]
    *rows, heads, selected = rows
    assert heads.startswith("| selected | seeds | KL | unanswered |")
    figures = "3 | 0.20000 (0.20000) | 5% (5%) | 0.02000 (0.02000) | 0.00300 (0.00300) | 60% (50%)"
    assert selected == f"| edit.mode=full | {figures} |"
    assert rows == [
        "| edit.mode=full | 3 of 3 | 0.02000 (0.04000) | 5% (5%) | 0.02000 (0.02000) | 0.00300 (0.00300) | 3.00 |",
        "| edit.mode=full, a.b=c | 1 of 2 | 0.50000 (–) | 5% (–) | 0.02000 (–) | 0.00300 (–) | 3.00 |",
    ]
    stored = [json.loads(one) for one in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(stored) == 5
    assert all("points" not in one for one in stored)
