"""Learn from the passes of a run what a pass costs beside its tokens."""

from __future__ import annotations

import statistics

from abliterate import ranks

# The fixed cost of a pass, in fed tokens, until passes have been timed. On two cores it is 100 on the demo model and 12 at
# fifty million parameters.
PASS_COST = 64.0
# This guess counts as so many passes spread around the mean one; so much of the evidence is forgotten per pass; and a pass
# counts as at most so many times as long as expected: a machine that is busy for a moment says nothing about the next pass.
GUESSED, FORGOTTEN, SLOWEST = 4.0, 0.01, 2.0
# Some of the first passes may be far slower than all later ones; those that are, by their median, don't count.
FIRST = 8


class PassTimes:
    """What a pass costs beside its tokens, from the seconds that passes of different sizes take.

    The seconds are fitted as a + b·tokens by least squares, in which older passes count less. With `known`, a fixed cost in
    tokens, nothing is learned; nor is it on several ranks, whose clocks would decide differently.
    """

    def __init__(self, known: float | None = None) -> None:
        self._known = PASS_COST if known is None and ranks.size() > 1 else known
        self._first: list[tuple[int, float]] = []
        # Weight, and weighted sums of tokens, seconds, squared tokens, and tokens times seconds.
        self._sums = [0.0] * 5

    @property
    def pass_cost(self) -> float:
        """The fixed cost a/b of a pass, in tokens; never below 0."""
        if self._known is not None:
            return self._known
        fixed, each = self._fit()
        return fixed / each if each else PASS_COST

    def speed(self, tokens: int) -> float:
        """Tokens a second in passes over so many tokens; 0 before any pass was timed."""
        fixed, each = self._fit()
        return tokens / (fixed + each * tokens) if fixed + each else 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A pass that fed `tokens`, pads included, has taken `seconds`."""
        if len(self._first) < FIRST:
            self._first.append((tokens, seconds))
            if len(self._first) == FIRST:
                usual = statistics.median(one / (PASS_COST + fed) for fed, one in self._first)
                for fed, one in self._first:
                    if one <= SLOWEST * usual * (PASS_COST + fed):
                        self._add(fed, one)
            return
        fixed, each = self._fit()
        self._add(tokens, min(seconds, SLOWEST * (fixed + each * tokens)))

    def _add(self, tokens: int, seconds: float) -> None:
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [(1 - FORGOTTEN) * old + one for old, one in zip(self._sums, new, strict=True)]

    def _fit(self) -> tuple[float, float]:
        """(a, b), or (0, 0) before there are enough passes."""
        weight, tokens, seconds, squares, products = self._sums
        if not weight:
            return 0.0, 0.0
        mean, mean_seconds = tokens / weight, seconds / weight
        guessed = mean_seconds / (PASS_COST + mean)  # b, if a were what it is guessed to be
        spread = GUESSED * mean * mean
        each = (products - tokens * mean_seconds + spread * guessed) / (squares - tokens * mean + spread)
        each = min(max(each, 1e-3 * mean_seconds / mean), mean_seconds / mean)  # neither part is negative
        return mean_seconds - each * mean, each
