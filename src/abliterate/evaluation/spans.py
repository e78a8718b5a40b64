"""Where in a response the markers stand: what the detector saw in the normalized text, in the text as it was written."""

from __future__ import annotations

from collections.abc import Sequence

from abliterate.evaluation.refusals import normalize


def marker_spans(text: str, markers: Sequence[str]) -> list[tuple[int, int]]:
    """[start, end) of everything in `text` that a (normalized) marker covers, in order, overlapping ones joined."""
    normalized, places = _with_places(text)
    found = []
    for marker in markers:
        start = normalized.find(marker)
        while start >= 0:
            found.append((places[start], places[start + len(marker) - 1] + 1))
            start = normalized.find(marker, start + 1)
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _with_places(text: str) -> tuple[str, list[int]]:
    """`normalize(text)`, and for each of its characters the place in `text` that it came from."""
    characters: list[str] = []
    places: list[int] = []
    space = -1
    for place, character in enumerate(text):
        if character.isspace():
            space = place
            continue
        mapped = normalize(character)
        if mapped and space >= 0 and characters:
            characters.append(" ")
            places.append(space)
        if mapped:
            space = -1
        characters.extend(mapped)
        places.extend([place] * len(mapped))
    return "".join(characters), places
