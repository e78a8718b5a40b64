"""Sample tokens by random numbers that are given, so that an answer depends neither on its batch nor on the engine."""

from __future__ import annotations

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
        distribution = scores.float().softmax(dim=-1).cpu().double().cumsum(dim=-1)
        place = self._uniform[:, self._step, None] * distribution[:, -1:]
        self._step += 1
        # The first token whose cumulative probability exceeds the place, which therefore has a probability above 0.
        tokens = torch.searchsorted(distribution, place, right=True).clamp_max(scores.shape[1] - 1)
        tokens = torch.where(place.isnan(), scores.argmax(dim=-1, keepdim=True).cpu(), tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.to(scores.device), 0.0)
