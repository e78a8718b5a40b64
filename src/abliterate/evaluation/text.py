"""Text of a growing response, piece by piece: only what later tokens can't change any more.

A piece is decoded after the one before it, so that decoders which look at their neighbours (leading spaces, bytes of one
character in several tokens) give what they give for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from abliterate.model.chat import decode_ids
from abliterate.model.markup import Markup, overlap

_UNFINISHED = "\ufffd"


class TextStream:
    """One row's text. Special tokens are kept: thinking blocks may be made of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, byte_ids: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._byte_ids = byte_ids
        self._ids: list[int] = []
        self._before = 0  # where the context begins, and where what is not given out yet begins
        self._given = 0
        self._context = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` add; empty while they end within a character."""
        self._ids.extend(ids)
        # A run of byte tokens is decoded as one: a bad byte turns the good ones before it into replacement characters.
        if not self._ids or self._ids[-1] in self._byte_ids:
            return ""
        text = self._decode(self._before)
        if text.endswith(_UNFINISHED) or len(text) <= len(self._context):
            return ""
        piece = text[len(self._context) :]
        self._before, self._given = self._given, len(self._ids)
        self._context = self._decode(self._before)
        return piece

    def rest(self) -> str:
        """What wasn't given out yet, finished or not: nothing comes after it."""
        return self._decode(self._before)[len(self._context) :]

    def _decode(self, start: int) -> str:
        return decode_ids(self._tokenizer, self._ids[start:], skip_special_tokens=False)


def byte_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of byte-fallback tokens (`<0x00>` …); none for byte-level vocabularies."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    found = tokenizer.convert_tokens_to_ids(names)
    assert isinstance(found, list)
    return frozenset(token for token in found if token is not None and token != tokenizer.unk_token_id)


class VisibleText:
    """What lies outside thinking blocks, without the tags around an answer, piece by piece.

    `is_open`: it begins within a block.
    """

    def __init__(self, markup: Markup, *, is_open: bool = False) -> None:
        self._markup = markup
        # Within a block only its own closing counts; one that the prompt opened is closed by any.
        self._closings = tuple(block.closing for block in markup.blocks) if is_open else ()
        self._held = ""

    @property
    def is_open(self) -> bool:
        """Whether the text so far ends within a thinking block."""
        return bool(self._closings)

    def feed(self, piece: str, *, last: bool = False) -> str:
        """The visible part of what is certain now; the end of a piece is held back where it may begin a tag."""
        return "".join(text for thinking, text in self.parts(piece, last=last) if not thinking)

    def parts(self, piece: str, *, last: bool = False) -> list[tuple[bool, str]]:
        """(whether it lies in a thinking block, text) of what is certain now, in order, tags left out."""
        text = self._held + piece
        shown: list[tuple[bool, str]] = []
        # Nearly every piece, so first: nothing in it can begin a tag.
        if not _has_one_of(text, _first_letters(self._closings or self._markup.tags)):
            self._held = ""
            return [(self.is_open, text)]
        while True:
            wanted = self._closings or self._markup.tags
            place, _, tag = min(((text.find(tag), -len(tag), tag) for tag in wanted if tag in text), default=(-1, 0, ""))
            if place < 0:
                break
            shown.append((self.is_open, text[:place]))
            if not self._closings:
                # None of an answer's own tags: those only vanish.
                self._closings = tuple(block.closing for block in self._markup.blocks if block.opening == tag)
            else:
                self._closings = ()
            text = text[place + len(tag) :]
        held = 0 if last else overlap(text, wanted)
        self._held = text[len(text) - held :]
        shown.append((self.is_open, text[: len(text) - held]))
        return shown


@lru_cache(maxsize=64)
def _first_letters(tags: tuple[str, ...]) -> frozenset[str]:
    return frozenset(tag[0] for tag in tags)


def _has_one_of(text: str, letters: frozenset[str]) -> bool:
    return not letters.isdisjoint(text)
