"""Draft the next tokens of a response from the responses that other edits produced.

One pass checks a whole draft: the tokens that the model would have chosen itself are kept, the rest are discarded. So a draft
changes how many passes a response takes, and nothing else (speculative decoding: Leviathan et al., 2023, arXiv:2211.17192;
drafts looked up by n-grams: Saxena, "Prompt lookup decoding", 2023).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from abliterate.engine.pass_times import PassTimes

# A continuation is looked up by its last CONTEXT tokens. With two, more drafts are found and fewer are right; with four, the
# reverse.
CONTEXT = 3
# Distinct responses remembered per prompt, and for all prompts together. Remembering more did not reduce the number of passes
# on the demo model.
OF_A_PROMPT = 8
OF_ALL = 200
START = -1  # stands for the positions before a response
# The rate of right draft tokens assumed before any evidence, as (right, tried), and the share of evidence forgotten per pass
# with drafts and without. The latter makes drafts that didn't pay be tried again in one of several hundred passes.
PRIOR = (3.0, 4.0)
FORGOTTEN, FORGOTTEN_UNTRIED = 0.05, 0.01


class _Memory:
    """The newest distinct responses, and where each run of `CONTEXT` tokens was last seen in them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._responses: deque[tuple[int, ...]] = deque()
        self._seen_at: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}  # {context: (response, position after it)}

    def learn(self, tokens: tuple[int, ...]) -> None:
        if tokens in self._responses:
            return
        self._responses.append(tokens)
        for end, key in enumerate(_contexts(tokens)):
            self._seen_at[key] = (tokens, end)
        if len(self._responses) > self._size:
            oldest = self._responses.popleft()
            for key in _contexts(oldest):
                if key in self._seen_at and self._seen_at[key][0] is oldest:
                    del self._seen_at[key]

    def after(self, key: tuple[int, ...], length: int) -> Sequence[int]:
        tokens, end = self._seen_at.get(key, ((), 0))
        return tokens[end : end + length]


class Drafts:
    """Drafts for the numbered prompts of one set, from the prompt's own earlier responses or else from any prompt's.

    They are only proposed where they pay: by the rate at which they were right, and by the `times` of passes.
    """

    def __init__(self, prompts: int, times: PassTimes | None = None) -> None:
        self._by_prompt = [_Memory(OF_A_PROMPT) for _ in range(prompts)]
        self._shared = _Memory(OF_ALL)
        self._right, self._tried = PRIOR
        self.times = times or PassTimes()

    def learn(self, row: int, tokens: Sequence[int]) -> None:
        """Remember a response to prompt `row`, or the beginning of one."""
        self._by_prompt[row].learn(tuple(tokens))
        self._shared.learn(tuple(tokens))

    def propose(self, row: int, generated: Sequence[int], length: int) -> Sequence[int]:
        """At most `length` tokens that may follow the tokens `generated` so far; often none."""
        key = ((START,) * CONTEXT + tuple(generated[-CONTEXT:]))[-CONTEXT:]
        return self._by_prompt[row].after(key, length) or self._shared.after(key, length)

    def width(self, drafts: Sequence[Sequence[int]]) -> int:
        """How many tokens per row a pass should feed (the certain token and part of its draft) to decide most for its cost.

        Every row of a pass is as wide as the widest, so a width that few rows fill, or that is rarely right, doesn't pay.
        """
        rate, decided, pass_cost = self._right / self._tried, float(len(drafts)), self.times.pass_cost
        best, width = decided / (pass_cost + len(drafts)), 1
        for length in range(1, 1 + max(map(len, drafts), default=0)):
            decided += rate**length * sum(len(draft) >= length for draft in drafts)
            if decided / (pass_cost + len(drafts) * (length + 1)) > best:
                best, width = decided / (pass_cost + len(drafts) * (length + 1)), length + 1
        return width

    def score(self, drafts: Sequence[Sequence[int]], right: Sequence[int]) -> None:
        """Learn how many tokens of each draft were `right`; the tokens after a wrong token were not tried."""
        tried = sum(min(len(draft), good + 1) for draft, good in zip(drafts, right, strict=True))
        forgotten = FORGOTTEN if tried else FORGOTTEN_UNTRIED
        self._right = (1 - forgotten) * self._right + forgotten * PRIOR[0] + sum(right)
        self._tried = (1 - forgotten) * self._tried + forgotten * PRIOR[1] + tried


def _contexts(tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Entry i holds the `CONTEXT` tokens before token i."""
    padded = (START,) * CONTEXT + tokens
    return [padded[end : end + CONTEXT] for end in range(len(tokens))]
