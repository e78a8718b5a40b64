"""Learn from the passes of a run what a pass costs beside its tokens."""

from __future__ import annotations

# The fixed cost of a pass, in fed tokens, until passes have been timed. On two cores it is 100 on the demo model and 12 at
# fifty million parameters.
PASS_COST = 64.0
# The passes as which this guess counts, the share of evidence forgotten per pass, and by how much a pass that takes longer than
# expected may count as longer, because a machine that is busy for a moment says nothing about the next pass.
GUESSED, FORGOTTEN, SLOWEST = 4.0, 0.01, 2.0


class PassTimes:
    """What a pass costs beside its tokens, from the seconds that passes of different sizes take.

    The seconds are fitted as a + b·tokens by least squares, in which older passes count less. With `known`, a fixed cost in
    tokens, nothing is learned.
    """

    def __init__(self, known: float | None = None) -> None:
        self._known = known
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
        fixed, each = self._fit()
        expected = fixed + each * tokens
        if expected > 0:
            seconds = min(seconds, SLOWEST * expected)
        new = (1.0, tokens, seconds, tokens * tokens, tokens * seconds)
        self._sums = [(1 - FORGOTTEN) * old + one for old, one in zip(self._sums, new, strict=True)]

    def _fit(self) -> tuple[float, float]:
        """(a, b): at the mean pass the guess counts as some passes that agree with it; (0, 0) before any pass."""
        weight, tokens, seconds, squares, products = self._sums
        if not weight:
            return 0.0, 0.0
        mean, mean_seconds = tokens / weight, seconds / weight
        guessed = mean_seconds / (PASS_COST + mean)  # b, if a were what it is guessed to be
        spread = GUESSED * mean * mean
        each = (products - tokens * mean_seconds + spread * guessed) / (squares - tokens * mean + spread)
        each = min(max(each, 1e-3 * mean_seconds / mean), mean_seconds / mean)  # neither part is negative
        return mean_seconds - each * mean, each
