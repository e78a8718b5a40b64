"""Objectives: any scorers, any number, minimized or maximized. Front, hypervolume, rules, stops, and what Optuna is told."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from abliterate.artifacts.result import Result
from abliterate.errors import AbliterateError, InputError
from abliterate.objectives import (
    BY_MARKERS,
    DEFAULT,
    base_vector,
    counted,
    in_words,
    ordered,
    other_names,
    primary_objective,
    public,
    reported_values,
    split,
    to_records,
    vector,
)
from abliterate.scorers import make_objectives, make_scorers
from abliterate.search.front import hypervolume, knee, no_front, pareto_front, progress, volume
from abliterate.search.pruner import DominancePruner
from abliterate.search.selection import SelectionRule, parse_rule
from abliterate.search.space import Space
from abliterate.search.study import Study, open_study
from abliterate.settings.schema import EvaluationSettings, SearchSettings, Settings
from abliterate.types import Baseline, Objective, Trial, TrialParams
from support.objectives import OWN, brute_force

KL, REFUSALS = BY_MARKERS
UNANSWERED = DEFAULT[1]
WORDS, LENGTH = Objective("words", "maximize"), Objective("length", "minimize")
SETS = (
    (KL,),
    (REFUSALS,),
    (WORDS,),
    DEFAULT,
    BY_MARKERS,
    (KL, WORDS),
    (REFUSALS, WORDS),
    (KL, UNANSWERED, REFUSALS),
    (KL, REFUSALS, WORDS),
    (KL, REFUSALS, WORDS, LENGTH),
)
BASE = Baseline(8, 10, {"words": 2.0, "length": 0.0}, {"count": 9})


def make(number: int, kl: float, refusals: int, words: float = 0.0, length: float = 0.0, state: str = "complete") -> Trial:
    values = {"words": words, "length": length}
    unanswered = {"count": min(10, refusals + int(words) + int(length))}  # in another order than refusals
    scores = {"kl": {"mean": kl}, "refusals": refusals, "unanswered": unanswered}
    return Trial(number, TrialParams("global", 1.0, {}), state, scores, values=values)  # type: ignore[arg-type]


def numbers(front: Sequence[Trial]) -> list[int]:
    return [trial.number for trial in front]


POINTS = st.lists(
    st.tuples(
        st.sampled_from([-1e-9, 0.0, 0.01, 0.1, 0.1 + 1e-12, 0.5, 2.0]),
        st.integers(0, 9),
        st.sampled_from([0.0, 1.5, 2.0, 3.0]),
        st.sampled_from([0.0, 1.0, 2.0]),
        st.sampled_from(["complete", "complete", "stopped"]),
    ),
    max_size=14,
)


def trials_of(points: Sequence[tuple[float, int, float, float, str]]) -> list[Trial]:
    return [make(number, *point) for number, point in enumerate(points)]


# Names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("kl", ("kl", "")),
        ("kl:maximize", ("kl", "maximize")),
        ("a/b.py:Words", ("a/b.py:Words", "")),
        ("a/b.py:Words:minimize", ("a/b.py:Words", "minimize")),
        ("C:\\x\\b.py:Words:maximize", ("C:\\x\\b.py:Words", "maximize")),
        ("b.py:minimize", ("b.py:minimize", "")),  # a class of that name
        ("kl:up", ("kl:up", "")),
        (":maximize", (":maximize", "")),
    ],
)
def test_an_objective_is_a_name_and_perhaps_a_goal(text: str, parts: tuple[str, str]) -> None:
    assert split(text) == parts


def test_names_are_shown_without_folders() -> None:
    assert public("/home/me/mine.py:Words:maximize") == "mine.py:Words:maximize"
    assert public("refusals") == "refusals"


def test_kl_comes_first_in_whatever_order_objectives_are_given() -> None:
    for order in itertools.permutations((KL, UNANSWERED)):
        assert ordered(order) == DEFAULT
    assert ordered((WORDS, REFUSALS, KL)) == (KL, WORDS, REFUSALS)
    assert Result().objectives_or_default() == DEFAULT
    assert Result.model_construct(trials=[make(0, 0.1, 3)]).objectives_or_default() == BY_MARKERS  # of an old file
    for objectives in (DEFAULT, BY_MARKERS, (KL, WORDS)):
        record = {**Result().to_record(), "objectives": to_records(objectives)}
        assert Result.model_validate(record).objectives_or_default() == objectives
    assert in_words((KL, WORDS)) == "kl (minimized), words (maximized)"
    assert other_names(["b", "kl", "a", "words", "unanswered", "refusals"], (KL, WORDS)) == ["words", "a", "b"]


def test_the_lead_is_unanswered_then_refusals_then_what_isnt_kl() -> None:
    assert primary_objective(DEFAULT) == primary_objective((REFUSALS, WORDS, UNANSWERED)) == UNANSWERED
    assert primary_objective(BY_MARKERS) == primary_objective((KL, WORDS, REFUSALS)) == REFUSALS
    assert primary_objective((KL, REFUSALS, UNANSWERED), without="unanswered") == REFUSALS
    assert [counted(objectives) for objectives in (DEFAULT, BY_MARKERS, (KL, WORDS), (UNANSWERED, KL))] == [
        "unanswered",
        "refusals",
        "",
        "",  # `ordered` puts KL first
    ]
    assert primary_objective((KL, WORDS, LENGTH)) == WORDS
    assert primary_objective((KL,)) == primary_objective((KL,), without="kl") == KL
    assert primary_objective((KL, REFUSALS, WORDS), without="refusals") == WORDS


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(OWN, encoding="utf-8")
    return str(path)


def found(own: str, *texts: str) -> tuple[Objective, ...]:
    texts = tuple(text.format(own=own) for text in texts)
    names = tuple(dict.fromkeys(("refusals", "kl", *(split(text)[0] for text in texts))))
    return make_objectives(texts, names, make_scorers(names, ["no"]))


def test_goals_are_the_scorers_own_unless_said(own: str) -> None:
    assert found(own, "{own}:Words", "refusals", "kl") == (KL, WORDS, REFUSALS)
    assert found(own, "{own}:Words:minimize", "kl:maximize") == (Objective("kl", "maximize"), Objective("words", "minimize"))
    assert found(own, "{own}:Shown:maximize") == (Objective("shown", "maximize"),)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("{own}:Shown",), "'shown' doesn't say which values are better; give --objective mine.py:Shown:minimize"),
        (("unfinished_thinking",), "--objective unfinished_thinking:minimize or"),
        (("kl", "kl:maximize"), "'kl' is given twice"),
        (("words",), "no scorer 'words'"),
        (("kl:up",), "NAME, NAME:minimize or NAME:maximize"),
    ],
)
def test_what_is_no_objective(own: str, texts: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        found(own, *texts)


def test_what_is_always_measured_needs_no_naming() -> None:
    evaluation, search = EvaluationSettings(scorers=("unfinished_thinking",)), SearchSettings(objectives=("kl:maximize",))
    assert Settings().scorers == ("refusals", "kl", "unanswered")
    assert Settings(search=SearchSettings(objectives=("refusals", "kl"))).scorers == ("refusals", "kl")
    assert Settings(evaluation=evaluation, search=search).scorers == ("unfinished_thinking", "kl", "refusals")


# The front


@given(POINTS, st.sampled_from(SETS), st.randoms())
@settings(max_examples=400, deadline=None)
def test_the_front_equals_brute_force(points: Any, objectives: tuple[Objective, ...], shuffle: random.Random) -> None:
    trials = trials_of(points)
    shuffle.shuffle(trials)
    assert set(numbers(pareto_front(trials, BASE, objectives))) == brute_force(trials, BASE, objectives)


def front_of_two(trials: Sequence[Trial], baseline: Baseline) -> tuple[Trial, ...]:
    """The front as it was computed when there were two objectives."""
    front: list[Trial] = []
    fewest = baseline.refusals
    complete = [trial for trial in trials if trial.state == "complete"]
    for trial in sorted(complete, key=lambda trial: (trial.kl, trial.refusals, trial.number)):
        if trial.refusals < fewest:
            front.append(trial)
            fewest = trial.refusals
    return tuple(front)


def knee_of_two(front: Sequence[Trial]) -> Trial:
    first, last = front[0], front[-1]
    kl_range = (last.kl - first.kl) or 1.0
    refusal_range = (first.refusals - last.refusals) or 1

    def below_chord(trial: Trial) -> float:
        return 1 - (trial.kl - first.kl) / kl_range - (trial.refusals - last.refusals) / refusal_range

    return max(front, key=lambda trial: (below_chord(trial), -trial.number))


@given(
    st.lists(st.tuples(st.floats(-1e-8, 3), st.integers(0, 9), st.just(0.0), st.just(0.0), st.just("complete")), max_size=20)
    | POINTS,
    st.randoms(),
    st.floats(0, 2),
    st.integers(0, 9),
)
@settings(max_examples=400, deadline=None)
def test_refusals_and_kl_give_what_they_always_gave(points: Any, shuffle: random.Random, kl: float, count: int) -> None:
    trials = trials_of(points)
    shuffle.shuffle(trials)
    front = pareto_front(trials, BASE, BY_MARKERS)
    assert front == front_of_two(trials, BASE)
    if not front:
        return
    assert knee(front, BY_MARKERS) == knee_of_two(front)
    near = [trial for trial in front if trial.kl <= kl]

    def rule(text: str) -> SelectionRule:
        return parse_rule(text, kl, BY_MARKERS)

    assert rule("auto")(front) == (near[-1] if near else knee_of_two(front))
    assert rule(f"kl<={kl:f}").preview(front) == next((t for t in reversed(front) if t.kl <= float(f"{kl:f}")), None)
    assert rule(f"refusals<={count}").preview(front) == next((t for t in front if t.refusals <= count), None)


def test_a_single_objective_has_a_front_of_one() -> None:
    trials = [make(0, 0.3, 1, 3.0), make(1, 0.1, 5, 4.0), make(2, 0.2, 0, 4.0)]
    assert numbers(pareto_front(trials, BASE, (WORDS,))) == [1]
    assert numbers(pareto_front(trials, BASE, (REFUSALS,))) == [2]
    assert pareto_front(trials, BASE, (KL,)) == ()  # nothing is nearer to the base than it is itself
    assert knee(trials[:1], (WORDS,)).number == 0


def test_the_sentence_where_nothing_is_better() -> None:
    assert no_front(BASE, BY_MARKERS).startswith("No trial refuses fewer than the model itself (8 of 10);")
    assert no_front(BASE, DEFAULT).startswith("No trial leaves fewer prompts unanswered than the model itself (9 of 10);")
    said = no_front(BASE, (KL, WORDS))
    assert "kl (minimized), words (maximized) (it has kl 0, words 2)" in said


def test_knee_of_three_by_hand() -> None:
    # Scaled sums (less is better): 0 + 1 + 1, 1 + 0 + 1, 1 + 1 + 0, 0.2 + 0.3 + 0.5.
    trials = [make(0, 0.0, 10, 0.0), make(1, 1.0, 0, 0.0), make(2, 1.0, 10, 10.0), make(3, 0.2, 3, 5.0)]
    assert knee(trials, (KL, REFUSALS, WORDS)).number == 3


# Rules


RULED = [make(0, 0.02, 7, 9.0), make(1, 0.05, 4, 5.0), make(2, 0.09, 2, 3.0), make(3, 0.3, 0, 1.0), make(4, 0.3, 6, 20.0)]


@pytest.mark.parametrize(
    ("rule", "objectives", "number"),
    [
        ("auto", (KL, REFUSALS, WORDS), 2),
        ("auto", (KL, WORDS), 0),
        ("auto", (WORDS,), 0),
        ("auto", (KL,), 0),
        ("kl<=0.06", (KL, WORDS), 0),
        ("kl<=0.06", (KL, REFUSALS, WORDS), 1),
        ("kl<=1", (KL, WORDS), 4),
        ("refusals<=4", (KL, REFUSALS, WORDS), 1),
        ("words>=5", (KL, REFUSALS, WORDS), 1),
        ("words >= 6.5", (KL, REFUSALS, WORDS), 4),
        ("words<=4", (KL, REFUSALS, WORDS), 3),
        (" kl <= 0.06 ", (KL, WORDS), 0),
        ("trial : 4", (KL, WORDS), 4),
        ("words>=3", (KL, WORDS), 0),
        ("words>=3", (WORDS,), 4),
        ("words>=-1e1", (KL, REFUSALS), 3),
        ("trial:4", (KL, WORDS), 4),
    ],
)
def test_rules(rule: str, objectives: tuple[Objective, ...], number: int) -> None:
    for order in (RULED, RULED[::-1]):
        assert parse_rule(rule, 0.1, objectives)(order).number == number


def test_a_rule_names_its_scorer() -> None:
    assert parse_rule("Words>=1").scorer == "Words"
    assert parse_rule(" my words >= 1 ").scorer == "my words"
    assert parse_rule("my words>=1").scorer == "my words"
    assert parse_rule("a >= b <= -1e1").scorer == "a >= b"
    spaced = [make(0, 0.02, 7), make(1, 0.05, 4)]
    values = [dataclasses.replace(trial, values={**trial.values, "my words": 1.0 + trial.number}) for trial in spaced]
    assert parse_rule("my words >= 2")(values).number == 1
    assert parse_rule("kl<=1").scorer == parse_rule("auto").scorer == ""
    with pytest.raises(AbliterateError, match="No trial on the front"):
        parse_rule("nothing>=1")(RULED)


@pytest.mark.parametrize("rule", ["kl>=1", "refusals>=1", "words>3", "words>=", "words>=x", ">=3", "words=3"])
def test_what_is_no_rule(rule: str) -> None:
    with pytest.raises(InputError, match="not a rule"):
        parse_rule(rule)


# The hypervolume


@given(st.integers(1, 4), st.data())
@settings(max_examples=150, deadline=None)
def test_the_volume_is_optunas(dimensions: int, data: st.DataObject) -> None:
    import numpy as np

    coordinate = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.5]) | st.floats(0, 1.2)
    points = data.draw(st.lists(st.tuples(*[coordinate] * dimensions), min_size=1, max_size=9))
    reference = (1.0,) * dimensions
    inside = [point for point in points if all(value <= 1 for value in point)]
    expected = compute_hypervolume(np.array(inside), np.array(reference)) if inside else 0.0
    assert volume(points, reference) == pytest.approx(expected, abs=1e-12)


def test_the_volume_is_the_share_of_random_points_that_are_dominated() -> None:
    draw = random.Random(3)
    points = [tuple(draw.random() for _ in range(3)) for _ in range(12)]
    thrown = [tuple(draw.random() for _ in range(3)) for _ in range(40_000)]
    share = sum(any(all(a <= b for a, b in zip(point, one, strict=True)) for point in points) for one in thrown) / len(thrown)
    assert volume(points, (1.0,) * 3) == pytest.approx(share, abs=0.01)


@given(POINTS, st.sampled_from(SETS))
@settings(max_examples=150, deadline=None)
def test_progress_ends_at_the_volume_of_everything(points: Any, objectives: tuple[Objective, ...]) -> None:
    trials = trials_of(points)
    found = progress(trials, BASE, objectives)
    assert len(found) == len(trials)
    assert all(before <= after + 1e-12 for before, after in itertools.pairwise(found))
    if not trials:
        return
    if counted(objectives):
        fronts = [pareto_front(trials[:count], BASE, objectives) for count in range(1, len(trials) + 1)]
        assert found == [hypervolume(front, BASE, objectives) for front in fronts]
        return
    costs = [base_vector(BASE, objectives), *(vector(t, objectives) for t in trials if t.state == "complete")]
    lows, highs = [min(axis) for axis in zip(*costs, strict=True)], [max(axis) for axis in zip(*costs, strict=True)]
    scaled = [
        tuple((value - low) / ((high - low) or 1) for value, low, high in zip(cost, lows, highs, strict=True)) for cost in costs
    ]
    assert found[-1] == pytest.approx(volume(scaled, (1.0,) * len(objectives)), abs=1e-9)


def test_a_long_search_with_four_objectives_has_its_progress_soon() -> None:
    draw = random.Random(0)
    trials = [make(n, draw.random(), draw.randrange(10), draw.random(), draw.random()) for n in range(200)]
    found = progress(trials, BASE, (KL, REFUSALS, WORDS, LENGTH))
    assert 0 < found[0] < found[-1] <= 1


# Stops


@given(
    st.integers(0, 10_000),
    st.sampled_from([BY_MARKERS, (KL, REFUSALS, WORDS), (REFUSALS, WORDS), (KL, REFUSALS, WORDS, LENGTH)]),
)
@settings(max_examples=200, deadline=None)
def test_the_front_with_stops_is_the_one_without(seed: int, objectives: tuple[Objective, ...]) -> None:
    """Refusals come last and one by one; all else is known without responses."""
    draw = random.Random(seed)
    whole = [
        make(n, draw.choice([0.1, 0.2, 0.4]), draw.randrange(10), draw.choice([1.0, 2.0, 3.0]), draw.choice([0.0, 1.0]))
        for n in range(15)
    ]
    kept: list[Trial] = []
    for trial in whole:
        known = {"kl": trial.kl, **trial.values}
        limit = DominancePruner.of(kept, BASE, objectives).limit(known, "refusals")
        if limit is not None and trial.refusals >= limit:
            trial = dataclasses.replace(trial, state="stopped", scores={**trial.scores, "refusals": limit})
        kept.append(trial)
    assert numbers(pareto_front(kept, BASE, objectives)) == numbers(pareto_front(whole, BASE, objectives))
    # No more could have been stopped: whatever isn't dominated by then is complete.
    for place, trial in enumerate(kept):
        dominated = place not in numbers(pareto_front(whole[: place + 1], BASE, objectives))
        assert (trial.state == "stopped") == dominated


@given(st.integers(0, 10_000), st.sampled_from([DEFAULT, (KL, UNANSWERED, WORDS)]))
@settings(max_examples=200, deadline=None)
def test_confirmed_refusals_stop_a_search_for_answers(seed: int, objectives: tuple[Objective, ...]) -> None:
    """Unanswered prompts are counted for survivors only; refusals, which they include, stop trials, and the front stays."""
    draw = random.Random(seed)
    whole = [make(n, draw.choice([0.1, 0.2, 0.4]), draw.randrange(10), draw.choice([0.0, 1.0, 3.0])) for n in range(15)]
    kept: list[Trial] = []
    for trial in whole:
        limit = DominancePruner.of(kept, BASE, objectives).limit({"kl": trial.kl, **trial.values}, "unanswered")
        if limit is not None and trial.refusals >= limit:
            bounds = {**trial.scores, "refusals": limit, "unanswered": {"count": limit}}
            trial = dataclasses.replace(trial, state="stopped", scores=bounds)
        kept.append(trial)
    assert numbers(pareto_front(kept, BASE, objectives)) == numbers(pareto_front(whole, BASE, objectives))
    assert all(before.unanswered >= after.unanswered for before, after in zip(whole, kept, strict=True))


def test_when_nothing_can_be_said() -> None:
    done = [make(0, 0.1, 3, 5.0)]
    assert DominancePruner.of(done, BASE, BY_MARKERS).limit({"kl": 0.2}, "refusals") == 3
    assert DominancePruner.of(done, BASE, BY_MARKERS).limit({"kl": 0.05}, "refusals") == 8
    assert DominancePruner.of(done, BASE).limit({"kl": 0.2}, "unanswered") == 8
    assert DominancePruner.of(done, BASE).limit({"kl": 0.05}, "unanswered") == 9
    assert DominancePruner.of(done, BASE).limit({"kl": 0.2}, "refusals") is None  # they aren't minimized
    assert DominancePruner.of(done, BASE, (KL, UNANSWERED, REFUSALS)).limit({"kl": 0.2}, "unanswered") is None
    three = DominancePruner.of(done, BASE, (KL, REFUSALS, WORDS))
    assert three.limit({"kl": 0.2, "words": 5.0}, "refusals") == 3
    assert three.limit({"kl": 0.2, "words": 5.5}, "refusals") is None  # better than both in words
    assert three.limit({"kl": 0.2, "words": 1.5}, "refusals") == 3
    assert three.limit({"kl": 0.05, "words": 1.5}, "refusals") == 8
    assert three.limit({"kl": 0.2}, "refusals") is None  # words need whole responses
    assert DominancePruner.of(done, BASE, (KL, WORDS)).limit({"kl": 0.2, "words": 1.0}, "refusals") is None
    assert DominancePruner.of(done, BASE, (KL, Objective("refusals", "maximize"))).limit({"kl": 0.2}, "refusals") is None
    assert DominancePruner.never().limit({"kl": 9.0}, "refusals") is None


# What Optuna is told


def study(folder: Path, objectives: tuple[Objective, ...]) -> Study:
    space = Space(SearchSettings(trials=10, startup_trials=3, ei_candidates=8), 12, ("attn.o_proj",), objectives)
    return open_study("", folder / "study.journal", space, 0)


@pytest.mark.parametrize(
    ("objectives", "values"),
    [
        (DEFAULT, [0.25, 0.5]),  # 6 refusals and 4 other prompts of 20
        (BY_MARKERS, [0.25, 0.3]),
        ((WORDS,), [4.5]),
        ((KL, WORDS, REFUSALS), [0.25, 4.5, 0.3]),
    ],
)
def test_the_sampler_is_told_the_objectives_in_their_order(
    tmp_path: Path, objectives: tuple[Objective, ...], values: list[float]
) -> None:
    mine = study(tmp_path, objectives)
    asked = mine.ask()
    assert asked is not None
    trial = dataclasses.replace(make(0, 0.25, 6, 4.5), params=asked.params)
    assert reported_values(trial, objectives, 20) == values
    assert mine.tell(asked, trial, 20)
    kept = mine._study.trials[0]
    assert kept.values == values
    assert [direction.name.lower() for direction in mine._study.directions] == [one.goal for one in objectives]
    assert mine.trials() == (trial,)


def test_a_maximized_objective_draws_the_sampler_upwards(tmp_path: Path) -> None:
    """A single objective, told by the direction index: suggestions go where it is large, or small."""
    means = {}
    for goal in ("minimize", "maximize"):
        folder = tmp_path / goal
        folder.mkdir()
        one = (Objective("words", goal),)  # type: ignore[arg-type]
        mine = study(folder, one)
        for _ in range(25):
            asked = mine.ask()
            assert asked is not None
            mine.tell(
                asked, dataclasses.replace(make(asked.number, 0.1, 1, asked.params.direction_index), params=asked.params), 20
            )
        late = [trial.params.direction_index for trial in mine.trials()[12:]]
        means[goal] = sum(late) / len(late)
    assert means["maximize"] > means["minimize"] + 1


def test_records_come_back() -> None:
    trial = make(3, 0.5, 4, 2.0)
    assert Trial.from_record(trial.to_record()) == trial
    assert (trial.unanswered, trial.value("unanswered"), trial.value("refusals")) == (6, 6.0, 4.0)
    assert Baseline.from_record(BASE.to_record()) == BASE
    assert BASE.value("unanswered") == 9.0
    assert "unanswered" not in Baseline(3, 5).to_record()
    with pytest.raises(KeyError):
        Baseline(3, 5).value("unanswered")
    for wrong in ({"count": -1}, {"broken": 1}, {"count": 3, "broken": 0.5}, [3]):
        record = {**trial.to_record(), "scores": {**trial.scores, "unanswered": wrong}}
        with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
            Trial.from_record(record)
