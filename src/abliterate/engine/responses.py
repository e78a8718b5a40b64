"""From generated ids to a `Response`: special tokens and thinking blocks, at once or as a response grows.

A growing response is decoded piece by piece, and only text that later tokens can't change is released. Each piece is decoded
after the one before it, so that decoders which look at their neighbours (leading spaces, bytes of one character in several
tokens) give what they give for the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from abliterate.model.chat_template import decode_ids
from abliterate.model.thinking import Block, Markup, overlap
from abliterate.scorers.base import Response, ResponseStream


@dataclass(frozen=True)
class Answer:
    """One greedy answer. `ids` go up to the length limit or, if the answer `ended`, up to and including its end.

    The end is a token, or, if it `ends_in_text`, a stop text of the generation config, which is part of what was said.
    """

    ids: tuple[int, ...]
    ended: bool
    response: Response
    ends_in_text: bool = False

    @property
    def spoken(self) -> tuple[int, ...]:
        """The ids without the end token."""
        return self.ids[:-1] if self.ended and not self.ends_in_text else self.ids


_UNFINISHED = "\ufffd"


class TextStream:
    """The text of one row. Special tokens are kept, because thinking blocks may be made of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, byte_ids: Set[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._byte_ids = byte_ids
        self._ids: list[int] = []
        self._before = 0  # where the context (the piece before) begins
        self._given = 0  # where the tokens begin whose text hasn't been returned yet
        self._context = ""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that `ids` add; it is empty while they end within a character."""
        self._ids.extend(ids)
        # A run of byte tokens is decoded as one, because a bad byte turns the good bytes before it into replacement characters.
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
        """The text that hasn't been returned yet, whether its last character is complete or not; no token comes after it."""
        return self._decode(self._before)[len(self._context) :]

    def _decode(self, start: int) -> str:
        return decode_ids(self._tokenizer, self._ids[start:], skip_special_tokens=False)


def byte_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids of byte-fallback tokens (`<0x00>` …); byte-level vocabularies have none."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert isinstance(ids, list)
    return frozenset(token for token in ids if token is not None and token != tokenizer.unk_token_id)


class VisibleText:
    """The text outside thinking blocks, without the tags around an answer, piece by piece.

    `is_open` means that the text begins within a thinking block. None means that it may: a closing tag that nobody opened makes
    everything before it thinking, so nothing is certain before the first tag. Likewise, a block that was opened twice and
    closed once may be closed again. With `at_once`, text before the first tag is shown all the same; `was_thinking` tells
    whether it turned out to be thinking.
    """

    def __init__(self, markup: Markup, *, is_open: bool | None = False, at_once: bool = False) -> None:
        self._markup = markup
        # Within a block only its own closing tag counts; a block that the prompt opened is closed by any closing tag.
        self._blocks: tuple[Block, ...] = markup.blocks if is_open else ()
        self._unopened = markup.unopened if is_open is None else ()
        self._at_once = at_once
        self._inside = bool(is_open)
        self._depth = int(self._inside)  # the opening tags without a closing tag
        self._undecided: list[str] = []  # text that is thinking if one more closing tag comes
        self._held = ""
        self.was_thinking = False

    @property
    def is_open(self) -> bool:
        """Whether the text so far ends within a thinking block."""
        return self._inside

    def feed(self, piece: str, *, last: bool = False) -> str:
        """The visible part of the text that is certain now; the end of a piece is held back if it may begin a tag."""
        return "".join(text for thinking, text in self.parts(piece, last=last) if not thinking)

    def parts(self, piece: str, *, last: bool = False) -> list[tuple[bool, str]]:
        """The text that is certain now as (whether it lies in a thinking block, text), in order, without tags."""
        text = self._held + piece
        shown: list[tuple[bool, str]] = []
        wanted = self._wanted()
        # Checked first, because in nearly every piece no character can begin a tag.
        while _has_one_of(text, _first_letters(wanted)):
            position, _, tag = min(((text.find(tag), -len(tag), tag) for tag in wanted if tag in text), default=(-1, 0, ""))
            if position < 0:
                break
            shown += self._say(text[:position])
            shown = self._pass(tag, shown)
            text, wanted = text[position + len(tag) :], self._wanted()
        held = 0 if last else overlap(text, wanted)
        self._held = text[len(text) - held :]
        shown += self._say(text[: len(text) - held])
        return shown + self._settled(thinking=False) if last else shown

    def _wanted(self) -> tuple[str, ...]:
        """The tags that change something here."""
        closings = tuple(block.closing for block in self._blocks) if self._depth else self._unopened
        if not self._inside:
            return closings + self._markup.tags
        return closings + tuple(block.opening for block in self._blocks if block.nests)

    def _say(self, text: str) -> list[tuple[bool, str]]:
        """The part of a text without tags that is certain."""
        if self._inside or not (self._depth or self._unopened) or (self._unopened and self._at_once):
            return [(self._inside, text)]
        self._undecided.append(text)
        return []

    def _settled(self, *, thinking: bool) -> list[tuple[bool, str]]:
        """The text that was undecided until now."""
        settled = [(thinking, text) for text in self._undecided]
        self._undecided = []
        return settled

    def _pass(self, tag: str, shown: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
        """Go past a tag; what was `shown` of the piece, and the text that the tag decides."""
        if tag in self._markup.answer_tags and not self._inside:
            return shown  # these tags open no block; they only vanish
        opened = tuple(block for block in self._markup.blocks if block.opening == tag)
        if opened and not self._closes(tag):
            if self._depth and any(block in self._blocks for block in opened):
                self._depth, self._inside = self._depth + 1, True
                return shown
            shown = shown + self._settled(thinking=False)
            self._blocks, self._unopened, self._depth, self._inside = opened, (), 1, True
            return shown
        if self._unopened:
            self._unopened, self.was_thinking = (), True
            return [(True, text) for _, text in shown] + self._settled(thinking=True)
        shown = shown + ([] if self._inside else self._settled(thinking=True))
        nests = all(block.nests for block in self._blocks if block.closing == tag)
        self._depth, self._inside = self._depth - 1 if nests else 0, False
        return shown

    def _closes(self, tag: str) -> bool:
        """Whether a tag is a closing tag here."""
        return tag in self._unopened or (bool(self._depth) and any(block.closing == tag for block in self._blocks))


@lru_cache(maxsize=64)
def _first_letters(tags: tuple[str, ...]) -> frozenset[str]:
    return frozenset(tag[0] for tag in tags)


def _has_one_of(text: str, letters: frozenset[str]) -> bool:
    return not letters.isdisjoint(text)


class ResponseReader:
    """Decodes generated ids with the markup that the settings name.

    A response is the text outside thinking blocks, without the tags around an answer. It only grows with more tokens:
    visible text stays visible, so a marker that was seen is a marker of the whole response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markup: Markup) -> None:
        self.markup = markup
        self._tokenizer = tokenizer
        # Decoders that tidy up spaces look ahead, so their pieces are not the pieces of the whole text.
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._byte_ids = byte_ids(tokenizer)
        # All tokens that `skip_special_tokens` skips, which are more than the tokens with a role.
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def starts_open(self, tail: str) -> bool | None:
        """Whether a rendered prompt ends inside a thinking block; `tail` is its part after the user's text.

        None if the response may begin in a block that nobody opened.
        """
        return self.markup.starts_open(tail)

    def read(self, ids: Sequence[int], *, starts_open: bool | None = False) -> Response:
        """The response of one row of generated ids (padding after the end is special and vanishes)."""
        raw = decode_ids(self._tokenizer, ids, skip_special_tokens=False)
        tags = self.markup.tags + (self.markup.unopened if starts_open is None else ())
        if not starts_open and not any(tag in raw for tag in tags):
            return Response(decode_ids(self._tokenizer, ids, skip_special_tokens=True), ids=tuple(ids))
        visible = VisibleText(self.markup, is_open=starts_open)
        text = visible.feed(raw, last=True)
        return Response(self.without_special(text), thinking_open=visible.is_open, ids=tuple(ids))

    def without_special(self, text: str) -> str:
        """Text without the tokenizer's special tokens."""
        return self._special.sub("", text)

    def watch(self, stream: ResponseStream, *, starts_open: bool | None = False) -> GrowingResponse:
        """A growing response whose visible text goes to `stream`."""
        text = None if self.tidies else TextStream(self._tokenizer, self._byte_ids)
        return GrowingResponse(text, VisibleText(self.markup, is_open=starts_open), self.without_special, stream)


class GrowingResponse:
    """Takes ids as they are generated and tells when the stream is decided; without `text` it is never decided early."""

    def __init__(
        self, text: TextStream | None, visible: VisibleText, cleaned: Callable[[str], str], stream: ResponseStream
    ) -> None:
        self._text = text
        self._visible = visible
        self._cleaned = cleaned
        self._stream = stream

    def feed(self, ids: Sequence[int]) -> bool:
        """Take more ids; return whether the certain part of the response decides the stream."""
        if self._text is None:
            return False
        piece = self._visible.feed(self._text.feed(ids))
        return bool(piece) and self._stream.feed(self._cleaned(piece))
