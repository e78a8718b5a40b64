"""One evaluation: KL first, then as many responses as the certificate asks for. Knows neither edits nor Optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from abliterate.engine.reference import Progress
from abliterate.engine.self_check import Engine
from abliterate.errors import TrialError
from abliterate.scorers.base import EarlyScorer, Observation, Scorer, ignores_responses
from abliterate.scorers.custom import own_errors
from abliterate.search.pruner import DominancePruner
from abliterate.types import Prompt, Score


@dataclass(frozen=True)
class Evaluation:
    """Scores by name. Where `stopped`, refusals are a lower bound: the certificate's limit."""

    scores: dict[str, Score]
    stopped: bool = False


def early_scorer(scorers: Sequence[Scorer]) -> EarlyScorer | None:
    """The scorer that lets responses end early; None where another one needs them whole."""
    readers = [scorer for scorer in scorers if not ignores_responses(scorer)]
    return readers[0] if len(readers) == 1 and isinstance(readers[0], EarlyScorer) else None


def evaluate(
    engine: Engine,
    scorers: Sequence[Scorer],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    certificate: DominancePruner,
    progress: Progress,
) -> Evaluation:
    """Scores of the model as it is now. Stopped as soon as it is certain that the certificate's limit is reached.

    Raises:
        TrialError: a score isn't finite, or the device is too small.
    """
    total = len(harmful) + len(harmless)
    logprobs = engine.first_logprobs(harmless, lambda done, _: progress(done, total))
    early = early_scorer(scorers)
    first = {s.name: score_of(s, Observation((), logprobs)) for s in scorers if ignores_responses(s)}
    known = {name: score.value for name, score in first.items()}
    limit = certificate.limit(known, early.name) if early is not None else None
    responses = engine.respond(harmful, lambda done, _: progress(len(harmless) + done, total), limit=limit)
    if responses is None:
        assert early is not None
        assert limit is not None
        return Evaluation(first | {early.name: early.at_least(limit, len(harmful))}, stopped=True)
    observed = Observation(responses, logprobs, harmful)
    return Evaluation({s.name: first.get(s.name) or score_of(s, observed) for s in scorers})


def base_scores(scorers: Sequence[Scorer], base: Observation) -> dict[str, Score]:
    """Scores of the unedited model, which the scorers are set up with first. TrialError as `score_of`."""
    for scorer in scorers:
        set_up(scorer, base)
    return {scorer.name: score_of(scorer, base) for scorer in scorers}


def set_up(scorer: Scorer, base: Observation) -> None:
    """TrialError where a user's own scorer fails."""
    with own_errors(scorer):
        scorer.setup(base)


def score_of(scorer: Scorer, observation: Observation) -> Score:
    """One score.

    Raises:
        TrialError: a user's own scorer fails, or gives no `Score`, or one whose value is no finite number, which nothing could
            be compared with, or whose record JSON can't hold.
    """
    with own_errors(scorer):
        found = scorer.score(observation)
        if not isinstance(found, Score):
            raise TrialError(f"the scorer {scorer.name} gives {type(found).__name__} and no Score")
        if not math.isfinite(found.value):
            raise TrialError(f"the scorer {scorer.name} gives {found.value}")
        json.dumps(found.record, allow_nan=False)
    return found
