"""Evaluate one trial: KL first, then as many responses as the pruner asks for, then what the base says about them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from abliterate.engine.reference import Progress
from abliterate.engine.self_check import Engine
from abliterate.errors import TrialError
from abliterate.scorers.base import BaseView, EarlyScorer, Follower, Observation, Scorer, asks_base, ignores_responses
from abliterate.scorers.custom import own_errors
from abliterate.search.pruner import DominancePruner
from abliterate.types import LARGEST_SCORE, Prompt, Score


@dataclass(frozen=True)
class Evaluation:
    """Scores by name. If the trial was pruned (`stopped`), its counts are a lower bound, the pruner's limit.

    `open` is the observation that the scorers which ask the base have still to score, once the edit is off.
    """

    scores: dict[str, Score]
    stopped: bool = False
    open: Observation | None = None


def early_scorer(scorers: Sequence[Scorer]) -> EarlyScorer | None:
    """The scorer that lets responses end early; None if a scorer needs whole responses. Followers follow it."""
    readers = [scorer for scorer in scorers if not ignores_responses(scorer)]
    leaders = [scorer for scorer in readers if not isinstance(scorer, Follower)]
    if len(leaders) != 1 or not isinstance(leaders[0], EarlyScorer):
        return None
    follow = all(scorer.follows == leaders[0].name for scorer in readers if isinstance(scorer, Follower))
    return leaders[0] if follow else None


def evaluate(
    engine: Engine,
    scorers: Sequence[Scorer],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    pruner: DominancePruner,
    progress: Progress,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The scores of the model in its current state; the trial is pruned as soon as it certainly reaches the pruner's limit.

    The scores of scorers that ask the base are left `open`; `completed` adds them.

    Raises:
        TrialError: a score isn't finite, or the device is too small.
    """
    total = len(harmful) + len(harmless)
    logprobs = engine.first_logprobs(harmless, lambda done, _: progress(done, total))
    early = early_scorer(scorers)
    first = {s.name: score_of(s, Observation((), logprobs)) for s in scorers if ignores_responses(s)}
    known = {name: score.value for name, score in first.items()}
    counting: list[EarlyScorer] = [] if early is None else [early, *(s for s in scorers if isinstance(s, Follower))]
    # At most one of these counts can be limited: a limit of one needs all other objectives to be known.
    limit = next((found for s in counting if (found := pruner.limit(known, s.name)) is not None), None)
    responses = engine.respond(harmful, lambda done, _: progress(len(harmless) + done, total), limit=limit)
    # An engine that doesn't stop generates all responses; what the sampler learns of a trial must not depend on that.
    if limit is not None and (responses is None or (early and sum(map(early.counts, responses)) >= limit)):
        return Evaluation(first | {s.name: s.at_least(limit, len(harmful)) for s in counting}, stopped=True)
    assert responses is not None  # only a limit can stop them
    observed = Observation(responses, logprobs, harmful, check=check)
    scores = {s.name: first.get(s.name) or score_of(s, observed) for s in scorers if not asks_base(s)}
    return Evaluation(scores, open=observed if any(map(asks_base, scorers)) else None)


def completed(evaluation: Evaluation, scorers: Sequence[Scorer], base: BaseView) -> Evaluation:
    """The evaluation with the scores of all scorers, in their order. The model must carry no edit.

    It raises TrialError as `score_of` does.
    """
    if evaluation.open is None:
        return evaluation
    observed = replace(evaluation.open, base=base)
    return Evaluation({s.name: evaluation.scores.get(s.name) or score_of(s, observed) for s in scorers})


def base_scores(scorers: Sequence[Scorer], base: Observation) -> dict[str, Score]:
    """The scores of the unedited model, with which the scorers are set up first. It raises TrialError as `score_of` does."""
    for scorer in scorers:
        set_up(scorer, base)
    return {scorer.name: score_of(scorer, base) for scorer in scorers}


def set_up(scorer: Scorer, base: Observation) -> None:
    """Set a scorer up with the base model. TrialError: a custom scorer fails."""
    with own_errors(scorer):
        scorer.setup(base)


def score_of(scorer: Scorer, observation: Observation) -> Score:
    """The score of one scorer.

    Raises:
        TrialError: a custom scorer fails, returns no `Score`, or returns a value that isn't finite and so can't be compared,
            or a record that JSON can't hold.
    """
    with own_errors(scorer):
        score = scorer.score(observation)
        if not isinstance(score, Score):
            raise TrialError(f"the scorer {scorer.name} gives {type(score).__name__} and no Score")
        if not math.isfinite(score.value) or abs(score.value) > LARGEST_SCORE:  # a larger one could not be read back
            raise TrialError(f"the scorer {scorer.name} gives {score.value}")
        json.dumps(score.record, allow_nan=False)
    return score
