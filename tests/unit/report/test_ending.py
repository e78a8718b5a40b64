"""The end of a run names commands that can be typed as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.artifacts.result import Result
from abliterate.report.ending import ending, next_lines, summary
from abliterate.report.refined import wider_text, wider_trial
from abliterate.types import RefinedParams, Trial, TrialState
from support.reports import made_run


@pytest.mark.parametrize(("model", "told"), [("demo", "demo"), ("owner/name", "owner/name"), ("local-folder", "BASE")])
def test_the_base_is_named_where_its_name_is_enough(tmp_path: Path, model: str, told: str) -> None:
    result = Result.read(made_run(tmp_path / "run", count=4))
    assert result.model is not None
    result = result.model_copy(update={"model": result.model.model_copy(update={"id": model})})
    assert any(f"abliterate evaluate {told} runs/mine " in line for line in next_lines(result, "runs/mine"))


def refined(number: int, weaker: float | None, *, unanswered: int, kl: float, state: TrialState = "complete") -> Trial:
    validation = {} if weaker is None else {"weaker": weaker, "margin": 0.15, "prompts": 40}
    params = RefinedParams({"one": 0.5}, "refined/1.safetensors", "0" * 64, {"validation": validation})
    scores = {"refusals": 0, "kl": {"mean": kl, "median": kl, "max": kl}, "unanswered": {"count": unanswered}}
    return Trial(number, params, state, scores)


def test_a_narrow_fit_is_said_beside_a_trial_that_keeps_a_margin(tmp_path: Path) -> None:
    narrow, plain = refined(14, 0.125, unanswered=1, kl=0.001), refined(17, 0.075, unanswered=4, kl=0.003)
    wide = refined(10, 0.025, unanswered=3, kl=0.0098)
    others = [
        refined(11, 0.0, unanswered=3, kl=0.02),  # of more KL
        refined(12, 0.0, unanswered=4, kl=0.001),  # leaves too many of 40 unanswered
        refined(13, 0.0, unanswered=0, kl=0.001, state="stopped"),
        refined(15, None, unanswered=0, kl=0.001),
    ]
    trials = [narrow, plain, wide, *others]
    assert wider_text(narrow, trials, 40, lambda trial: f"export {trial.number}") == (
        "trial 14 is a narrow fit, which may refuse prompts of other kinds; trial 10 keeps a margin (15 % weaker: 1 of 40 "
        "refused) at a KL of 0.0098: export 10"
    )
    assert wider_trial(wide, trials, 40) is None, "it keeps one itself"
    assert wider_trial(others[-1], trials, 40) is None, "nothing is known of it"
    assert wider_trial(narrow, [narrow, plain], 40) is None
    run = Result.read(made_run(tmp_path / "run", count=4))
    assert run.baseline is not None
    numbered = run.model_copy(update={"trials": [narrow, wide], "selected": 14, "front": [14]})
    assert any(
        "abliterate export runs/mine --trial 10" in str(part) for part in ending(numbered, "runs/mine", front_shown=True)
    )


def test_an_earlier_sessions_export_isnt_called_the_selected_trials(tmp_path: Path) -> None:
    result = Result.read(made_run(tmp_path / "run", count=4))
    assert result.selected is not None
    for trial, said in ((result.selected, "exported (merged): runs/mine/model"), (77, "exported (merged of trial 77): runs")):
        export = result.export.model_copy(update={"kind": "merged", "trial": trial, "path": "model", "verified": True})
        found = summary(result.model_copy(update={"export": export}), "runs/mine")
        assert any(isinstance(part, str) and part.startswith(said) for part in found)
