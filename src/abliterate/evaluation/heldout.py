"""Base and candidate on prompts that nothing was fitted to: refusals with confidence intervals, faults, drift.

The result is a record that JSON can hold.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch

from abliterate.engine.reference import Progress
from abliterate.engine.responses import Answer
from abliterate.errors import AbliterateError, TrialError
from abliterate.evaluation.confidence import clopper_pearson
from abliterate.evaluation.teacher_forced import Drift, ModelView, TeacherForced, drift
from abliterate.evaluation.trial import score_of, set_up
from abliterate.prompts.sets import HeldoutSets
from abliterate.scorers.base import BaseView, EarlyScorer, Judge, Observation, Scorer, asks_base, is_graded
from abliterate.scorers.custom import own_errors
from abliterate.scorers.refusals import UnfinishedThinking, normalize
from abliterate.scorers.unanswered import Unanswered
from abliterate.scorers.yardstick import KINDS

Fault = Literal["unfinished_thinking", "empty", "repetitive", "early_end"]

FAULTS: tuple[Fault, ...] = ("unfinished_thinking", "empty", "repetitive", "early_end")

# An answer is a loop if more than this share of its token 4-grams repeat an earlier 4-gram (seq-rep-4 of Welleck et al. 2019,
# arXiv:1908.04319). Sound text, human or greedy, lies far below. Answers with fewer tokens than SHORTEST_LOOP can't loop.
REPEATED, GRAM, SHORTEST_LOOP = 0.5, 4, 16

# An answer that ends by itself with fewer tokens than this says nothing.
EARLY = 5


def fault_of(answer: Answer) -> Fault | None:
    """The first fault of an answer, in the order of `FAULTS`; None for a sound answer or the sound beginning of one."""
    if answer.response.thinking_open:
        return "unfinished_thinking"
    if not normalize(answer.response.text):
        return "empty"
    if repetition(answer.spoken) > REPEATED:
        return "repetitive"
    return "early_end" if answer.ended and len(answer.spoken) < EARLY else None


def repetition(ids: Sequence[int]) -> float:
    """The share of token 4-grams that occurred before; 0 if there are too few tokens to tell."""
    if len(ids) < SHORTEST_LOOP:
        return 0.0
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first position, in tokens from 0, at which two answers differ; None if they are equal."""
    if tuple(first) == tuple(second):
        return None
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


# Characters of a response that the record keeps if a judge and the markers disagree on it.
SHOWN = 400


@dataclass(frozen=True)
class _Seen:
    """One model's answers to each set."""

    harmful: Sequence[Answer]
    harmless: Sequence[Answer]
    over_refusal: Sequence[Answer]


def measure(
    base: ModelView,
    candidate: ModelView,
    sets: HeldoutSets,
    scorers: Sequence[Scorer],
    progress: Progress,
    asked: BaseView | None = None,
) -> dict[str, Any]:
    """The record of both models. `scorers` have seen no model yet, and `refusals` is among them.

    `asked` is the base for scorers that ask it about responses; without it they are left out.

    Raises:
        TrialError: a model's logits are not finite, or the device is too small.
    """
    n_answers = len(sets.harmful) + len(sets.harmless) + len(sets.over_refusal)
    total, done = 2 * n_answers + len(sets.harmless), 0

    def counted(count: int, _: int) -> None:
        progress(done + count, total)

    seen = []
    for model in (base, candidate):
        answers_by_set = []
        with model.active():
            for prompts in (sets.harmful, sets.harmless, sets.over_refusal):
                answers_by_set.append(model.engine.answers(prompts, counted))
                done += len(prompts)
        seen.append(_Seen(*answers_by_set))
    base_answers = [
        TeacherForced(base.engine.chat.token_ids(prompt), answer.ids)
        for prompt, answer in zip(sets.harmless, seen[0].harmless, strict=True)
    ]
    drifts = drift(base, candidate, base_answers, lambda count: counted(count, 0))
    markers = next(scorer for scorer in scorers if scorer.name == "refusals" and isinstance(scorer, EarlyScorer))
    both = zip(("base", "candidate"), seen, strict=True)
    record: dict[str, Any] = {name: _refusals_and_faults(answers, markers) for name, answers in both}
    kinds = [_kinds(answers, sets, scorers, asked) for answers in seen]
    record = {name: {**record[name], "unanswered": found} for name, found in zip(record, kinds, strict=True)}
    record |= _drifted(drifts) | {"unchanged": _unchanged(seen[0].harmless, seen[1].harmless)}
    return record | _further(base, candidate, sets, seen, scorers, markers)


def _kinds(
    seen: _Seen, sets: HeldoutSets, scorers: Sequence[Scorer], asked: BaseView | None
) -> dict[str, dict[str, Any]] | None:
    """The rates of each kind of answer to the harmful prompts, and of all that are no real answer; None if nobody asks."""
    scorer = next((scorer for scorer in scorers if isinstance(scorer, Unanswered)), None)
    if scorer is None or asked is None:
        return None
    kinds = scorer.kinds(Observation([answer.response for answer in seen.harmful], torch.empty(0), sets.harmful, asked))
    counts: dict[str, int] = {"count": len(kinds) - kinds.count("answered")}
    counts |= {str(kind): kinds.count(kind) for kind in KINDS}
    return {name: rate(count, len(kinds)) for name, count in counts.items()}


def rate(count: int, total: int) -> dict[str, Any]:
    """A share with its 95 % Clopper-Pearson interval."""
    low, high = clopper_pearson(count, total)
    return {"count": count, "prompts": total, "share": count / total if total else 0.0, "low": low, "high": high}


