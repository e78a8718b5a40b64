"""Markup in rendered prompts and responses, as the settings name it: thinking blocks, and tags around answers.

Pure text; knows no tokenizer and no template.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A kind of thinking block. `closed`: what is put instead of one, from its opening to its closing."""

    opening: str
    closed: str

    @property
    def closing(self) -> str:
        """What ends it: what `closed` has after the opening."""
        return self.closed[len(self.opening) :]


class Markup:
    """`blocks`: (opening, opening and closing) pairs; `answer_tags`: what stands around an answer and is no part of it."""

    def __init__(self, blocks: Iterable[tuple[str, str]], answer_tags: Iterable[str] = ()) -> None:
        self.blocks = tuple(Block(*pair) for pair in blocks)
        self.answer_tags = tuple(answer_tags)
        self.tags = (*(block.opening for block in self.blocks), *self.answer_tags)

    def open_block(self, text: str) -> tuple[int, Block] | None:
        """The thinking block that `text` ends in, and where it begins."""
        found = [
            (text.rfind(block.opening), block) for block in self.blocks if text.rfind(block.opening) > text.rfind(block.closing)
        ]
        return max(found, key=lambda pair: pair[0], default=None)

    def begins_with(self, text: str) -> Block | None:
        """The thinking block that `text` begins with, white space aside."""
        text = text.lstrip()
        return next((block for block in self.blocks if text.startswith(block.opening)), None)

    def may_open(self, text: str) -> bool:
        """Whether more of `text` could make it begin with a thinking block."""
        text = text.lstrip()
        return any(len(text) < len(block.opening) and block.opening.startswith(text) for block in self.blocks)

    def without_partial(self, text: str) -> str:
        """`text` without the beginning of a tag at its end."""
        return text[: len(text) - overlap(text, self.tags)]


def overlap(text: str, tags: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a tag."""
    longest = 0
    for tag in tags:
        place = text.find(tag[0], max(0, len(text) - len(tag) + 1))
        while place >= 0:
            if tag.startswith(text[place:]):
                longest = max(longest, len(text) - place)
                break
            place = text.find(tag[0], place + 1)
    return longest
