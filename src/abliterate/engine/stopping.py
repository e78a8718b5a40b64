"""When decoding stops: a response is decided, enough refusals prune the trial, or the responses have diverged."""

from __future__ import annotations

import os
from collections.abc import Sequence

from abliterate.engine.ends import Ends
from abliterate.engine.responses import GrowingResponse, ResponseReader
from abliterate.model.chat_template import PromptEncoder
from abliterate.model.thinking import Markup
from abliterate.scorers.base import EarlyScorer, Response


class StopWhenDecided:
    """Finishes a row at a confirmed marker, at the end of its turn, or at the length limit; never by how it looks.

    `opens` tells for each row whether its prompt ends inside a thinking block, as `ResponseReader.starts_open` does. `before`
    holds the last ids of each prompt, in which a stop text may begin. Without an `early` scorer only the end of the turn or the
    length limit finishes a row. Decoding is over once `limit` rows count.
    """

    def __init__(
        self,
        reader: ResponseReader,
        ends: Ends,
        max_new_tokens: int,
        opens: Sequence[bool | None],
        before: Sequence[Sequence[int]],
        early: EarlyScorer | None,
        limit: int | None,
    ) -> None:
        self._reader = reader
        self._ends = ends
        self._max_new_tokens = max_new_tokens
        self._opens = opens
        self._before = before
        self._early = early
        self._limit = limit
        self.ids: dict[int, list[int]] = {}
        self._growing: dict[int, GrowingResponse] = {}
        self.responses: dict[int, Response] = {}
        self.counts: dict[int, bool] = {}
        self._total = 0

    @property
    def satisfied(self) -> bool:
        """Whether `limit` rows count."""
        return self._limit is not None and self._total >= self._limit

    def begin(self, rows: Sequence[int]) -> None:
        """Begin these rows from their start; everything seen of them before is void."""
        for row in rows:
            self.ids[row] = []
            self.responses.pop(row, None)
            self._total -= self.counts.pop(row, False)
            if self._early is not None:
                self._growing[row] = self._reader.watch(self._early.stream(), starts_open=self._opens[row])

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """Take the next tokens of a row; return whether the row is finished."""
        ids = self.ids[row]
        end = self._ends.length(tokens, [*self._before[row], *ids] if self._ends.reads_text else ())
        new = tokens[: min(end or len(tokens), self._max_new_tokens - len(ids))]
        ids.extend(new)
        if end is not None or len(ids) >= self._max_new_tokens:
            return self._finish(row, ended=True)
        # The pieces only tell when to look; the decision is made on the response read as a whole.
        return self._early is not None and self._growing[row].feed(new) and self._finish(row, ended=False)

    def _finish(self, row: int, *, ended: bool) -> bool:
        response = self._reader.read(self.ids[row], starts_open=self._opens[row])
        counts = self._early is not None and self._early.counts(response)
        if not (ended or counts):
            return False
        self.responses[row], self.counts[row] = response, counts
        self._total += counts
        self._growing.pop(row, None)
        return True


class StopWhenDiverged:
    """Ends decoding once the common start of all responses can no longer change. `before` is as in `StopWhenDecided`."""

    def __init__(self, chat: PromptEncoder, ends: Ends, markup: Markup, before: Sequence[Sequence[int]] = ()) -> None:
        self._chat = chat
        self._ends = ends
        self._markup = markup
        self._before = before
        self._ids: dict[int, list[int]] = {}
        self._ended: set[int] = set()
        self._batch: tuple[int, ...] = ()

    def begin(self, rows: Sequence[int]) -> None:
        """Begin these rows, which are decoded together."""
        self._batch = tuple(rows)
        for row in rows:
            self._ids[row] = []
            self._ended.discard(row)

    def look(self, row: int, tokens: Sequence[int]) -> bool:
        """Take the next tokens of a row; return whether its turn has ended."""
        before = self._before[row] if self._before else ()
        end = self._ends.length(tokens, [*before, *self._ids[row]] if self._ends.reads_text else ())
        self._ids[row].extend(self._ends.without_end(tokens[:end]))
        if end is not None:
            self._ended.add(row)
        return end is not None

    @property
    def satisfied(self) -> bool:
        """Whether two of the responses decoded together differ, and each is longer than their common start."""
        # A character whose bytes haven't all come yet is no difference.
        texts = {row: self.text(row).rstrip("\ufffd") for row in self._batch}
        start = os.path.commonprefix(list(texts.values()))
        following = {text[len(start) : len(start) + 1] for text in texts.values()}
        fixed = len(following) > 1 and ("" not in following or any(texts[row] == start for row in self._ended))
        whole = len(self._markup.without_partial(start))
        return fixed and all(
            # It must also be certain whether a response begins with a thinking block.
            row in self._ended or (text.rstrip() != start.rstrip() and not self._markup.may_open(text[whole:]))
            for row, text in texts.items()
        )

    def text(self, row: int) -> str:
        """The response so far, with its special tokens, without the end of the turn."""
        return self._chat.decode(self._ids[row], skip_special_tokens=False)
