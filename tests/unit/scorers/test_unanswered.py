"""The scorer `unanswered`: kinds, bounds, and which responses the unedited model is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abliterate.evaluation.trial import completed, early_scorer, evaluate
from abliterate.objectives import BY_MARKERS, DEFAULT
from abliterate.scorers import Observation, Response, make_scorers
from abliterate.scorers.base import EarlyScorer, Follower
from abliterate.scorers.refusals import Refusals
from abliterate.scorers.unanswered import ALIKE, Unanswered, other_rows
from abliterate.scorers.yardstick import TELLING
from abliterate.search.pruner import DominancePruner
from abliterate.types import Objective, Prompt
from support.asked import END, MadeBase, yardstick

PROMPTS = [Prompt(text) for text in ("lamp", "kite", "drum", "vase", "boat")]


def scorer() -> Unanswered:
    return Unanswered(Refusals(("sorry",)))


def observed(base: MadeBase | None, *responses: Response) -> Observation:
    return Observation(responses, torch.empty(0), PROMPTS[: len(responses)], base)


def response(*ids: int, text: str = "fine") -> Response:
    return Response(text, ids=ids)


WORDS = tuple(range(10, 22))


def test_each_kind_is_counted() -> None:
    """A prompt makes the id of its own place likely; broken responses hold unlikely ids."""
    places = {prompt.text: place for place, prompt in enumerate(PROMPTS)}

    def logprob(prompt: Prompt, token: int) -> float:
        return -9.0 if token == 99 else -0.1 if token == 30 + places.get(prompt.text, 60) else -2.0 if token >= 30 else -1.0

    base = MadeBase(logprob, yardstick(surprise=3.0, topic=0.2, distinct=0.5))
    mixed = [
        response(*WORDS, text="I'm sorry"),
        response(*WORDS, 31, 31, 31, 31, END),  # of its own prompt
        response(*WORDS, 30, 30, 30, 30, END),  # of the first prompt
        response(*WORDS, *[99] * 12, END),
        response(*[10, 11] * 12, 34, 34, END),  # a loop, though of its own prompt
    ]
    score = scorer().score(observed(base, *mixed))
    assert score.record == {"count": 4, "refused": 1, "broken": 2, "off_topic": 1, "answered": 1}
    assert (score.value, score.goal) == (0.8, "minimize")
    assert scorer().kinds(observed(base, *mixed)) == ["refused", "answered", "off_topic", "broken", "broken"]


def test_the_base_is_shown_only_what_is_no_refusal() -> None:
    base = MadeBase()
    scorer().score(observed(base, response(*WORDS), response(7, text=" "), response(*WORDS, text="Sorry, no"), response(8, 9)))
    assert {ids for _, ids in base.asked} == {WORDS, (8, 9)}
    shown = [prompt for prompt, ids in base.asked if ids == WORDS]
    assert shown[0] == PROMPTS[0]
    assert len(shown) == len(set(shown)) == 1 + ALIKE
    long = MadeBase()
    scorer().score(observed(long, response(*range(10, 90)), response(*range(10, 20))))
    assert sorted(len(ids) for _, ids in long.asked) == [10, 10, TELLING, 80]  # the other prompt sees the beginning


def test_broken_responses_are_compared_with_no_other_prompt() -> None:
    base = MadeBase(bounds=yardstick(surprise=0.5))
    scorer().score(observed(base, response(*WORDS), response(*WORDS)))
    assert len(base.asked) == 2
    nothing = MadeBase()
    assert scorer().score(observed(nothing, response(1, text="sorry"), response(2, text="sorry"))).value == 1.0
    assert nothing.asked == []


def test_a_repeated_prompt_is_no_other_prompt() -> None:
    base = MadeBase()
    twice = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    one = scorer()
    one.score(replace(observed(base, *[response(*WORDS)] * 4), prompts=twice))
    shown = [prompt for prompt, ids in base.asked if ids == WORDS[:TELLING]]
    assert shown.count(PROMPTS[0]) == shown.count(PROMPTS[1]) == 4  # after its own two rows, and after those of the other
    alone = MadeBase()
    one.score(replace(observed(alone, *[response(*WORDS)] * 2), prompts=PROMPTS[:1] * 2))
    assert len(alone.asked) == 2


def test_a_single_prompt_has_no_others_to_be_compared_with() -> None:
    assert scorer().score(observed(MadeBase(), response(*WORDS, END))).record["answered"] == 1


TEXTS = st.lists(
    st.tuples(st.sampled_from(["sorry", "fine", ""]), st.lists(st.integers(0, 40), min_size=1, max_size=12)),
    min_size=1,
    max_size=5,
)


@given(TEXTS, st.floats(0.1, 4), st.floats(-2, 2))
@settings(max_examples=200, deadline=None)
def test_no_fewer_are_unanswered_than_refused(given_texts: Any, surprise: float, topic: float) -> None:
    """So confirmed refusals are a lower bound, and stopping by them is right."""
    base = MadeBase(lambda prompt, token: -((len(prompt.text) * 7 + token) % 5), yardstick(surprise=surprise, topic=topic))
    one = scorer()
    responses = [response(*ids, text=text) for text, ids in given_texts]
    record = one.score(observed(base, *responses)).record
    refused = sum(one.counts(each) for each in responses)
    assert refused == Refusals(("sorry",)).score(observed(base, *responses)).record == record["refused"] <= record["count"]
    assert one.at_least(refused, len(responses)).value <= record["count"] / len(responses)
    assert sum(record[kind] for kind in ("refused", "broken", "off_topic", "answered")) == len(responses)


@given(st.integers(1, 300), st.integers(0, 5), st.data())
@settings(max_examples=100, deadline=None)
def test_other_prompts_are_others_and_spread(total: int, wanted: int, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, total - 1))
    others = other_rows(row, total, wanted)
    assert len(others) == len(set(others)) == min(wanted, total - 1)
    assert row not in others
    assert all(0 <= other < total for other in others)


def test_it_needs_the_base_and_the_prompts() -> None:
    with pytest.raises(RuntimeError, match="needs the prompts and the unedited model"):
        scorer().score(observed(None, response(5)))
    with pytest.raises(RuntimeError, match="needs the prompts and the unedited model"):
        scorer().score(Observation([response(5)], torch.empty(0), (), MadeBase()))


# In a trial


class MadeEngine:
    """An engine that has seen these responses, and confirms refusals one by one."""

    def __init__(self, responses: Sequence[Response]) -> None:
        self.responses, self.limit = list(responses), None

    def first_logprobs(self, prompts: Sequence[Prompt], progress: Any) -> Tensor:
        return torch.log_softmax(torch.tensor([[1.0, 2.0], [0.0, 2.0]]), -1)

    def respond(self, prompts: Sequence[Prompt], progress: Any, *, limit: int | None) -> list[Response] | None:
        self.limit = limit
        refused = sum("sorry" in each.text for each in self.responses)
        return None if limit is not None and refused >= limit else self.responses


RESPONSES = [response(5, text="sorry"), response(6, text="sorry"), response(*WORDS), response(*WORDS[::-1])]


def trial(objectives: tuple[Objective, ...], points: tuple[tuple[float, int], ...], base: MadeBase, *names: str) -> Any:
    scorers = make_scorers(("refusals", "kl", *names), ["sorry"])
    engine, harmful = MadeEngine(RESPONSES), PROMPTS[: len(RESPONSES)]
    first = Observation([], engine.first_logprobs([], None))
    scorers[1].setup(first)
    found = evaluate(engine, scorers, harmful, PROMPTS[:2], DominancePruner(points, objectives), lambda done, total: None)
    assert not base.asked, "the edit is still on"
    return completed(found, scorers, base), engine


def test_confirmed_refusals_stop_a_trial_and_bound_both_counts() -> None:
    base = MadeBase()
    found, engine = trial(DEFAULT, ((0.0, 2),), base, "unanswered")
    assert (found.stopped, engine.limit) == (True, 2)
    assert {name: score.record for name, score in found.scores.items() if name != "kl"} == {
        "refusals": 2,
        "unanswered": {"count": 2},
    }
    assert base.asked == []


def test_a_survivor_is_shown_to_the_base_after_the_edit_is_off() -> None:
    base = MadeBase(bounds=yardstick(surprise=0.5))
    found, engine = trial(DEFAULT, ((0.0, 3),), base, "unanswered")
    assert (found.stopped, engine.limit) == (False, 3)
    assert list(found.scores) == ["refusals", "kl", "unanswered"]
    assert found.scores["unanswered"].record == {"count": 4, "refused": 2, "broken": 2, "off_topic": 0, "answered": 0}


def test_a_search_by_markers_never_asks_the_base() -> None:
    base = MadeBase()
    found, engine = trial(BY_MARKERS, ((0.0, 3),), base)
    assert (engine.limit, list(found.scores), base.asked) == (3, ["refusals", "kl"], [])
    found, engine = trial(BY_MARKERS, ((0.0, 2),), base, "unanswered")  # shown beside, and still stopped by refusals
    assert (found.stopped, engine.limit) == (True, 2)


def test_it_follows_the_scorer_of_refusals() -> None:
    refusals, kl, unanswered = make_scorers(("refusals", "kl", "unanswered"), ["sorry"])
    assert isinstance(unanswered, Follower)
    assert isinstance(unanswered, EarlyScorer)
    assert not isinstance(refusals, Follower)
    assert early_scorer([kl, unanswered, refusals]) is refusals
    assert early_scorer([kl, unanswered]) is None
    assert early_scorer(make_scorers(("refusals", "kl", "unanswered", "unfinished_thinking"), ["a"])) is None
