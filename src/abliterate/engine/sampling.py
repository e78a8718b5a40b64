"""Sample tokens by random numbers that are given, so that an answer depends neither on its batch nor on the engine.

The log-probabilities of the sampled tokens can be noted on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Drawn(LogitsProcessor):
    """Draws the next token of each row at temperature 1: all other tokens get −inf, so that a greedy choice takes it.

    `uniform` (n, T) in [0, 1) is the place of each row's token in the cumulative distribution over the vocabulary. It is given
    for each row and position, so a row's answer depends neither on its neighbours nor on the batch size. A row whose places are
    NaN gets its likeliest token. The rows have `begun` with so many tokens.
    """

    def __init__(self, uniform: Tensor, begun: int = 0) -> None:
        self._uniform = uniform
        self._step = begun

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        device = torch.device("cpu") if scores.device.type == "mps" else scores.device  # MPS has no float64
        distribution = scores.float().softmax(dim=-1).to(device).double().cumsum(dim=-1)
        place = self._uniform[:, self._step, None].to(device) * distribution[:, -1:]
        self._step += 1
        # The first token whose cumulative probability exceeds the place, which therefore has a probability above 0.
        tokens = torch.searchsorted(distribution, place, right=True).clamp_max(scores.shape[1] - 1)
        tokens = torch.where(place.isnan(), scores.argmax(dim=-1, keepdim=True).to(device), tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.to(scores.device), 0.0)


class TokenLogprobs:
    """Notes log p of each token that rows are continued with, and of the tokens `beside` in its place.

    They are of the model's own logits, before any processor. Rows are known by their numbers.
    """

    def __init__(self, beside: Sequence[int]) -> None:
        self._beside = list(beside)
        self._steps: list[tuple[list[int], Tensor]] = []
        self.of_row: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Forget the steps of a batch that wasn't finished."""
        self._steps.clear()

    def note(self, rows: Sequence[int], logits: Tensor, tokens: Tensor) -> None:
        """Take a step: `tokens` (n, 1) follow the rows, whose logits before them are (n, vocabulary)."""
        logits = logits.float()
        beside = torch.tensor(self._beside, dtype=tokens.dtype, device=tokens.device).expand(len(rows), -1)
        found = logits.gather(1, torch.cat([tokens, beside], dim=1)) - logits.logsumexp(dim=-1, keepdim=True)
        self._steps.append((list(rows), found))

    def finish(self) -> None:
        """End a batch: `of_row` gets each of its rows, (1 + len(beside), T) float64 on the CPU, T its number of steps."""
        by_row: dict[int, list[Tensor]] = {}
        values = torch.cat([found for _, found in self._steps]).cpu().double() if self._steps else torch.empty(0)
        for row, value in zip((row for rows, _ in self._steps for row in rows), values, strict=True):
            by_row.setdefault(row, []).append(value)
        self.of_row |= {row: torch.stack(steps, dim=1) for row, steps in by_row.items()}
        self._steps.clear()
