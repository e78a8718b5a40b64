"""Finds thinking blocks and answer tags, as the settings name them, in rendered prompts and responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A kind of thinking block. `closed`: the text that replaces it, from its opening to its closing tag."""

    opening: str
    closed: str

    @property
    def closing(self) -> str:
        """The tag that ends a block: the part of `closed` after the opening."""
        return self.closed[len(self.opening) :]


class Markup:
    """`blocks`: pairs (opening, closed block); `answer_tags`: tags that stand around an answer and don't belong to it."""

    def __init__(self, blocks: Iterable[tuple[str, str]], answer_tags: Iterable[str] = ()) -> None:
        self.blocks = tuple(Block(*pair) for pair in blocks)
        self.answer_tags = tuple(answer_tags)
        self.tags = (*(block.opening for block in self.blocks), *self.answer_tags)

    def open_block(self, text: str) -> tuple[int, Block] | None:
        """The thinking block that is still open at the end of `text`, and its position; None if no block is open."""
        opened = [
            (text.rfind(block.opening), block) for block in self.blocks if text.rfind(block.opening) > text.rfind(block.closing)
        ]
        return max(opened, key=lambda pair: pair[0], default=None)

    def begins_with(self, text: str) -> Block | None:
        """The thinking block that `text` begins with, after white space."""
        text = text.lstrip()
        return next((block for block in self.blocks if text.startswith(block.opening)), None)

    def may_open(self, text: str) -> bool:
        """Whether `text`, if it goes on, can still begin with a thinking block."""
        text = text.lstrip()
        return any(len(text) < len(block.opening) and block.opening.startswith(text) for block in self.blocks)

    def without_partial(self, text: str) -> str:
        """`text` without an incomplete tag at its end."""
        return text[: len(text) - overlap(text, self.tags)]


def overlap(text: str, tags: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of a tag."""
    longest = 0
    for tag in tags:
        start = text.find(tag[0], max(0, len(text) - len(tag) + 1))
        while start >= 0:
            if tag.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start = text.find(tag[0], start + 1)
    return longest
