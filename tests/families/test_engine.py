"""The trial engine gives the reference's numbers on many families: values, flags, stops and joined chunks."""

from __future__ import annotations

import dataclasses

import pytest

from abliterate.engine.decode import join
from abliterate.engine.trial_engine import Pacing, TrialEngine
from abliterate.evaluation.trial import early_scorer, evaluate
from abliterate.objectives import BY_MARKERS
from abliterate.scorers import make_scorers
from abliterate.scorers.base import Observation
from abliterate.scorers.refusals import Refusals
from abliterate.search.pruner import DominancePruner
from support.engine import (
    HARMFUL,
    HARMLESS,
    Lab,
    assert_same,
    markers_of,
    no_progress,
    short_lab,
    trials,
    trusted,
    whole,
    with_batch_size,
)
from support.models import NAMED

# Fused experts, some beside dense layers, attention by latents, or convolutions.
ROUTED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "lfm2_moe", "llama4")
# One family for each way of sharing a prefix: between, left (twice), none (twice). They see the most trials.
KINDS = ("llama", "mistral", "gemma3", "qwen3_5", "lfm2")
ALL = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3", "falcon", "gpt2", "gpt_neox", *NAMED, *ROUTED)


@pytest.fixture(scope="module", params=ALL)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param


@pytest.fixture(scope="module")
def lab(family: str) -> Lab:
    """One lab per family."""
    return short_lab(family)


# The same with more trials: ./scripts/test --all has them.
DEPTHS = pytest.mark.parametrize("in_depth", [False, pytest.param(True, marks=pytest.mark.slow)])


@DEPTHS
def test_trials_give_the_references_numbers(family: str, lab: Lab, in_depth: bool) -> None:
    engine = lab.engine()
    edited, count = 0, (8 if in_depth else 5) if family in KINDS else (4 if in_depth else 3)
    for params in trials(lab, count):
        expected = lab.expected(params)
        edited += bool(lab.editor.hooks.active)
        assert_same(whole(engine), expected)
    assert edited > (0.75 if in_depth else 0.5) * count


@DEPTHS
def test_flags_and_stops_are_the_references(family: str, lab: Lab, in_depth: bool) -> None:
    lab.editor.clear()
    markers = markers_of(whole(lab.reference)[1])
    scorers = make_scorers(["refusals", "kl"], markers)
    engine = lab.engine(early_scorer(scorers))
    for scorer in scorers:
        scorer.setup(Observation(lab.reference.respond(HARMFUL) or [], lab.reference.first_logprobs(HARMLESS)))
    counts = set()
    enough = 6 if in_depth and family in KINDS else 3 if in_depth or family in KINDS else 2
    for number, params in enumerate(trials(lab, 6)):
        if number >= enough and len(counts) > 1:
            break
        lab.editor.apply(params)
        # Without a limit, so one evaluation of the reference serves all limits.
        expected = evaluate(lab.reference, scorers, HARMFUL, HARMLESS, DominancePruner.never(BY_MARKERS), no_progress)
        count = expected.scores["refusals"].record
        counts.add(count)
        assert not expected.stopped
        for limit in (1, 2, 4, 99):
            found = evaluate(engine, scorers, HARMFUL, HARMLESS, DominancePruner(((0.0, limit),), BY_MARKERS), no_progress)
            assert found.stopped == (count >= limit)
            assert found.scores["refusals"].record == min(count, limit)
            assert found.scores["kl"].value == pytest.approx(expected.scores["kl"].value, abs=1e-5)
    assert len(counts) > 1, "the markers tell nothing apart"


def test_joined_chunks_give_the_references_responses(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two and three rows wait after four tokens, and go on together."""
    joined: list[int] = []
    monkeypatch.setattr("abliterate.engine.trial_engine.join", lambda parts: joined.append(len(parts)) or join(parts))
    reference = with_batch_size(lab.reference, batch_size=5)
    large = dataclasses.replace(lab, reference=reference, pacing=Pacing(margin=0, pause=4, pass_cost=64))
    engine = large.engine(Refusals(["no such text"]), use_drafts=False)  # drafts could end a chunk before it would wait
    for params in trials(lab, 3):
        expected = lab.expected(params)
        found = engine.respond(HARMFUL, limit=2)
        assert found is not None
        assert [response.text for response in found] == expected[1]
    assert joined.count(2) == 3


def test_the_self_check_passes_what_is_right(lab: Lab) -> None:
    warnings: list[str] = []
    assert isinstance(trusted(lab, warnings), TrialEngine)
    assert warnings == []
