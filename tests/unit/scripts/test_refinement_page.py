"""scripts/refinement_page.py: which lines and points are kept, and what the table compares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import refinement_page
from refinement_page import compact, identity, rounded


def point(kl: float, refusals: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {"kl": kl, "refusals": refusals, "state": "complete", "tokens": tokens} | more


def line(points: list[dict[str, Any]], **given: Any) -> dict[str, Any]:
    """A course on 100 prompts; its first trial began after 100 tokens."""
    best = min((p for p in points if p["refusals"] <= 3), key=lambda p: p["kl"], default=None)
    fixed = {"model": "toy", "seed": 0, "prompts": 100, "ready": {"tokens": 100}, "tokens": points[-1]["tokens"]}
    return fixed | {"points": points, "best": {"0.03": best and best | {"good": 97}}} | given


SEARCH = line([point(0.5, 0, 200), point(0.1, 50, 300), point(0.2, 3, 400), point(0.3, 0, 1100)], trials=4, refined=False)
REFINED = line([point(0.4, 90, 200), point(0.02, 1, 600, beta=2.0), point(0.05, 0, 1600, beta=1.0)], trials=1, refined=True)


def test_only_points_that_say_something_are_kept() -> None:
    """Those that are better than all before them among trials that refuse little, and all refined ones."""
    assert [p["kl"] for p in compact(SEARCH)["points"]] == [0.5, 0.2]
    assert [p["kl"] for p in compact(REFINED)["points"]] == [0.02, 0.05]
    assert rounded({"a": [0.123456789, 3]}) == {"a": [0.123457, 3]}


def test_a_later_line_of_the_same_course_counts() -> None:
    again = {**SEARCH, "set": ["cache_dir=/elsewhere"], "day": "2026-11-30"}
    assert identity(again) == identity(SEARCH)
    assert identity({**SEARCH, "apart": True}) != identity(SEARCH)
    assert identity({**SEARCH, "set": ["refine.batch=16"]}) != identity(SEARCH)
    assert identity({**SEARCH, "set": ["edit.mode=full"]}) == identity(SEARCH), "which was the default without a name"
    assert identity({**SEARCH, "set": ["edit.mode=none"]}) != identity(SEARCH)


def test_the_page_compares_with_the_search_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search in which nothing was shared costs more, and isn't what the others are compared with; new lines join old ones."""
    apart = line([point(0.2, 0, 9100)], trials=4, refined=False, apart=True)
    out = tmp_path / "page.md"
    for lines in ([SEARCH, apart], [REFINED]):
        given = tmp_path / "lines.jsonl"
        given.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["refinement_page.py", str(given), "--out", str(out)])
        refinement_page.main()
    rows = [row.split(" | ") for row in out.read_text(encoding="utf-8").splitlines() if row.startswith("| ")][1:]
    names = ["4 trials: edit.mode=full", "4 trials: edit.mode=full, nothing shared", "1 trials, refined: edit.mode=full"]
    assert [row[0] for row in rows] == [f"| {name}" for name in names]
    # 0.02 beside 0.2, which was reached with the search's 1000 tokens, too; 500 of them until then.
    assert rows[2][5:] == ["0.10 (0.10 to 0.10)", "0.10 (0.10 to 0.10)", "50% (50% to 50%) |"]
    assert len(out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()) == 3
