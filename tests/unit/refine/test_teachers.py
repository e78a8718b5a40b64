"""Teachers of refinement: the trials that answer most, and plain ablations."""

from __future__ import annotations

from abliterate.refine.teachers import BEST, best_trials, plain_edits
from abliterate.types import RefinedParams, Trial
from support.models import make_params


def trial(number: int, unanswered: int, kl: float, state: str = "complete", refusals: int = 0) -> Trial:
    scores = {"refusals": refusals, "kl": {"mean": kl}, "unanswered": {"count": unanswered}}
    return Trial(number, make_params(0), state, scores)  # type: ignore[arg-type]


def test_the_trials_with_the_most_answers_come_first() -> None:
    trials = [
        trial(0, 9, 0.1),
        trial(1, 2, 0.5),
        trial(2, 2, 0.4),
        trial(3, 0, 0.9, "stopped"),
        trial(4, 3, 0.1),
        trial(5, 50, 0.0),
        trial(6, 80, 0.0, refusals=80),
    ]
    assert [one.number for one in best_trials(trials)] == [2, 1, 4, 0]
    assert len(best_trials(trials)) == BEST


def test_a_run_without_the_scorer_goes_by_refusals() -> None:
    trials = [Trial(n, make_params(0), "complete", {"refusals": count, "kl": {"mean": 0.1}}) for n, count in enumerate((7, 3))]
    assert [one.number for one in best_trials(trials)] == [1, 0]


def test_refined_trials_are_no_teachers() -> None:
    refined = RefinedParams({"m": 1.0}, "refined/3.safetensors", "0" * 64, {})
    assert best_trials([Trial(3, refined, "complete", {"refusals": 0, "kl": {"mean": 0.0}})]) == []


def test_plain_edits_reach_the_upper_layers_of_both_components() -> None:
    n_layers, components = 12, ("attn.o_proj", "mlp.down_proj")
    found = plain_edits(n_layers, components)
    assert len({str(params.to_record()) for params in found}) == len(found) == 8
    for params in found:
        coeffs = {name: [params.kernels[name].coeff(layer) for layer in range(n_layers)] for name in components}
        assert coeffs["attn.o_proj"] == [0.0] * 4 + [1.0] * 8
        assert coeffs["mlp.down_proj"] in ([0.0] * 12, [0.0] * 4 + [1.0] * 8)
        assert 0 < params.direction_index < n_layers - 1
