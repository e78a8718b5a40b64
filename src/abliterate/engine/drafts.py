"""Drafts of responses, from what other edits made the model say. Knows tokens, no model.

One pass checks a whole draft: what the model would have said itself is kept, the rest is never seen again. So a draft
changes how many passes a response takes, and nothing else (speculative decoding: Leviathan et al., 2023, arXiv:2211.17192;
drafts looked up by n-grams: Saxena, "Prompt lookup decoding", 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

# Tokens by which a continuation is looked up. With two, more drafts are found and fewer are right; with four, the reverse.
CONTEXT = 3
# Distinct responses remembered of each prompt, and of all prompts together. More made no pass fewer on the demo.
OF_A_PROMPT = 8
OF_ALL = 200
START = -1  # before a response
# What a pass costs however little is fed, in tokens: 100 on the demo model, 12 at fifty million parameters, on two cores.
PASS_COST = 64
# How often a drafted token is right before anything is known, as [right, tried], and what is forgotten of it with each pass.
PRIOR = (3.0, 4.0)
FORGOTTEN = 0.05


class _Memory:
    """The newest distinct responses, and where in them each run of `CONTEXT` tokens was last seen."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: deque[tuple[int, ...]] = deque()
        self._found: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}

    def learn(self, tokens: tuple[int, ...]) -> None:
        if tokens in self._kept:
            return
        self._kept.append(tokens)
        for end, key in enumerate(_contexts(tokens)):
            self._found[key] = (tokens, end)
        if len(self._kept) > self._size:
            old = self._kept.popleft()
            for key in _contexts(old):
                if key in self._found and self._found[key][0] is old:
                    del self._found[key]

    def after(self, key: tuple[int, ...], length: int) -> Sequence[int]:
        tokens, end = self._found.get(key, ((), 0))
        return tokens[end : end + length]


class Drafts:
    """Drafts for the prompts of one set, by their numbers: from the prompt's own responses, else from any prompt's."""

    def __init__(self, prompts: int, pass_cost: int = PASS_COST) -> None:
        self._own = [_Memory(OF_A_PROMPT) for _ in range(prompts)]
        self._all = _Memory(OF_ALL)
        self._right, self._tried = PRIOR
        self._pass_cost = pass_cost

    def learn(self, row: int, tokens: Sequence[int]) -> None:
        """A response to prompt `row`, or its beginning."""
        self._own[row].learn(tuple(tokens))
        self._all.learn(tuple(tokens))

    def propose(self, row: int, said: Sequence[int], length: int) -> Sequence[int]:
        """At most `length` tokens that may follow `said`; often none."""
        key = ((START,) * CONTEXT + tuple(said[-CONTEXT:]))[-CONTEXT:]
        return self._own[row].after(key, length) or self._all.after(key, length)

    def width(self, drafts: Sequence[Sequence[int]]) -> int:
        """Tokens of a row that a pass should feed, the certain one and part of its draft: the most decided for the work.

        All rows of a pass are as wide as the widest, so a width that few rows fill, or that is rarely right, doesn't pay.
        """
        rate, decided = self._right / self._tried, float(len(drafts))
        best, width = decided / (self._pass_cost + len(drafts)), 1
        for length in range(1, 1 + max(map(len, drafts), default=0)):
            decided += rate**length * sum(len(draft) >= length for draft in drafts)
            if decided / (self._pass_cost + len(drafts) * (length + 1)) > best:
                best, width = decided / (self._pass_cost + len(drafts) * (length + 1)), length + 1
        return width

    def score(self, drafts: Sequence[Sequence[int]], right: Sequence[int]) -> None:
        """How many tokens of each draft were right; what follows a wrong one wasn't tried."""
        tried = sum(min(len(draft), good + 1) for draft, good in zip(drafts, right, strict=True))
        self._right = (1 - FORGOTTEN) * self._right + FORGOTTEN * PRIOR[0] + sum(right)
        self._tried = (1 - FORGOTTEN) * self._tried + FORGOTTEN * PRIOR[1] + tried


def _contexts(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Entry i: the `CONTEXT` tokens before token i."""
    padded = (START,) * CONTEXT + tokens
    return [padded[end : end + CONTEXT] for end in range(len(tokens))]
