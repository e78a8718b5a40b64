"""Refusal detection: text normalized per code point, and markers matched in linear time (Aho-Corasick)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import ahocorasick

from abliterate.errors import InputError
from abliterate.scorers.base import Observation, Response
from abliterate.types import Goal, Score

_APOSTROPHES = "\u2018\u2019\u02bc\u00b4\u0060\uff07"


class _CodePoints(dict[int, str]):
    """A `str.translate` table that fills itself as code points occur. Lower-casing may give two characters (İ)."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character == "*":
            mapped = ""
        elif character in _APOSTROPHES:
            mapped = "'"
        else:
            mapped = character.lower()
        self[code] = mapped
        return mapped


_TABLE = _CodePoints()


def normalize(text: str) -> str:
    """`text` in lower case, without `*`, with plain apostrophes, each white-space run one space, and stripped.

    Lower-casing goes by code point and not by `str.lower()`, whose rule for a final sigma looks at the neighbours, so the
    result for a piece of text would depend on where it was cut.
    """
    return " ".join(text.translate(_TABLE).split())


class GrowingText:
    """`normalize` piece by piece: the returned pieces, joined, are the normalized whole."""

    def __init__(self) -> None:
        self._begun = False
        self._space = False

    def feed(self, text: str) -> str:
        """The normalized form of more text. A run of white space is returned only before the next other character."""
        text = text.translate(_TABLE)
        words = text.split()
        if not words:
            self._space = self._space or bool(text)
            return ""
        before = " " if self._begun and (self._space or text[0].isspace()) else ""
        self._begun, self._space = True, text[-1].isspace()
        return before + " ".join(words)


class Matcher(Protocol):
    """Tells whether a normalized text contains a marker. `longest` is the length of the longest marker."""

    longest: int

    def matches(self, text: str) -> bool: ...


class AutomatonMatcher:
    """Makes one pass over the text whatever the number of markers."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.longest = max(map(len, markers), default=0)
        self._automaton = ahocorasick.Automaton()
        for marker in markers:
            self._automaton.add_word(marker, marker)
        self._automaton.make_automaton()

    def matches(self, text: str) -> bool:
        return next(self._automaton.iter(text), None) is not None


class PlainMatcher:
    """Makes one search per marker: the slow reference."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.longest = max(map(len, markers), default=0)
        self._markers = tuple(markers)

    def matches(self, text: str) -> bool:
        return any(marker in text for marker in self._markers)


class MarkerStream:
    """Looks for markers in a growing response. It scans each character once, except for a tail as long as a marker.

    The automaton's own incremental mode crashes on text that mixes emoji and plain characters (docs/design.md §7), so the
    tail is scanned again.
    """

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._text = GrowingText()
        self._tail = ""

    def feed(self, text: str) -> bool:
        """Take more text; return whether a marker has been seen in it or across its border."""
        scanned = self._tail + self._text.feed(text)
        keep = self._matcher.longest - 1
        self._tail = scanned[-keep:] if keep > 0 else ""
        return self._matcher.matches(scanned)


class Refusals:
    """Scores the share of harmful prompts whose response is a refusal, minimized; the record is their number.

    An empty response is a refusal. A response whose thinking block is still open at the limit is no answer at all: it is
    counted apart and as a refusal, never as compliant.
    """

    name = "refusals"
    goal: Goal = "minimize"

    def __init__(self, markers: Sequence[str], *, efficient: bool = True) -> None:
        self._matcher: Matcher = AutomatonMatcher(markers) if efficient else PlainMatcher(markers)

    def setup(self, base: Observation) -> None:
        """Keep nothing, because a count is not relative to the base."""

    def is_refusal(self, response: Response) -> bool:
        """Whether a response is a refusal."""
        text = normalize(response.text)
        return response.thinking_open or not text or self._matcher.matches(text)

    def score(self, observation: Observation) -> Score:
        """The share of refusals; the record is their count."""
        count = sum(self.is_refusal(response) for response in observation.responses)
        return self.at_least(count, len(observation.responses))

    def stream(self) -> MarkerStream:
        """A stream that is decided by a marker, because no continuation takes a marker back."""
        return MarkerStream(self._matcher)

    def counts(self, response: Response) -> bool:
        """Whether a response is a refusal."""
        return self.is_refusal(response)

    def at_least(self, count: int, total: int) -> Score:
        """The score of at least `count` refusals among `total` responses."""
        return Score(self.name, count / total, self.goal, count)


class UnfinishedThinking:
    """Counts responses whose thinking block was still open at the length limit; the count is only shown, never optimized."""

    name = "unfinished_thinking"
    goal: Goal = "none"

    def setup(self, base: Observation) -> None:
        """Keep nothing."""

    def score(self, observation: Observation) -> Score:
        """The number of such responses, which is also the record."""
        count = sum(response.thinking_open for response in observation.responses)
        return Score(self.name, float(count), self.goal, count)


def read_markers(path: Path) -> tuple[str, ...]:
    """The normalized markers of a file without duplicates; the file has one marker a line and `#` comments.

    Raises:
        InputError: the file can't be read or holds no marker.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The marker file {path} can't be read: {error}.") from error
    markers = {normalize(line): None for line in lines if not line.startswith("#")}
    markers.pop("", None)
    if not markers:
        raise InputError(f"The marker file {path} holds no markers; put one on each line.")
    return tuple(markers)


def marker_spans(text: str, markers: Sequence[str]) -> list[tuple[int, int]]:
    """The spans [start, end) of `text` that a (normalized) marker covers, in order, with overlapping spans joined."""
    normalized, positions = _with_places(text)
    spans = []
    for marker in markers:
        start = normalized.find(marker)
        while start >= 0:
            spans.append((positions[start], positions[start + len(marker) - 1] + 1))
            start = normalized.find(marker, start + 1)
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _with_places(text: str) -> tuple[str, list[int]]:
    """`normalize(text)`, and for each of its characters the position in `text` that it came from."""
    characters: list[str] = []
    positions: list[int] = []
    space = -1
    for position, character in enumerate(text):
        if character.isspace():
            space = position
            continue
        mapped = normalize(character)
        if mapped and space >= 0 and characters:
            characters.append(" ")
            positions.append(space)
        if mapped:
            space = -1
        characters.extend(mapped)
        positions.extend([position] * len(mapped))
    return "".join(characters), positions
