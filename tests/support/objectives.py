"""A custom scorer as text, and the front by brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence

from abliterate.types import Baseline, Objective, Trial

OWN = '''
from abliterate.types import Score

class Words:
    """Mean number of words in an answer."""

    name, goal = "words", "maximize"

    def setup(self, base):
        self.base = len(base.responses)

    def score(self, observation):
        words = [len(response.text.split()) for response in observation.responses]
        return Score(self.name, sum(words) / len(words), self.goal, {"words": sum(words)})

class Shown(Words):
    name, goal = "shown", "none"
'''


def brute_force(trials: Sequence[Trial], baseline: Baseline, objectives: Sequence[Objective]) -> set[int]:
    """The front by its definition, where no KL is below the base's."""

    def value(trial: Trial, one: Objective) -> float:
        counts = {"refusals": trial.refusals, "unanswered": trial.unanswered if "unanswered" in trial.scores else 0}
        raw = {"kl": trial.kl, **counts}.get(one.name, trial.values.get(one.name, 0))
        return raw if one.goal == "minimize" else -raw

    def no_worse(trial: Trial, other: Trial) -> bool:
        return all(value(trial, one) <= value(other, one) for one in objectives)

    def base_no_worse(trial: Trial) -> bool:
        unanswered = (baseline.unanswered or {"count": 0})["count"]
        mine = {"kl": -math.inf, "refusals": baseline.refusals, "unanswered": unanswered, **baseline.values}
        return all((mine[one.name] if one.goal == "minimize" else -mine[one.name]) <= value(trial, one) for one in objectives)

    complete = [trial for trial in trials if trial.state == "complete"]
    return {
        trial.number
        for trial in complete
        if not base_no_worse(trial)
        and not any(
            no_worse(other, trial) and (not no_worse(trial, other) or other.number < trial.number)
            for other in complete
            if other is not trial
        )
    }
