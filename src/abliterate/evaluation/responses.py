"""From generated ids to a `Response`: special tokens and thinking blocks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from abliterate.evaluation.base import Response
from abliterate.model.chat import decode_ids

ThinkingBlocks = Sequence[tuple[str, str]]


class ResponseReader:
    """Decodes generated ids. `blocks` are (opening, opening + … + closing) pairs from the settings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, blocks: ThinkingBlocks) -> None:
        self._tokenizer = tokenizer
        # The middle of a closed block is everything between; what must follow the opening is the closing.
        self._tags = tuple((opening, closed[len(opening) :]) for opening, closed in blocks)

    def starts_open(self, rendered: str) -> bool:
        """Whether a rendered prompt (with response prefix) ends inside a thinking block."""
        return any(rendered.rfind(opening) > rendered.rfind(closing) for opening, closing in self._tags)

    def read(self, ids: Sequence[int], *, starts_open: bool = False) -> Response:
        """The response of one row of generated ids (padding after the end is special and vanishes)."""
        raw = decode_ids(self._tokenizer, ids, skip_special_tokens=False)
        for opening, closing in self._tags:
            closed, opened = raw.rfind(closing), raw.rfind(opening)
            if closed >= 0 and closed > opened:
                return Response(self._plain(raw[closed + len(closing) :]))
            if opened >= 0:
                return Response("", thinking_open=True)
        if starts_open:
            return Response("", thinking_open=True)
        return Response(decode_ids(self._tokenizer, ids, skip_special_tokens=True))

    def _plain(self, text: str) -> str:
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text
