"""Tells where a response ends: at an end token, or where a stop text of the model's generation config is complete."""

from __future__ import annotations

import copy
from collections.abc import Sequence, Set

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from abliterate.model.generation import stop_texts

# An id that no vocabulary has; it matches no stop text.
_NOTHING = 1 << 40


class Ends:
    """The tokens `ids` that end a response, and the stop texts that `stops` looks for as `generate` does."""

    def __init__(self, ids: Set[int], stops: StopStringCriteria | None = None) -> None:
        self.ids = frozenset(ids)
        self._stops = stops

    @staticmethod
    def of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Ends:
        """The ends by the model's generation config."""
        return Ends(end_ids(model), _stops(model, tokenizer))

    def criteria(self) -> StoppingCriteriaList:
        """The criteria by which `generate` ends at a stop text; end tokens it knows from its config."""
        # A copy: `generate` moves its tensors to the device and leaves them there, where our own lookups would wait for it.
        return StoppingCriteriaList([] if self._stops is None else [copy.copy(self._stops)])

    @property
    def reads_text(self) -> bool:
        """Whether texts end a response, and not tokens alone; only then do the ids before a token matter."""
        return self._stops is not None

    def context(self, ids: Sequence[int]) -> list[int]:
        """The last of `ids` that can be the beginning of a stop text."""
        width = 0 if self._stops is None else self._stops.maximum_token_len - 1
        return list(ids[max(0, len(ids) - width) :])

    def length(self, tokens: Sequence[int], before: Sequence[int]) -> int | None:
        """The number of `tokens` up to and including the first end; None if there is no end. `before` are the ids before them.

        A stop text may begin in the prompt, because `generate` finds it there, too.
        """
        end = next((index + 1 for index, token in enumerate(tokens) if token in self.ids), None)
        if self._stops is None or not tokens:
            return end
        width = self._stops.maximum_token_len
        row = [*([_NOTHING] * width), *self.context(before), *tokens][-(width - 1 + len(tokens)) :]
        windows = torch.tensor(row).unfold(0, width, 1)  # one for every token, which ends there
        stopped: list[bool] = _found(self._stops, windows).tolist()
        stop = next((index + 1 for index, found in enumerate(stopped) if found), None)
        return min((count for count in (end, stop) if count is not None), default=None)

    def without_end(self, ids: Sequence[int]) -> list[int]:
        """`ids` without an end token at their end; a stop text is text and stays."""
        return list(ids[:-1] if ids and ids[-1] in self.ids else ids)


def end_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a response."""
    config = model.generation_config
    ends = config.eos_token_id if config is not None else None
    return set(ends) if isinstance(ends, list) else {ends} if ends is not None else set()


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> StopStringCriteria | None:
    texts = stop_texts(model)
    if not texts:
        return None
    try:
        return StopStringCriteria(tokenizer, list(texts))
    except ValueError:  # no token of the vocabulary can end any of the texts, so they never come
        return None


def _found(stops: StopStringCriteria, windows: Tensor) -> Tensor:
    """Whether a stop text ends at the last id of each window (n, width)."""
    found = stops(windows.to(stops.embedding_vec.device), None)
    assert isinstance(found, Tensor)
    return found
