"""Finds thinking blocks and answer tags in rendered prompts and responses, and the tags that a model itself shows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_TAG_BEGINS = re.compile(r"[<\[◁]")

# The usual forms of an opening and a closing tag around a name. Only where both hold the name behind a slash may the opening be
# missing from a text that shows the tags.
_NAME = r"([\w:.-]*(?:think|thought|reason)[\w:.-]*)"
_SLASHED = (("<{}>", "</{}>"), ("[{}]", "[/{}]"), ("◁{}▷", "◁/{}▷"), ("<|{}|>", "<|/{}|>"), ("<｜{}｜>", "<｜/{}｜>"))
_PAIRED = (
    *(("<|begin_of_{}|>", "<|end_of_{}|>"), ("<|begin_{}|>", "<|end_{}|>"), ("<|start_{}|>", "<|end_{}|>")),
    *(("<|START_{}|>", "<|END_{}|>"), ("<|{}_start|>", "<|{}_end|>"), ("<|{}_begin|>", "<|{}_end|>")),
    *(("<|{}|>", "<|end_{}|>"), ("<{}_start>", "<{}_end>")),
)


def shown_blocks(texts: Iterable[str]) -> list[tuple[str, str]]:
    """The thinking blocks whose tags occur in a chat template or among a tokenizer's own tokens, as `Markup` takes them."""
    shown = "\n".join(texts)
    found: dict[str, str] = {}
    for forms, both in ((_SLASHED, False), (_PAIRED, True)):
        for opening_form, closing_form in forms:
            for name in re.findall(_pattern(closing_form), shown, re.IGNORECASE):
                opening = opening_form.format(name)
                if not both or opening in shown:
                    found.setdefault(opening, opening + closing_form.format(name))
    return sorted(found.items())


def _pattern(form: str) -> str:
    before, after = form.split("{}")
    return re.escape(before) + _NAME + re.escape(after)


@dataclass(frozen=True)
class Block:
    """A kind of thinking block. `closed`: the text that replaces it, from its opening to its closing tag."""

    opening: str
    closed: str

    @property
    def closing(self) -> str:
        """The tag that ends a block: the part of `closed` after the opening."""
        return self.closed[len(self.opening) :]

    @property
    def nests(self) -> bool:
        """Whether a block may lie in another of its kind. A closing of several tags (harmony) ends all that are open."""
        return len(_TAG_BEGINS.findall(self.closing)) == 1


class Markup:
    """`blocks`: pairs (opening, closed block); `answer_tags`: tags that stand around an answer and don't belong to it.

    `unopened`: closing tags that may come although nobody opened a block; everything before such a tag is thought.
    """

    def __init__(
        self, blocks: Iterable[tuple[str, str]], answer_tags: Iterable[str] = (), unopened: Iterable[str] = ()
    ) -> None:
        self.blocks = tuple(Block(*pair) for pair in blocks)
        self.answer_tags = tuple(answer_tags)
        self.unopened = tuple(unopened)
        self.tags = (*(block.opening for block in self.blocks), *self.answer_tags)

    def open_block(self, text: str) -> tuple[int, Block] | None:
        """The thinking block that is still open at the end of `text`, and its position; None if no block is open."""
        opened = [
            (text.rfind(block.opening), block) for block in self.blocks if text.rfind(block.opening) > text.rfind(block.closing)
        ]
        return max(opened, key=lambda pair: pair[0], default=None)

    def starts_open(self, tail: str) -> bool | None:
        """Whether a response after `tail` begins in a thinking block; None if only a closing tag in it will tell."""
        if self.open_block(tail) is not None:
            return True
        return None if self.unopened and not any(closing in tail for closing in self.unopened) else False

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
