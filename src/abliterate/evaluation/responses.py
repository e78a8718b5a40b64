"""From generated ids to a `Response`: special tokens and thinking blocks; at once, or as a response grows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from abliterate.evaluation.base import Response, ResponseStream
from abliterate.evaluation.text import TextStream, VisibleText, byte_ids
from abliterate.model.chat import decode_ids
from abliterate.model.markup import Markup


class ResponseReader:
    """Decodes generated ids, with the markup that the settings name.

    A response is what lies outside thinking blocks, without the tags around an answer. It only grows with more tokens:
    what was visible stays visible, so a marker that was seen is a marker of the whole response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markup: Markup) -> None:
        self.markup = markup
        self._tokenizer = tokenizer
        # Decoders that tidy up spaces look ahead: their pieces are not those of the whole.
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._byte_ids = byte_ids(tokenizer)
        # Those that `skip_special_tokens` skips: more than the ones with a role.
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    def starts_open(self, tail: str) -> bool:
        """Whether a rendered prompt ends inside a thinking block. `tail`: what stands after the user's text."""
        return self.markup.open_block(tail) is not None

    def read(self, ids: Sequence[int], *, starts_open: bool = False) -> Response:
        """The response of one row of generated ids (padding after the end is special and vanishes)."""
        raw = decode_ids(self._tokenizer, ids, skip_special_tokens=False)
        if not starts_open and not any(tag in raw for tag in self.markup.tags):
            return Response(decode_ids(self._tokenizer, ids, skip_special_tokens=True))
        visible = VisibleText(self.markup, is_open=starts_open)
        text = visible.feed(raw, last=True)
        return Response(self.without_special(text), thinking_open=visible.is_open)

    def without_special(self, text: str) -> str:
        """Text without the tokenizer's special tokens."""
        return self._special.sub("", text)

    def watch(self, stream: ResponseStream, *, starts_open: bool = False) -> GrowingResponse:
        """A growing response whose visible text goes to `stream`."""
        text = None if self.tidies else TextStream(self._tokenizer, self._byte_ids)
        return GrowingResponse(text, VisibleText(self.markup, is_open=starts_open), self.without_special, stream)


class GrowingResponse:
    """Ids in, as they are generated; says when the stream is settled. `text` None: only wholes can be read."""

    def __init__(
        self, text: TextStream | None, visible: VisibleText, cleaned: Callable[[str], str], stream: ResponseStream
    ) -> None:
        self._text = text
        self._visible = visible
        self._cleaned = cleaned
        self._stream = stream

    def feed(self, ids: Sequence[int]) -> bool:
        """Whether the stream is settled by what is certain of the response now."""
        if self._text is None:
            return False
        piece = self._visible.feed(self._text.feed(ids))
        return bool(piece) and self._stream.feed(self._cleaned(piece))
