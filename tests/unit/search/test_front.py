"""The Pareto front, hypervolume, knee and selection rules: by hand, and against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abliterate.errors import AbliterateError, InputError
from abliterate.search.front import hypervolume, knee, pareto_front
from abliterate.search.selection import parse_rule
from abliterate.types import Baseline, Trial, TrialParams


def base_of(unanswered: int, prompts: int) -> Baseline:
    """A model that refuses half of the prompts which it leaves unanswered."""
    return Baseline(unanswered // 2, prompts, {}, {"count": unanswered})


BASE = base_of(95, 100)


def make(number: int, kl: float, unanswered: int, state: str = "complete") -> Trial:
    """Refusals rise where unanswered prompts fall, so a confusion of the two shows."""
    scores = {"kl": {"mean": kl}, "refusals": 200 - unanswered, "unanswered": {"count": unanswered}}
    scores = scores if state != "failed" else {}
    return Trial(number, TrialParams("global", 1.0, {}), state, scores)  # type: ignore[arg-type]


def trials(*points: tuple[float, int]) -> list[Trial]:
    return [make(number, kl, unanswered) for number, (kl, unanswered) in enumerate(points)]


def numbers(front: Sequence[Trial]) -> list[int]:
    return [trial.number for trial in front]


def brute_force(given_trials: Sequence[Trial], baseline: Baseline) -> set[int]:
    """By definition (docs/design.md §4): not weakly dominated by the baseline or another; of equal ones the lowest number."""

    def dominated(trial: Trial, other: Trial) -> bool:
        if (trial.kl, trial.unanswered) == (other.kl, other.unanswered):
            return other.number < trial.number
        return other.kl <= trial.kl and other.unanswered <= trial.unanswered

    complete = [trial for trial in given_trials if trial.state == "complete"]
    return {
        trial.number
        for trial in complete
        if trial.unanswered < baseline.value("unanswered")
        and not any(dominated(trial, other) for other in complete if other is not trial)
    }


def test_front_by_hand() -> None:
    found = pareto_front(trials((0.5, 10), (0.1, 50), (0.2, 60), (0.3, 30), (0.6, 10)), BASE)
    assert numbers(found) == [1, 3, 0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_equal_trials_the_lowest_number_stays(order: tuple[int, ...]) -> None:
    same = [make(number, 0.2, 40) for number in order]
    assert numbers(pareto_front(same, BASE)) == [0]


def test_the_baseline_dominates_what_answers_as_rarely() -> None:
    assert pareto_front(trials((0.0, 95), (0.1, 95), (0.1, 96)), BASE) == ()
    assert numbers(pareto_front(trials((0.1, 95), (0.4, 94)), BASE)) == [1]


def test_nothing_beats_a_baseline_that_answers_everything() -> None:
    assert pareto_front(trials((0.0, 0), (0.1, 0)), base_of(0, 100)) == ()


def test_stopped_and_failed_trials_are_neither_on_the_front_nor_dominate() -> None:
    mixed = [make(0, 0.01, 5, "stopped"), make(1, 0.0, 0, "failed"), make(2, 0.2, 40)]
    assert numbers(pareto_front(mixed, BASE)) == [2]


def test_no_trials_no_front() -> None:
    assert pareto_front([], BASE) == ()


POINTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.01, 0.1, 0.1 + 1e-12, 0.5, 2.0]), st.integers(0, 8), st.sampled_from(["complete", "stopped"])
    ),
    max_size=12,
)


@given(POINTS, st.integers(0, 8), st.randoms())
@settings(max_examples=300, deadline=None)
def test_front_equals_brute_force(points: list[tuple[float, int, str]], base: int, random) -> None:  # type: ignore[no-untyped-def]
    baseline = base_of(base, 8)
    given_trials = [make(number, *point) for number, point in enumerate(points)]
    random.shuffle(given_trials)
    found = pareto_front(given_trials, baseline)
    assert set(numbers(found)) == brute_force(given_trials, baseline)
    assert [trial.kl for trial in found] == sorted(trial.kl for trial in found)


def test_hypervolume_by_hand() -> None:
    # From KL 0 on the baseline's 5 %, from 0.1 on 45 % more, from 0.3 on 20 % more.
    front = pareto_front(trials((0.1, 50), (0.3, 30)), BASE)
    assert hypervolume(front, BASE) == pytest.approx(0.05 + 0.9 * 0.45 + 0.7 * 0.2)


def test_hypervolume_at_its_ends() -> None:
    assert hypervolume((), base_of(100, 100)) == 0.0
    assert hypervolume((), base_of(0, 100)) == 1.0
    assert hypervolume(trials((0.0, 0)), BASE) == pytest.approx(1.0)
    assert hypervolume(trials((1.0, 0), (5.0, 0)), BASE) == pytest.approx(0.05)


@given(POINTS, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_hypervolume_equals_counted_area(points: list[tuple[float, int, str]], base: int) -> None:
    """Against a sum over cells between all distinct KLs, each as high as the best trial to its left."""
    baseline = base_of(base, 8)
    given_trials = [make(number, *point) for number, point in enumerate(points)]
    complete = [(0.0, base / 8)] + [(t.kl, t.unanswered / 8) for t in given_trials if t.state == "complete"]
    edges = sorted({kl for kl, _ in complete if kl < 1} | {1.0})
    area = sum(
        (high - low) * (1 - min(share for kl, share in complete if kl <= low)) for low, high in itertools.pairwise(edges)
    )
    assert hypervolume(pareto_front(given_trials, baseline), baseline) == pytest.approx(area)


def test_knee_by_hand() -> None:
    # Scaled: (0, 1), (0.1, 0.25), (0.5, 0.125), (1, 0): below the chord by 0, 0.65, 0.375, 0.
    front = pareto_front(trials((0.0, 90), (0.1, 30), (0.5, 20), (1.0, 10)), BASE)
    assert knee(front).number == 1


def test_knee_of_small_fronts() -> None:
    assert knee(trials((0.2, 40))).number == 0
    assert knee(trials((0.2, 40), (0.4, 30))).number == 0


def test_knee_doesnt_depend_on_scale() -> None:
    points = [(0.0, 80), (0.2, 40), (0.3, 10), (1.0, 0)]
    wide = [(kl * 1000, refusals) for kl, refusals in points]
    assert knee(trials(*points)).number == knee(trials(*wide)).number == 2


FRONT = pareto_front(trials((0.02, 80), (0.05, 40), (0.09, 25), (0.3, 5)), BASE)


@pytest.mark.parametrize(
    ("rule", "number"),
    [
        ("auto", 2),
        ("knee", 2),
        ("trial:3", 3),
        ("trial: 0", 0),
        ("kl<=0.05", 1),
        ("kl <= 0.0899", 1),
        ("kl<=.3", 3),
        ("kl<=5e-2", 1),
        ("KL <= 5E-2", 1),
        ("kl<=5.e-2", 1),
        ("kl<=3.e+2", 3),
        ("kl<=1.", 3),
        ("kl<=1", 3),
        ("unanswered<=40", 1),
        ("unanswered <= 39", 2),
        ("Unanswered<=5", 3),
        ("refusals<=120", 0),
        ("refusals<=199", 0),
    ],
)
def test_rules_by_hand(rule: str, number: int) -> None:
    assert parse_rule(rule)(FRONT).number == number
    assert parse_rule(rule).preview(FRONT) is FRONT[number]


def test_auto_uses_its_limit_and_falls_back_to_the_knee() -> None:
    assert parse_rule("auto", 0.04)(FRONT).number == 0
    assert parse_rule("auto", 0.3)(FRONT).number == 3
    assert parse_rule("auto", 0.001)(FRONT).number == knee(FRONT).number == 2


@pytest.mark.parametrize("rule", ["trial:7", "kl<=0.01", "refusals<=4", "unanswered<=4"])
def test_rules_that_nothing_satisfies(rule: str) -> None:
    with pytest.raises(AbliterateError, match="No trial on the front") as caught:
        parse_rule(rule)(FRONT)
    assert caught.value.exit_code == 1
    assert parse_rule(rule).preview(FRONT) is None


def test_preview_of_an_empty_front() -> None:
    assert parse_rule("auto").preview(()) is None


@pytest.mark.parametrize(
    "rule",
    ["", "best", "trial:", "trial:-1", "trial:x", "kl<0.1", "kl<=", "kl<=-1", "refusals<=0.5", "unanswered<=-1", "kl<=nan"],
)
def test_what_is_not_a_rule(rule: str) -> None:
    with pytest.raises(InputError, match="not a rule") as caught:
        parse_rule(rule)
    assert caught.value.exit_code == 2
