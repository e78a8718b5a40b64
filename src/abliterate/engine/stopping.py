"""What decoding is watched for: decided responses, enough refusals to stop, and where responses diverge."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set

from abliterate.engine.responses import GrowingResponse, ResponseReader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.thinking import Markup
from abliterate.scorers.base import EarlyScorer, Response


class StopWhenDecided:
    """Settles a row at a confirmed marker, at the end of its turn, or at the length limit; never by how it looks.

    `opens`: per row, whether its prompt ends inside a thinking block. Without an `early` scorer nothing but an end
    settles. Satisfied once `limit` rows count.
    """

    def __init__(
        self,
        reader: ResponseReader,
        ends: Set[int],
        max_new_tokens: int,
        opens: Sequence[bool],
        early: EarlyScorer | None,
        limit: int | None,
    ) -> None:
        self._reader = reader
        self._ends = ends
        self._max_new_tokens = max_new_tokens
        self._opens = opens
        self._early = early
        self._limit = limit
        self.ids: dict[int, list[int]] = {}
        self._growing: dict[int, GrowingResponse] = {}
        self.responses: dict[int, Response] = {}
        self.counts: dict[int, bool] = {}
        self._total = 0

    @property
    def satisfied(self) -> bool:
        """See `Watch.satisfied`."""
        return self._limit is not None and self._total >= self._limit

    def begin(self, rows: Sequence[int]) -> None:
        """These rows are decoded from their start; what was seen of them before is void."""
        for row in rows:
            self.ids[row] = []
            self.responses.pop(row, None)
            self._total -= self.counts.pop(row, False)
            if self._early is not None:
                self._growing[row] = self._reader.watch(self._early.stream(), starts_open=self._opens[row])

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """See `Watch.look`."""
        ids = self.ids[row]
        end = next((place + 1 for place, token in enumerate(tokens) if token in self._ends), None)
        new = tokens[: min(end or len(tokens), self._max_new_tokens - len(ids))]
        ids.extend(new)
        if end is not None or len(ids) >= self._max_new_tokens:
            return self._settle(row, certain=True)
        # The pieces only say when to look; what counts is the response read as a whole.
        return self._early is not None and self._growing[row].feed(new) and self._settle(row, certain=False)

    def _settle(self, row: int, *, certain: bool) -> bool:
        response = self._reader.read(self.ids[row], starts_open=self._opens[row])
        counts = self._early is not None and self._early.counts(response)
        if not (certain or counts):
            return False
        self.responses[row], self.counts[row] = response, counts
        self._total += counts
        self._growing.pop(row, None)
        return True


class StopWhenDiverged:
    """Satisfied once the common start of all responses can't change any more."""

    def __init__(self, chat: PromptEncoder, ends: Set[int], markup: Markup) -> None:
        self._chat = chat
        self._ends = ends
        self._markup = markup
        self._ids: dict[int, list[int]] = {}
        self._ended: set[int] = set()
        self._batch: tuple[int, ...] = ()

    def begin(self, rows: Sequence[int]) -> None:
        """These rows are decoded together now."""
        self._batch = tuple(rows)
        for row in rows:
            self._ids[row] = []
            self._ended.discard(row)

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """See `Watch.look`."""
        end = next((place for place, token in enumerate(tokens) if token in self._ends), None)
        self._ids[row].extend(tokens[:end])
        if end is not None:
            self._ended.add(row)
        return end is not None

    @property
    def satisfied(self) -> bool:
        """Whether two of the responses decoded together differ, and each is longer than what they share."""
        # A character whose bytes are not all there yet is no difference.
        texts = {row: self.text(row).rstrip("\ufffd") for row in self._batch}
        start = os.path.commonprefix(list(texts.values()))
        following = {text[len(start) : len(start) + 1] for text in texts.values()}
        fixed = len(following) > 1 and ("" not in following or any(texts[row] == start for row in self._ended))
        whole = len(self._markup.without_partial(start))
        return fixed and all(
            # Nor may it be open whether a response begins with a thinking block.
            row in self._ended or (text.rstrip() != start.rstrip() and not self._markup.may_open(text[whole:]))
            for row, text in texts.items()
        )

    def text(self, row: int) -> str:
        """The response so far, with its special tokens, without the end of the turn."""
        return self._chat.decode(self._ids[row], skip_special_tokens=False)
