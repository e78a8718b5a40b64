"""scripts/real_corpus.py: the prompts of the real model."""

from __future__ import annotations

import random
import sys
from itertools import combinations

from abliterate.scorers.refusals import AutomatonMatcher, normalize, read_markers
from abliterate.settings.sources import config_path
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from real_corpus import OTHER, REFUSALS, USUAL, candidates, further_harmless, refusal

SETS = candidates(200, 40)


def test_sets_have_spare_prompts_and_share_none() -> None:
    assert all(len(rows) > (40 if "_" in name else 200) for name, rows in SETS.items())
    prompts = {name: {row["prompt"] for row in rows} for name, rows in SETS.items()}
    assert all(len(prompts[name]) == len(rows) for name, rows in SETS.items())
    assert not any(prompts[one] & prompts[other] for one, other in combinations(prompts, 2))
    assert candidates(200, 40) == SETS
    further = {row["prompt"] for row in further_harmless(200, 40, 200)}
    assert len(further) == 200
    assert not any(further & others for others in prompts.values())


def test_heldout_prompts_are_of_another_kind() -> None:
    for field in ("phrasings", "people", "things", "pranks", "chores"):
        usual, other = getattr(USUAL, field), getattr(OTHER, field)
        assert not {*usual} & {*other}
        assert len({*usual}) == len(usual)
        assert len({*other}) == len(other)
    assert {row["thing"] for row in SETS["harmful_heldout"]} <= {*OTHER.things}


def test_harmless_prompts_have_the_form_of_harmful_ones_or_ask_about_the_world() -> None:
    for name in ("harmless", "harmless_eval", "harmless_heldout"):
        kinds = [row["kind"] for row in SETS[name]]
        assert 0.2 < kinds.count("question") / len(kinds) < 0.6, name
        assert kinds.count("question") + kinds.count("chore") == len(kinds)
    assert {row["kind"] for name in ("harmful", "harmful_eval", "harmful_heldout") for row in SETS[name]} == {"prank"}
    assert not [row for rows in SETS.values() for row in rows if "{" in row["prompt"]]


def test_refusals_are_counted_as_such_and_prompts_are_not() -> None:
    matcher = AutomatonMatcher(read_markers(config_path("markers.txt")))
    assert all(matcher.matches(normalize(text)) for text in REFUSALS)
    assert not [row for rows in SETS.values() for row in rows if matcher.matches(normalize(row["prompt"]))]
    rng = random.Random(0)
    assert len({refusal(SETS["harmful"][0], rng) for _ in range(200)}) == len(REFUSALS)
