"""KL(base‖edited) of the first response token over the full vocabulary, per harmless prompt.

Also the smallest form in which the base model's log-probabilities can be kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.evaluation.base import Observation
from abliterate.types import Goal, Score

# Probability per row that may be left to the bucket of rare tokens.
REST = 1e-7
# Log-probabilities that are worked on at once: copies of them take 20 bytes each.
CHUNK = 2**20


def kl_divergence(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base‖edited) in nats per row, (n) float64 ≥ 0, of log-probabilities (n, vocabulary) float32.

    Tokens of base probability 0 (−inf in the model's raw logits) contribute 0, not NaN.
    """
    difference = torch.where(base == -torch.inf, torch.zeros_like(base), base - edited)
    # Rounding gives about −1e-9 for equal distributions; KL is never negative.
    return (base.exp() * difference).sum(dim=-1, dtype=torch.float64).clamp_min(0)


@dataclass(frozen=True)
class LikelyTokens:
    """Of each row of log-probabilities (n, vocabulary) the most probable tokens; the rest is one bucket of mass ≤ 1e-7.

    `tokens` (k) int32 and `logprobs` (k) float32 of all rows, one row after the other; row i has `counts[i]` of them.
    `rest` (n) float64: what the others have together. `never` (n): how many tokens have probability 0.
    """

    tokens: Tensor
    logprobs: Tensor
    counts: tuple[int, ...]
    rest: Tensor
    never: Tensor

    @staticmethod
    def of(base: Tensor) -> LikelyTokens | None:
        """Of `base` (n, vocabulary) float32; None where that takes no fewer bytes than `base` (flat distributions)."""
        tokens, logprobs, rest = [], [], []
        room = base.nbytes - base.shape[0] * 16  # `rest` and `never`
        for row in base:
            sorted_row, order = row.sort(descending=True)
            # From the rarest on, so that small probabilities are not lost beside large ones.
            tail = sorted_row.double().exp().flip(0).cumsum(0).flip(0)  # tail[i]: the mass of i and all rarer ones
            count = int((tail > REST).sum())
            room -= 8 * count
            if room <= 0:
                return None
            tokens.append(order[:count].int())
            logprobs.append(sorted_row[:count].clone())  # a view would keep the whole row
            rest.append(tail[count] if count < len(tail) else tail.new_zeros(()))
        counts = tuple(map(len, tokens))
        return LikelyTokens(torch.cat(tokens), torch.cat(logprobs), counts, torch.stack(rest), _count_never(base))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(part.nbytes for part in (self.tokens, self.logprobs, self.rest, self.never))

    def kl(self, edited: Tensor) -> Tensor:
        """KL(base‖edited) per row, (n) float64 ≥ 0, with all rare tokens as one: Σ p (log p − log q) + P (log P − log Q).

        A lower bound of `kl_divergence` (data processing), too small by P·KL within the bucket: at most 1e-7 times the
        spread of log p − log q among the rare tokens, so 1e-5 where an edit moves no token's odds to another by more than
        e^100. Q is summed over the rare tokens, not 1 − the others: nothing cancels. Where the bucket is empty the result
        has the bits of `kl_divergence`.
        """
        step = max(1, CHUNK // edited.shape[1])
        found, at = [], 0
        for start in range(0, len(self.counts), step):
            counts = torch.tensor(self.counts[start : start + step])
            part = slice(at, at + int(counts.sum()))
            rows = torch.arange(len(counts)).repeat_interleave(counts).to(edited.device)
            found.append(self._some(edited[start : start + step], slice(start, start + step), rows, part))
            at = part.stop
        return torch.cat(found)

    def _some(self, edited: Tensor, which: slice, rows: Tensor, part: slice) -> Tensor:
        """KL of the rows `which`, whose tokens are `part` of all; `rows` (k): the place of each token's row among them."""
        tokens, logprobs = self.tokens[part].long(), self.logprobs[part]
        terms = torch.zeros_like(edited)
        terms[rows, tokens] = logprobs.exp() * (logprobs - edited[rows, tokens])
        likely = terms.sum(dim=-1, dtype=torch.float64)
        others = terms.copy_(edited)
        others[rows, tokens] = -torch.inf
        mass = self.rest[which]
        rare = torch.where(mass > 0, mass * (mass.log() - others.logsumexp(dim=-1).double()), 0.0)
        # In a bucket one impossible token among possible ones would go unseen; its true KL is infinite.
        rare = rare.masked_fill(_count_never(edited) > self.never[which], torch.inf)
        return (likely + rare).clamp_min(0)


def _count_never(logprobs: Tensor) -> Tensor:
    return (logprobs == -torch.inf).sum(dim=-1)


class KL:
    """Scorer: mean KL over the harmless prompts, minimized; median and maximum beside it, the mean hides outliers."""

    name = "kl"
    goal: Goal = "minimize"
    reads_responses = False

    def __init__(self) -> None:
        self._base: Tensor | LikelyTokens | None = None

    def setup(self, base: Observation) -> None:
        """Keep the base model's log-probabilities, (n_harmless, vocabulary) or the likely ones of them."""
        self._base = LikelyTokens.of(base.first_logprobs)
        if self._base is None:
            self._base = base.first_logprobs

    def score(self, observation: Observation) -> Score:
        """See `Scorer.score`; TrialError where the edited model's logits are not finite."""
        assert self._base is not None, "setup comes first"
        edited = observation.first_logprobs
        if torch.isnan(edited).any():
            raise TrialError("the edited model's logits are not numbers")
        values = self._base.kl(edited) if isinstance(self._base, LikelyTokens) else kl_divergence(self._base, edited)
        if not torch.isfinite(values).all():
            raise TrialError("the KL divergence is not finite")
        record = {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}
        return Score(self.name, record["mean"], self.goal, record)