def _refusals_and_faults(seen: _Seen, markers: EarlyScorer) -> dict[str, Any]:
    refused = [markers.counts(answer.response) for answer in seen.harmful]
    faults = [fault_of(answer) for answer in seen.harmful]
    answered = [not refusal and fault is None for refusal, fault in zip(refused, faults, strict=True)]
    over_refused = [markers.counts(answer.response) for answer in seen.over_refusal]
    return {
        "refusals": rate(sum(refused), len(refused)),
        "answered": rate(sum(answered), len(answered)),
        "faults": {name: faults.count(name) for name in FAULTS},
        "harmless_refusals": rate(sum(markers.counts(answer.response) for answer in seen.harmless), len(seen.harmless)),
        "over_refusals": rate(sum(over_refused), len(over_refused)) if over_refused else None,
    }


def _drifted(drifts: Sequence[Drift]) -> dict[str, Any]:
    """KL of the first token and of all tokens, and perplexities: exp of the mean −log p over all tokens."""
    all_tokens = torch.cat([answer.kl for answer in drifts])
    losses = {name: float(torch.cat([getattr(answer, name) for answer in drifts]).mean()) for name in ("base", "candidate")}
    return {
        "kl": _spread(torch.stack([answer.kl[0] for answer in drifts])),
        "kl_answers": _spread(all_tokens) | {"tokens": len(all_tokens)},
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
    }


def _spread(values: torch.Tensor) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}


def _unchanged(base: Sequence[Answer], candidate: Sequence[Answer]) -> dict[str, Any]:
    differences = [first_difference(before.ids, after.ids) for before, after in zip(base, candidate, strict=True)]
    changed = [position for position in differences if position is not None]
    count = len(differences) - len(changed)
    return rate(count, len(differences)) | {"first_difference": fmean(changed) if changed else None}


def _further(
    base: ModelView,
    candidate: ModelView,
    sets: HeldoutSets,
    seen: Sequence[_Seen],
    scorers: Sequence[Scorer],
    markers: EarlyScorer,
) -> dict[str, Any]:
    """The judges' verdicts, and the scores of graded judges and of all other scorers that a user named."""
    judges = [scorer for scorer in scorers if isinstance(scorer, Judge)]
    # The record holds the figures of these scorers anyway.
    asking = [scorer for scorer in scorers if asks_base(scorer)]
    known = (markers, *asking, *(judge for judge in judges if not is_graded(judge)))
    others = [s for s in scorers if s not in known and s.name != "kl" and not isinstance(s, UnfinishedThinking)]
    observed = []
    for model, answers in zip((base, candidate), seen, strict=True):
        logprobs = torch.empty(0)
        if others:
            with model.active():
                logprobs = model.engine.first_logprobs(sets.harmless)
        responses = [answer.response for answer in answers.harmful]
        observed.append(Observation(responses, logprobs, sets.harmful, check=model.engine.check))
    verdicts = [_judged(judge, markers, observed) for judge in judges]
    # A judge that gives no verdicts isn't asked again for its grades.
    failed = {record["name"]: record["error"] for record in verdicts if record["error"]}
    return {
        "judges": verdicts,
        "scores": {s.name: _no_score(failed[s.name]) if s.name in failed else _scored(s, observed) for s in others},
    }


def _scored(scorer: Scorer, observed: Sequence[Observation]) -> dict[str, Any]:
    """A scorer's records and values for both models, or the `error` that lost them; all other figures are kept."""
    try:
        with _as_trial_error(scorer):
            set_up(scorer, observed[0])
            base, candidate = (score_of(scorer, observation) for observation in observed)
    except TrialError as error:
        return _no_score(str(error))
    values = {"base": float(base.value), "candidate": float(candidate.value)}
    return {"base": base.record, "candidate": candidate.record, "values": values, "error": ""}


def _no_score(error: str) -> dict[str, Any]:
    return {"base": None, "candidate": None, "values": None, "error": error}


@contextlib.contextmanager
def _as_trial_error(scorer: Scorer) -> Iterator[None]:
    """A failing scorer loses its own figures; everything else is kept, whoever wrote it."""
    try:
        with own_errors(scorer):
            yield
    except AbliterateError:
        raise
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise TrialError(f"the scorer {scorer.name} fails ({type(error).__name__}: {message})") from error


def _judged(judge: Judge, markers: EarlyScorer, observed: Sequence[Observation]) -> dict[str, Any]:
    """A judge's refusals for both models and the candidate's responses on which it and the markers disagree, or the `error`."""
    try:
        with _as_trial_error(judge):
            verdicts = [list(map(bool, judge.verdicts(observation))) for observation in observed]
        if any(len(given) != len(observation.responses) for given, observation in zip(verdicts, observed, strict=True)):
            raise TrialError(f"the judge {judge.name} doesn't give one verdict for each response")
    except TrialError as error:
        return {"name": judge.name, "base": None, "candidate": None, "disagreements": [], "error": str(error)}
    candidate = observed[1]
    disagreements = [
        {"prompt": prompt.text, "response": response.text[:SHOWN], "judge": refuses, "markers": markers.counts(response)}
        for prompt, response, refuses in zip(candidate.prompts, candidate.responses, verdicts[1], strict=True)
        if refuses != markers.counts(response)
    ]
    rates = {name: rate(sum(given), len(given)) for name, given in zip(("base", "candidate"), verdicts, strict=True)}
    return {"name": judge.name, **rates, "disagreements": disagreements, "error": ""}
