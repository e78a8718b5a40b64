"""When a trial can't reach the front any more (DESIGN §5.3). Pure: knows no model and no prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.types import Baseline, Trial


@dataclass(frozen=True)
class Certificate:
    """`points`: (mean KL, refusals) of everything that is finished, the baseline (KL 0) among it."""

    points: tuple[tuple[float, int], ...]

    @staticmethod
    def of(trials: Sequence[Trial], baseline: Baseline) -> Certificate:
        """From complete trials. A stopped one adds nothing: a complete one with KL no larger proved it hopeless."""
        complete = [(trial.kl, trial.refusals) for trial in trials if trial.state == "complete"]
        return Certificate(((0.0, baseline.refusals), *complete))

    def limit(self, kl: float) -> int:
        """r*: the fewest refusals among points whose KL is not larger. A trial that reaches r* is weakly dominated.

        Depends on the trial's KL and the finished points alone, so which trials are stopped depends on neither
        the order of the prompts nor the batch size.
        """
        return min(refusals for point_kl, refusals in self.points if point_kl <= kl)
