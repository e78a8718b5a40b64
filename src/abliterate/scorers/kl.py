"""The scorer KL(base‖edited) of the first response token over the full vocabulary, per harmless prompt.

The base model's log-probabilities can be kept in smaller forms. Whatever the form, KL stays within 1e-5 of the dense one for
edits that change no token's log-probability by more than `RATIO` (each form states its bound); in practice within 1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.errors import TrialError
from abliterate.scorers.base import Observation
from abliterate.types import Goal, Score

WITHIN = 1e-5  # nats

RATIO = 50.0  # nats

# The most probability per row that the bucket of rare tokens may hold: times the spread of log ratios, 2·RATIO, it is WITHIN.
REST = WITHIN / (2 * RATIO)

# Log-probabilities that are processed at once; the copies take 20 bytes per log-probability.
CHUNK = 2**20

_NEVER = -(2**15)  # the code of probability 0


def with_float64(tensor: Tensor) -> Tensor:
    """The tensor on a device that has float64: itself, or on mps a copy in main memory; a gradient passes through it."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def kl_divergence(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base‖edited) in nats per row, (n) float64 ≥ 0, from log-probabilities (n, vocabulary) float32 on one device.

    Tokens of base probability 0 (−inf in the model's raw logits) contribute 0, not NaN. The sums are on the CPU if the device
    has no float64.
    """
    base, edited = with_float64(base), with_float64(edited)
    difference = torch.where(base == -torch.inf, torch.zeros_like(base), base - edited)
    # Rounding gives about −1e-9 for equal distributions; KL is never negative.
    return (base.exp() * difference).sum(dim=-1, dtype=torch.float64).clamp_min(0)


@dataclass(frozen=True)
class SomeTokens:
    """Some tokens of each row: `tokens` (k) int32 and `logprobs` (k) float32 of all rows in order, `counts[i]` of row i."""

    tokens: Tensor
    logprobs: Tensor
    counts: tuple[int, ...]

    @staticmethod
    def of(rows: Sequence[tuple[Tensor, Tensor]]) -> SomeTokens:
        """The tokens of `rows`, given as (tokens, log-probabilities) per row."""
        tokens, logprobs = zip(*rows, strict=True)
        return SomeTokens(torch.cat(tokens).int(), torch.cat(logprobs), tuple(map(len, tokens)))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.tokens.nbytes + self.logprobs.nbytes

    def chunks(self, width: int, chunk: int = CHUNK) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """A few rows of `width` log-probabilities at a time, about `chunk` of them: the slice of rows, and their tokens.

        The tokens come as the index (k) of each token's row within the slice, tokens (k) int64, and log-probabilities (k).
        """
        step, offset = max(1, chunk // width), 0
        for start in range(0, len(self.counts), step):
            counts = torch.tensor(self.counts[start : start + step])
            entries = slice(offset, offset + int(counts.sum()))
            row_indices = torch.arange(len(counts)).repeat_interleave(counts).to(self.tokens.device)
            yield slice(start, start + step), row_indices, self.tokens[entries].long(), self.logprobs[entries]
            offset = entries.stop


@dataclass(frozen=True)
class LikelyTokens:
    """The most probable tokens of each row, and one bucket of mass ≤ 1e-7 for all others. It suits peaked distributions.

    `rest` (n) float64 is the bucket's probability; `never` are the tokens of probability 0.
    """

    likely: SomeTokens
    rest: Tensor
    never: SomeTokens

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.likely.nbytes + self.rest.nbytes + self.never.nbytes

    def kl(self, edited: Tensor, chunk: int = CHUNK) -> Tensor:
        """KL(base‖edited) per row, (n) float64 ≥ 0, all rare tokens taken as one: Σ p (log p − log q) + P (log P − log Q).

        It is a lower bound of `kl_divergence` (data processing inequality), too small by P·KL within the bucket, which is at
        most P times the spread of log p − log q among the rare tokens. Q is summed over the rare tokens and not taken as
        1 − the others, so nothing cancels. If the bucket is empty, the result has the bits of `kl_divergence`.
        """
        chunks = zip(self.likely.chunks(edited.shape[1], chunk), self.never.chunks(edited.shape[1], chunk), strict=True)
        return torch.cat([self._chunk_kl(edited[likely[0]], *likely, never[1:3]) for likely, never in chunks])

    def _chunk_kl(
        self, edited: Tensor, chunk: slice, row_indices: Tensor, tokens: Tensor, logprobs: Tensor, never: Sequence[Tensor]
    ) -> Tensor:
        terms = torch.zeros_like(edited)
        terms[row_indices, tokens] = logprobs.exp() * (logprobs - edited[row_indices, tokens])
        likely = terms.sum(dim=-1, dtype=torch.float64)
        others = terms.copy_(edited)
        others[row_indices, tokens] = -torch.inf
        mass = self.rest[chunk]
        rare = torch.where(mass > 0, mass * (mass.log() - others.logsumexp(dim=-1).double()), 0.0)
        # In a bucket, an impossible token among possible ones would go unseen; its true KL is infinite.
        impossible = edited == -torch.inf
        impossible[never[0], never[1]] = False
        rare = rare.masked_fill(impossible.any(dim=-1), torch.inf)
        return (likely + rare).clamp_min(0)


@dataclass(frozen=True)
class RoundedLogprobs:
    """All log-probabilities in 16 bits, and the most probable tokens exactly. It suits flatter distributions.

    `codes` (n, vocabulary) int16 mean log p = `low` + (code + 32767)·`step`, both (n, 1) float32; −32768 is probability 0.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    exact: SomeTokens

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes + self.exact.nbytes

    def kl(self, edited: Tensor, chunk: int = CHUNK) -> Tensor:
        """KL(base‖edited) per row, (n) float64 ≥ 0.

        Rounding log p by up to δ = step/2 changes p (log p − log q) by up to p·δ·e^δ·(1 + |log p − log q|); `rounded_mass`
        is the probability that may be rounded so that this change stays below `WITHIN`.
        """
        values = []
        for rows, row_indices, tokens, logprobs in self.exact.chunks(edited.shape[1], chunk):
            codes = self.codes[rows]
            base = (codes.float() - (_NEVER + 1)).mul_(self.step[rows]).add_(self.low[rows])
            base.masked_fill_(codes == _NEVER, -torch.inf)
            base[row_indices, tokens] = logprobs
            values.append(kl_divergence(base, edited[rows]))
        return torch.cat(values)


def rounded_mass(step: float) -> float:
    """The probability whose tokens may be rounded to multiples of `step` nats (the bound stands in `RoundedLogprobs.kl`)."""
    worst = step / 2 * math.exp(step / 2) * (1 + RATIO)
    return WITHIN / worst if worst > 0 else math.inf


def smallest_form(base: Tensor) -> Tensor | LikelyTokens | RoundedLogprobs:
    """`base` (n, vocabulary) float32 in the form that takes the fewest bytes; flat distributions stay as they are."""
    best = min(small_forms(base), key=lambda form: form.nbytes, default=None)
    return base if best is None or best.nbytes >= base.nbytes else best


def small_forms(base: Tensor) -> tuple[LikelyTokens | RoundedLogprobs, ...]:
    """Both small forms of `base`, or neither as soon as it is clear that both take more bytes."""
    likely: list[tuple[Tensor, Tensor]] = []
    exact: list[tuple[Tensor, Tensor]] = []
    rest: list[Tensor] = []
    taken = [0, base.nbytes // 2]  # bytes of either form so far; codes take half the bytes of their log-probabilities
    for row in base:
        ordered, tokens = row.sort(descending=True)
        # Summed from the rarest token on, so that small probabilities are not lost beside large ones.
        tail = ordered.double().exp().flip(0).cumsum(0).flip(0)  # tail[i] is the mass of token i and all rarer tokens
        for form, (rows, left) in enumerate(((likely, REST), (exact, rounded_mass(_low_and_step(row)[1])))):
            count = int((tail > left).sum())
            rows.append((tokens[:count].int(), ordered[:count].clone()))  # a view would keep the whole row
            taken[form] += 8 * count
        count = len(likely[-1][0])
        rest.append(tail[count] if count < len(tail) else tail.new_zeros(()))
        if min(taken) >= base.nbytes:
            return ()
    return (
        LikelyTokens(SomeTokens.of(likely), torch.stack(rest), _never(base)),
        _rounded(base, SomeTokens.of(exact)),
    )


def _low_and_step(row: Tensor) -> tuple[float, float]:
    """A row's lowest log-probability and the distance of two codes; its finite values must fit into 2^16 − 1 codes."""
    finite = row[row > -torch.inf]
    if not len(finite):
        return 0.0, 0.0
    low = float(finite.min())
    return low, (float(finite.max()) - low) / (2**16 - 2)


def _rounded(base: Tensor, exact: SomeTokens) -> RoundedLogprobs:
    codes = torch.empty(base.shape, dtype=torch.int16, device=base.device)
    lows, steps = base.new_zeros(len(base), 1), base.new_zeros(len(base), 1)
    for index, row in enumerate(base):
        low, step = _low_and_step(row)
        lows[index], steps[index] = low, step
        code = ((row.double() - low) / (step or 1.0)).round().clamp(0, 2**16 - 2).nan_to_num()
        codes[index] = (code + _NEVER + 1).masked_fill(row == -torch.inf, _NEVER).to(torch.int16)
    return RoundedLogprobs(codes, lows, steps, exact)


def _never(logprobs: Tensor) -> SomeTokens:
    """The tokens of probability 0."""
    return SomeTokens.of([((row == -torch.inf).nonzero().flatten().int(), row[row == -torch.inf]) for row in logprobs])


class KL:
    """Scores the mean KL over the harmless prompts, minimized; median and maximum stand beside it, as a mean hides outliers."""

    name = "kl"
    goal: Goal = "minimize"
    reads_responses = False

    def __init__(self) -> None:
        self._base: Tensor | LikelyTokens | RoundedLogprobs | None = None

    def setup(self, base: Observation) -> None:
        """Keep the base model's log-probabilities (n_harmless, vocabulary) in the form that takes the fewest bytes."""
        self._base = smallest_form(with_float64(base.first_logprobs))

    def score(self, observation: Observation) -> Score:
        """The mean KL. TrialError: the edited model's logits are not finite."""
        assert self._base is not None, "setup comes first"
        edited = with_float64(observation.first_logprobs)
        if torch.isnan(edited).any():
            raise TrialError("the edited model's logits are not numbers")
        values = kl_divergence(self._base, edited) if isinstance(self._base, Tensor) else self._base.kl(edited)
        if not torch.isfinite(values).all():
            raise TrialError("the KL divergence is not finite")
        record = {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}
        return Score(self.name, record["mean"], self.goal, record)


__all__ = ["KL", "kl_divergence", "with_float64"]
